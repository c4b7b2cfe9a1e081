"""Small pre-norm encoders: the Long Range Arena's, AdaMRA's and the image classifier."""
