r"""Train or evaluate a masked language model on text files or a dataset, with `Trainer`.

Settings come from a YAML file, from the command line, or from both: the command line wins. Every
argument of transformers' TrainingArguments is one of them.

example:
  mra-hf run-mlm configs/pretrain/english_512.yaml --output_dir runs/english-512
  mra-hf run-mlm --model_name_or_path roberta-4096 --max_seq_length 4096 --train_file books/ \
      --validation_file held-out.txt --do_train --do_eval --output_dir runs/books
"""

import argparse

from transformers import TrainingArguments

from mra_hf.commands import experiments
from mra_hf.training import (
    EXPERIMENT_NAME,
    HISTORY_NAME,
    RESULTS_NAME,
    MaskedLMDataArguments,
    ModelArguments,
    run_masked_lm,
)

DATACLASSES = (ModelArguments, MaskedLMDataArguments, TrainingArguments)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that are no fields of a dataclass."""
    experiments.add_config_argument(parser)
    # A bar while training, although this program keeps transformers quiet.
    parser.set_defaults(disable_tqdm=False, report_to="none")


def run(args: argparse.Namespace) -> int:
    """Run the experiment and print its metrics."""
    model_args, data_args, training_args = experiments.dataclasses_of(args, DATACLASSES)
    results = run_masked_lm(model_args, data_args, training_args)
    for part in ("train", "eval"):
        for name, value in results.get(part, {}).items():
            print(
                f"{name:<28}{value:>14.4f}"
                if isinstance(value, float)
                else f"{name:<28}{value:>14}"
            )
    written = [RESULTS_NAME, EXPERIMENT_NAME, *([HISTORY_NAME] if training_args.do_train else [])]
    print(f"written to {training_args.output_dir}: {', '.join(written)}")
    return 0
