r"""Propose block_per_row for each layer of a checkpoint, from the errors of its heads on a text.

Prints the fewest blocks per row with which each layer stays below the target error, and writes a
CSV with the errors of every head. The checkpoint attends densely while it reads: errors are of each
layer by itself. An early layer's errors pass through all others, so check a list on the task.

example:
  mra-hf calibrate roberta-4096 book.txt --target-error 0.2 --length 4096
"""

import argparse
from pathlib import Path

from mra_hf.commands.experiments import quiet_outside_terminals
from mra_hf.commands.record import add_reading_arguments, check_new_file
from mra_hf.results.files import csv_text, write_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_reading_arguments(parser)
    parser.add_argument(
        "--target-error",
        type=float,
        required=True,
        metavar="X",
        help="mean relative error of the outputs of a layer's heads, above 0; 0.2 is 20 %%",
    )
    parser.add_argument(
        "--approx-mode",
        choices=("full", "sparse"),
        default="full",
        help="full: MRA-2; sparse: MRA-2-s (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        default=Path("calibration.csv"),
        help="CSV with a row for each head; it must not exist (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure the heads, write them as CSV and print the proposal."""
    check_new_file(args.out)
    from mra_hf.analysis.calibration import check_target, head_report, layers_of, propose
    from mra_hf.analysis.recording import record_checkpoint

    check_target(args.target_error)
    quiet_outside_terminals()
    heads = record_checkpoint(args.checkpoint, args.text, length=args.length, texts=args.texts)
    proposal = propose(heads, args.target_error, approx_mode=args.approx_mode)
    rows = head_report(heads, approx_mode=args.approx_mode)
    write_text(args.out, csv_text(list(rows[0]), rows))

    layer_of = dict(zip(heads.instance_names, layers_of(heads), strict=True))
    print(
        f"{'layer':>5}{'entropy':>9}{'blocks':>8}{'error':>8}{f'error at {proposal.uniform}':>14}"
    )
    for layer, blocks in enumerate(proposal.block_per_row):
        entropies = [row["entropy"] for row in rows if layer_of[row["instance"]] == layer]
        print(
            f"{layer:>5}{sum(entropies) / len(entropies):>9.2f}{blocks:>8}"
            f"{proposal.errors[layer]:>8.3f}{proposal.uniform_errors[layer]:>14.3f}"
        )
    print(
        "entropy: mean over the heads, in nats, low where few tokens get the attention; blocks: "
        "proposed,\nexact blocks per block row; error: mean relative error of the heads' outputs "
        f"with them; error at {proposal.uniform}:\nwith {proposal.uniform} blocks in every layer."
    )
    listed = ",".join(map(str, proposal.block_per_row))
    mean = sum(proposal.block_per_row) / len(proposal.block_per_row)
    print(
        f"\nblock_per_row=[{listed}]: {mean:.1f} blocks per row on average, "
        f"every layer below an error of {args.target_error:g}.\n"
        f"With {proposal.uniform} in every layer the worst layer has "
        f"{max(proposal.uniform_errors):.3f}.\n"
        "Use it as one of\n"
        f"  MraConfig(block_per_row=[{listed}])\n"
        f"  mra_hf.set_attention(model, block_per_row=[{listed}])\n"
        f"  --config_overrides 'block_per_row=[{listed}]'\n"
        "Models whose layers do not know their index (DistilBERT, ViT, ALBERT) take one number for "
        f"all: {proposal.uniform}.\n"
        f"heads written to {args.out}"
    )
    return 0
