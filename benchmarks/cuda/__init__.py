"""The commands for a GPU: check, bench, profile and tune."""
