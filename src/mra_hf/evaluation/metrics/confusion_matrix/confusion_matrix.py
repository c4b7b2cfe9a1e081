"""Confusion matrix, as a module of `evaluate`."""

import datasets
import evaluate
import numpy as np


class ConfusionMatrix(evaluate.Metric):
    """How often a class (row) was taken for another (column)."""

    def _info(self):
        return evaluate.MetricInfo(
            description="How often a class (row) was taken for another (column).",
            citation="",
            inputs_description="predictions and references: lists of class numbers; n_classes.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, n_classes):
        counts = np.zeros((n_classes, n_classes), dtype=np.int64)
        np.add.at(counts, (np.asarray(references), np.asarray(predictions)), 1)
        return {"confusion_matrix": counts.tolist()}
