"""Import, convert and fill a mask with an installed wheel, away from the sources."""

import sys
from pathlib import Path

from transformers import AutoModelForMaskedLM, pipeline

import mra_attention
import mra_hf
from mra_attention.implementations import native_problem
from mra_hf.english import english_checkpoint, english_sample

for package in (mra_hf, mra_attention):
    assert "site-packages" in package.__file__, package.__file__
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
