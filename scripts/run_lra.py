#!/usr/bin/env python
"""The same as `mra-hf run-lra`: a task of the Long Range Arena with Trainer."""

import sys

from mra_hf.commands import run_command

if __name__ == "__main__":
    sys.exit(run_command("run-lra"))
