"""Run directories and what is read from them: tables, curves, comparisons."""
