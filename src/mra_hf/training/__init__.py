"""Experiments with `Trainer`: what every run shares (`runs`), and one module per task.

An experiment is described by dataclasses: a key of its YAML file *is* a field, the command line
overrides it, and the settings in force are saved beside the result. A task is a module with its
dataclasses and a function that checks them, begins a `runs.Experiment`, makes model, data and
trainer, and calls `Experiment.fit`.
"""
