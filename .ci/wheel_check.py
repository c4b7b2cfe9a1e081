"""Import, convert and fill a mask with an installed wheel, away from the sources."""

import sys
from pathlib import Path

from transformers import AutoModelForMaskedLM, pipeline

import mra_attention
import mra_hf
from mra_hf.sapiens import HEAVY_CHAINS, sapiens_checkpoint

for package in (mra_hf, mra_attention):
    assert "site-packages" in package.__file__, package.__file__
output = Path(sys.argv[1])
report = mra_hf.convert_checkpoint(sapiens_checkpoint(), output, max_length=4096)
print(report.summary())  # noqa: T201
model = AutoModelForMaskedLM.from_pretrained(output)
assert type(model) is mra_hf.MraForMaskedLM and model.config.max_tokens == 4096
chain = HEAVY_CHAINS[0]
best = pipeline("fill-mask", model=str(output))(chain[:50] + "<mask>" + chain[51:])[0]
assert best["score"] > 0.1, best
print("wheel: imported, converted and filled", chain[50], "->", best["token_str"])  # noqa: T201
