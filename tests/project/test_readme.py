"""Every block of the README runs as pasted."""

from pathlib import Path

import pytest

from page_blocks import blocks_of, run

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
#: Beginning of a block that is not run here -> why.
SKIPPED = {
    "pip install -c constraints.txt -e . && mra-hf quickstart": "changes what is installed; "
    ".ci/run installs by it in a new environment, and runs the quickstart",
    'pip install -c constraints.txt -e ".[test]" && pytest': "these tests; .ci/run is that command",
}

BLOCKS = blocks_of(README)
RUN = [block for block in BLOCKS if block.first_line not in SKIPPED]


@pytest.mark.slow
def test_the_blocks_run_in_order(tmp_path):
    for block in RUN:
        run(block, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("block", RUN, ids=lambda block: block.first_line)
def test_a_block_runs_alone(block, tmp_path):
    run(block, tmp_path)


def test_the_blocks_are_found():
    assert len(RUN) >= 2 and {block.language for block in RUN} == {"bash", "python"}
    assert {block.first_line for block in BLOCKS} >= set(SKIPPED)
