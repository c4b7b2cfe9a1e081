"""Attention under study: matrices and pictures of heads, errors, budgets, the paper's figures."""
