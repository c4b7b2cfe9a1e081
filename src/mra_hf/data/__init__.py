"""Corpora and data sets: one module per task."""
