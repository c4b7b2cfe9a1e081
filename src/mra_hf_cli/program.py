"""The program `mra-hf`: what it can answer at once, it answers before anything slow is imported."""

import sys
from collections.abc import Sequence

from mra_hf_cli import command_of


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program on `argv` (default: the command line) and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command_of(argv)
    from mra_hf.commands import main as run

    return run(argv)


if __name__ == "__main__":
    raise SystemExit(main())
