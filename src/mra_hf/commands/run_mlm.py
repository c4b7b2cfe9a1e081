r"""Train or evaluate a masked language model on text files or a dataset, with `Trainer`.

Settings come from a YAML file, from options, or from both: options win.

example:
  mra-hf run-mlm configs/pretrain/english_512.yaml --output_dir runs/english-512
  mra-hf run-mlm --model_name_or_path roberta-4096 --max_seq_length 4096 \
      --train_file books/ --validation_file held-out.txt \
      --do_train --do_eval --output_dir runs/books
"""

import argparse

from transformers import TrainingArguments

from mra_hf.commands import experiments
from mra_hf.training.masked_lm import MaskedLMDataArguments, MaskedLMModelArguments, run_masked_lm
from mra_hf.training.runs import StoppingArguments

DATACLASSES = (MaskedLMModelArguments, MaskedLMDataArguments, StoppingArguments, TrainingArguments)

add_arguments = experiments.add_training_arguments


def run(args: argparse.Namespace) -> int:
    """Run the experiment and print its metrics."""
    return experiments.run_experiment(args, DATACLASSES, run_masked_lm)
