r"""Fine-tune and evaluate a classifier of texts or pairs of texts (reviews, MNLI, ...).

Settings come from a YAML file, from options, or from both: options win. Rows are read from .tsv,
.csv and .jsonl files, or from a data set by name. `run-mnli` is another name of this command.

A new classifier on a model with a distance bias gets a global first block, as `mra-hf convert`
gives to classifiers: it reads the first token, from which the bias would hide far text.

example:
  mra-hf run-classification --model_name_or_path roberta-4096 \
      --train_file train.tsv --validation_file dev.tsv \
      --do_train --do_eval --output_dir runs/pairs
  mra-hf run-classification --model_name_or_path roberta-4096 \
      --dataset_name nyu-mll/multi_nli \
      --do_train --do_eval --output_dir runs/mnli
"""

import argparse
from typing import Any

from transformers import TrainingArguments

from mra_hf.commands import experiments
from mra_hf.training.classification import ClassificationDataArguments, run_classification
from mra_hf.training.runs import ModelArguments, StoppingArguments

DATACLASSES = (ModelArguments, ClassificationDataArguments, StoppingArguments, TrainingArguments)

add_arguments = experiments.add_training_arguments


def run(args: argparse.Namespace) -> int:
    """Run the experiment and print its metrics and confusion matrices."""
    return experiments.run_experiment(args, DATACLASSES, run_classification, _print_confusion)


def _print_confusion(results: dict[str, Any]) -> None:
    labels = results["labels"]
    for name, counts in results.get("confusion_matrix", {}).items():
        print(f"confusion matrix, {name} (rows: the label, columns: predicted)")
        print(" " * 16 + "".join(f"{label[:14]:>16}" for label in labels))
        for label, row in zip(labels, counts, strict=True):
            print(f"{label[:14]:<16}" + "".join(f"{count:>16}" for count in row))
