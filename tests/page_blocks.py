"""The blocks of code on a page, and what it takes to run one as a reader would."""

import os
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Folders that the commands of pages read.
READ = ("configs", "src", "scripts")
#: Programs of the environment that runs the tests, and their modules.
PROGRAMS = {
    "mra-hf": "-m mra_hf",
    "accelerate": "-m accelerate.commands.accelerate_cli",
    "python": "",
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
    """The blocks of a page, in their order; those in a list are indented on the page."""
    found = re.findall(r"^ *```(bash|python)\n(.*?)^ *```", text, re.S | re.M)
    return [Block(language, textwrap.dedent(code)) for language, code in found]


def run(block: Block, folder: Path) -> None:
    """Run a block in a new process, in a folder that looks like the root of the repository."""
    for name in READ:
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    programs = folder / ".bin"
    programs.mkdir(exist_ok=True)
    for name, arguments in PROGRAMS.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (programs / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    command = ["python"] if block.language == "python" else ["bash", "-euo", "pipefail"]
    result = subprocess.run(
        [*command, "-c", block.text], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{block.text}\n{result.stdout}\n{result.stderr}"
    assert len(result.stdout) < 8000, "a reader has to find the result"
