"""Accuracy, as a module of `evaluate`."""

import datasets
import evaluate
import numpy as np


class Accuracy(evaluate.Metric):
    """Share of the predictions that equal their references."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Share of the predictions that equal their references.",
            citation="",
            inputs_description="predictions and references: lists of class numbers.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}
