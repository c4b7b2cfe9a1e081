"""Import, convert and fill a mask with an installed wheel, away from the sources."""

import importlib.metadata
import subprocess
import sys
from importlib import resources
from pathlib import Path

from transformers import AutoModelForMaskedLM, pipeline

import mra_attention
import mra_hf
import mra_hf_cli
from mra_attention.implementations import native_problem
from mra_hf.english import english_checkpoint, english_sample

for package in (mra_hf, mra_hf_cli, mra_attention):
    assert "site-packages" in package.__file__, package.__file__
    assert resources.files(package).joinpath("py.typed").is_file(), package
program = [Path(sys.executable).with_name("mra-hf"), "--version"]
said = subprocess.run(program, capture_output=True, text=True, check=True).stdout.strip()
assert said == f"mra_hf {mra_hf.__version__}" == f"mra_hf {importlib.metadata.version('mra_hf')}"
assert native_problem() is None, native_problem()
output = Path(sys.argv[1])
report = mra_hf.convert_checkpoint(english_checkpoint(), output, max_length=4096)
print(report.summary())  # noqa: T201
model = AutoModelForMaskedLM.from_pretrained(output)
assert type(model) is mra_hf.MraForMaskedLM and model.config.max_tokens == 4096
words = english_sample().split()
words[40] = "<mask>"
best = pipeline("fill-mask", model=str(english_checkpoint(4096)))(" ".join(words[:80]))[0]
assert best["score"] > 0.02, best
print("wheel: imported, converted and filled ->", best["token_str"])  # noqa: T201
