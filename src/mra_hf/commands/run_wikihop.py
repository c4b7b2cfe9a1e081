r"""Train or evaluate multi-hop question answering over candidates (WikiHop), with `Trainer`.

Settings come from a YAML file, from options, or from both: options win. Questions are
JSON files in WikiHop's schema; `mra-hf build-wordnet-hop` makes some.

example:
  mra-hf run-wikihop --model_name_or_path roberta-4096 \
      --train_file wikihop/train.json --validation_file wikihop/dev.json \
      --do_train --do_eval --output_dir runs/wikihop
"""

import argparse

from transformers import TrainingArguments

from mra_hf.commands import experiments
from mra_hf.training.runs import ModelArguments, StoppingArguments
from mra_hf.training.wikihop import WikiHopDataArguments, run_wikihop

DATACLASSES = (ModelArguments, WikiHopDataArguments, StoppingArguments, TrainingArguments)

add_arguments = experiments.add_training_arguments


def run(args: argparse.Namespace) -> int:
    """Run the experiment and print its metrics."""
    return experiments.run_experiment(args, DATACLASSES, run_wikihop)
