"""Every block of the README and of a guide runs as pasted, and what the README names exists."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
#: Folders that the README's commands read.
READ = ("configs", "src")
#: Beginning of a block that is not run here -> why.
SKIPPED = {
    "pip install -c constraints.txt -e . && mra-hf quickstart": "changes what is installed; "
    ".ci/run installs by it in a new environment, and runs the quickstart",
    'pip install -c constraints.txt -e ".[test]" && pytest': "these tests; .ci/run is that command",
}


@dataclass(frozen=True)
class Block:
    """A block of code: its language and its text."""

    language: str
    text: str

    @property
    def first_line(self) -> str:
        return self.text.partition("\n")[0]


def blocks_of(text: str) -> list[Block]:
    """The blocks of a page, in their order."""
    return [Block(*found) for found in re.findall(r"```(bash|python)\n(.*?)```", text, re.S)]


BLOCKS = blocks_of(README)
RUN = [block for block in BLOCKS if block.first_line not in SKIPPED]


def run(block: Block, folder: Path) -> None:
    """Run a block in a new process, in a folder that looks like the root of the repository."""
    for name in READ:
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    programs = folder / ".bin"
    programs.mkdir(exist_ok=True)
    for name, module in (("mra-hf", "-m mra_hf "), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module}"$@"\n')
        (programs / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    command = ["python"] if block.language == "python" else ["bash", "-euo", "pipefail"]
    result = subprocess.run(
        [*command, "-c", block.text], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{block.text}\n{result.stdout}\n{result.stderr}"
    assert len(result.stdout) < 8000, "a reader has to find the result"


@pytest.mark.slow
def test_the_blocks_run_in_order(tmp_path):
    for block in RUN:
        run(block, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("block", RUN, ids=lambda block: block.first_line)
def test_a_block_runs_alone(block, tmp_path):
    run(block, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "written"),
    [
        pytest.param(0, "runs/*/model.safetensors", id="tokens"),
        pytest.param(1, "runs/*/model.safetensors", id="answers"),
        pytest.param(2, "roberta-4096/model.safetensors", id="conversion"),
        pytest.param(3, "tokenizer-for-words/tokenizer.json", id="tokenizer"),
    ],
)
def test_a_block_of_the_guide_to_other_heads_runs_alone(number, written, tmp_path):
    blocks = blocks_of((ROOT / "docs" / "guide" / "other-heads.md").read_text())
    assert len(blocks) == 4
    run(blocks[number], tmp_path)
    assert list(tmp_path.glob(written))


def test_the_blocks_are_found():
    assert len(RUN) >= 10 and {block.language for block in RUN} == {"bash", "python"}
    assert {block.first_line for block in BLOCKS} >= set(SKIPPED)


def test_every_local_link_exists():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link
