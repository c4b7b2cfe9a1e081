#!/usr/bin/env python
"""The same as `mra-hf compare`: two runs on the same examples."""

import sys

from mra_hf.commands import run_command

if __name__ == "__main__":
    sys.exit(run_command("compare"))
