"""Write a checkpoint as a graph for ONNX Runtime, OpenVINO or torch without this package.

OUT gets the graph, tokenizer, config and a README that says how to run it. The graph takes every
batch size and length; it is compared with the model at three lengths before OUT appears.

example:
  mra-hf export roberta-4096 roberta-4096-onnx --format onnx --dtype int8
"""

import argparse
import sys

from mra_hf.deployment import DTYPES, FORMATS, export_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `mra-hf export`."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="directory or hub id of type mra_hf, with any head, or a converted sentence encoder",
    )
    parser.add_argument("output_dir", metavar="OUT", help="directory to write")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="onnx",
        help="onnx: OUT/onnx/model.onnx; torch: OUT/model.pt2 (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="float32",
        help="of weights and arithmetic; bfloat16: torch only; int8: the weights of linear layers, "
        "onnx only (default: %(default)s)",
    )
    parser.add_argument(
        "--opset",
        type=int,
        default=18,
        metavar="N",
        help="version of ONNX's operators (default: %(default)s)",
    )
    parser.add_argument(
        "--pooling",
        action="store_true",
        help="put the pooling of a sentence encoder into the graph, with the output "
        "sentence_embedding (default: states of tokens only)",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it is not empty")


def run(args: argparse.Namespace) -> int:
    """Export, print what was compared and where it lies."""
    report = export_checkpoint(
        **vars(args), progress=lambda line: print(f"{line} ...", file=sys.stderr, flush=True)
    )
    print(report.summary())
    print(f"\nwritten to {report.output}; its README.md says how to run it")
    return 0
