"""`python -m mra_hf COMMAND ...`: the program `mra-hf` where it is not installed, and for launchers
that start a module (`torchrun -m mra_hf run-mlm ...`).
"""

import sys

from mra_hf.commands import main

if __name__ == "__main__":
    sys.exit(main())
