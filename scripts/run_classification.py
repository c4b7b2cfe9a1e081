#!/usr/bin/env python
"""The same as `mra-hf run-classification`: classification of texts and pairs with Trainer."""

import sys

from mra_hf.commands import run_command

if __name__ == "__main__":
    sys.exit(run_command("run-classification"))
