r"""Train and test an encoder on a task of the Long Range Arena, with `Trainer`.

Settings come from a YAML file (configs/lra has those of the papers), from options, or from both:
options win.

example:
  mra-hf run-lra configs/lra/listops.yaml --attention adamra \
      --output_dir runs/listops-adamra
  mra-hf run-lra configs/lra/image.yaml --source cifar-10-batches-bin \
      --attention mra2_s --seed 1 --output_dir runs/image-mra2_s-1
"""

import argparse
from typing import Any

from transformers import TrainingArguments

from mra_hf.commands import experiments
from mra_hf.training.lra import LraArguments, run_lra
from mra_hf.training.runs import StoppingArguments

DATACLASSES = (LraArguments, StoppingArguments, TrainingArguments)

add_arguments = experiments.add_training_arguments


def run(args: argparse.Namespace) -> int:
    """Run the experiment and print its metrics, and the accuracies that need no reading."""
    return experiments.run_experiment(args, DATACLASSES, run_lra, _print_controls)


def _print_controls(results: dict[str, Any]) -> None:
    print(f"data: {results['split']}")
    for name, accuracy in results["controls"].items():
        print(f"{'test accuracy of ' + name:<36}{accuracy:>14.4f}")
