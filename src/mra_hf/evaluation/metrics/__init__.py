"""Metric modules for `evaluate`, inside the package so that no download is needed."""

from pathlib import Path

import evaluate


def load_metric(name: str) -> evaluate.EvaluationModule:
    """The metric `name`: "accuracy" or "confusion_matrix"."""
    return evaluate.load(str(Path(__file__).parent / name / f"{name}.py"))
