#!/usr/bin/env python
"""The same as `mra-hf results`: tables and curves of run directories."""

import sys

from mra_hf.commands import run_command

if __name__ == "__main__":
    sys.exit(run_command("results"))
