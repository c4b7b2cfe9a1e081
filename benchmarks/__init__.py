"""Measurements of the operator and of the models: what is timed, where, and the tables of it.

Importing it makes the packages of this checkout importable where they are not installed.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

for _package, _folder in (("mra_attention", "kernels/torch-ext"), ("mra_hf", "src")):
    if find_spec(_package) is None:
        sys.path.append(str(ROOT / _folder))
