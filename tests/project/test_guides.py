"""Every block of bash and Python of a guide runs as pasted, by itself."""

from pathlib import Path

import pytest

from page_blocks import Block, blocks_of, run
from tiny_models import write_sentence_encoder

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [DOCS / "index.md", DOCS / "performance.md", *sorted((DOCS / "guide").glob("*.md"))]

#: (page, first line) of a block that is not run here -> why.
SKIPPED = {
    ("index", "pip install -c constraints.txt -e ."): "changes what is installed; .ci/run does it",
    ("index", "mra-hf quickstart"): "takes two minutes; .ci/run runs it",
    (
        "several-machines",
        "accelerate launch --config_file configs/accelerate/ddp.yaml scripts/run_mlm.py \\",
    ): "wants eight GPUs",
    (
        "several-machines",
        "accelerate launch --config_file configs/accelerate/ddp_machines.yaml --machine_rank 0 "
        "--main_process_ip 10.0.0.1 \\",
    ): "wants two machines of eight GPUs",
    ("deploying", 'pip install -c constraints.txt -e ".[onnx]"'): "changes what is installed; "
    "the extra is part of the extra test",
    ("troubleshooting", "export OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=2"): "sets variables only",
}
#: page -> what each of its blocks leaves behind: one of these.
WRITTEN = {
    "deploying": ("english-onnx/onnx/model.onnx",),
    "converting": ("roberta-4096/model.safetensors",),
    "other-heads": (
        *("runs/*/model.safetensors", "roberta-4096/model.safetensors"),
        "tokenizer-for-words/tokenizer.json",
    ),
}


def blocks() -> list[tuple[str, Block]]:
    """Page and block, for every block that is not skipped."""
    found = [(page.stem, block) for page in PAGES for block in blocks_of(page.read_text())]
    return [(page, block) for page, block in found if (page, block.first_line) not in SKIPPED]


BLOCKS = blocks()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "block"),
    BLOCKS,
    ids=[f"{page}-{block.language}-{block.first_line}" for page, block in BLOCKS],
)
def test_a_block_of_a_guide_runs_alone(page, block, tmp_path):
    if "all-MiniLM-L6-v2" in block.text:  # a hub id, which a folder of that name replaces
        write_sentence_encoder(tmp_path / "sentence-transformers" / "all-MiniLM-L6-v2")
    run(block, tmp_path)
    patterns = WRITTEN.get(page, ())
    assert not patterns or any(list(tmp_path.glob(pattern)) for pattern in patterns)


def test_the_blocks_are_found():
    all_blocks = {(p.stem, block.first_line) for p in PAGES for block in blocks_of(p.read_text())}
    assert set(SKIPPED) <= all_blocks, "a block that is skipped is no longer there"
    assert len(BLOCKS) > 25 and {block.language for _, block in BLOCKS} == {"bash", "python"}
    pages = {page for page, _ in all_blocks}
    without = {"limits", "performance"}
    assert pages == {page.stem for page in PAGES} - without
