#!/usr/bin/env python
"""The same as `mra-hf run-wikihop`: multi-hop questions over candidates with Trainer."""

import sys

from mra_hf.commands import run_command

if __name__ == "__main__":
    sys.exit(run_command("run-wikihop"))
