"""Experiments with `Trainer`: what every run shares (`runs`), and one module per task.

An experiment is described by dataclasses: a key of its YAML file *is* a field, the command line
overrides it, and what was in force is saved beside the result.
"""
