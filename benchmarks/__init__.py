"""Measurements of the operator and of the models: what is timed, where, and the tables of it."""
