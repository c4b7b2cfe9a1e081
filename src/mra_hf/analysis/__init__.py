"""Looking at attention: matrices of one head, pictures."""
