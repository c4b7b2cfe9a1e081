#!/usr/bin/env python
"""The same as `mra-hf convert`: turn a checkpoint into one with multi-resolution attention."""

import sys

from mra_hf.commands import run_command

if __name__ == "__main__":
    sys.exit(run_command("convert"))
