#!/usr/bin/env python
"""The same as `mra-hf run-mnli`, another name of `run-classification`."""

import sys

from mra_hf.commands import run_command

if __name__ == "__main__":
    sys.exit(run_command("run-mnli"))
