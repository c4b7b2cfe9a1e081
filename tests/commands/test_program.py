"""The program `mra-hf`: quick where nothing has to run, and help that fits on a screen or two."""

import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

import mra_hf
from mra_hf.commands import experiments, main
from mra_hf.commands.parsing import CommandParser
from mra_hf_cli import ALIASES, COMMANDS, program

ROOT = Path(__file__).parents[2]
RUNS = [name for name in COMMANDS if name.startswith("run-")]
OPTION = re.compile(r"^  (--\w[\w-]*)", re.MULTILINE)


def help_of(capsys, *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*arguments])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def parser_of(name: str) -> CommandParser:
    module = importlib.import_module(f"mra_hf.commands.{name.replace('-', '_')}")
    parser = CommandParser(module.DATACLASSES, prog=name)
    module.add_arguments(parser)
    return parser


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--help"], 0, "run-classification"),
        (["--help-all"], 0, "run-classification"),
        (["--version"], 0, mra_hf.__version__),
        (["run-mlmm"], 2, "did you mean run-mlm?"),
        (["fly"], 2, "there is no command 'fly'; mra-hf --help lists them"),
        ([], 2, "name a command"),
    ],
)
def test_the_program_answers_without_importing_what_commands_need(arguments, status, said):
    code = (
        "import sys; from mra_hf_cli.program import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as stopped: print('status', stopped.code)\n"
        "print({'torch', 'transformers', 'numpy', 'mra_hf'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.endswith(f"status {status or 0}\nset()\n")
    assert said in result.stdout + result.stderr


def test_the_program_is_what_pip_installs():
    project = (ROOT / "pyproject.toml").read_text()
    module, function = re.search(r'^mra-hf = "(.+):(.+)"$', project, re.MULTILINE).groups()
    assert getattr(importlib.import_module(module), function) is program.main


def test_help_of_the_program_lists_all_commands(capsys):
    printed = help_of(capsys, "--help")
    assert all(f"  {name} " in printed for name in COMMANDS)
    assert all(f"{alias} is {name}" in printed for alias, name in ALIASES.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_an_example_within_a_screen_or_two(name, capsys):
    printed = help_of(capsys, name, "--help")
    assert f"mra-hf {name} " in printed.split("example:")[1]
    assert len(printed.splitlines()) <= 110


@pytest.mark.parametrize("name", RUNS)
def test_a_run_shows_its_own_options_first_and_all_of_trainer_when_asked(name, capsys):
    parser = parser_of(name)
    own = [
        f"--{field.name}"
        for kind in parser.dataclass_types[:-1]
        for field in dataclasses.fields(kind)
    ]
    brief, everything = help_of(capsys, name, "--help"), help_of(capsys, name, "--help-all")
    shown = [option for option in OPTION.findall(brief) if option != "--help-all"]
    assert shown[: len(own)] == own
    assert 10 <= len(shown) - len(own) <= 20
    all_shown = set(OPTION.findall(everything))
    assert all_shown >= {f"--{x.name}" for x in dataclasses.fields(TrainingArguments) if x.init}
    assert set(own) <= all_shown


def test_another_name_runs_the_same_command(capsys):
    printed = help_of(capsys, "run-mnli", "--help")
    assert printed.startswith("usage: mra-hf run-mnli ")
    assert (
        printed.split("\n", 1)[1]
        == help_of(capsys, "run-classification", "--help").split("\n", 1)[1]
    )


@pytest.mark.parametrize("written", ["--lerning_rate", "--lerning_rate=3e-5"])
def test_a_mistyped_option_is_answered_with_the_right_one(written, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["run-mlm", written, "3e-5"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "did you mean --learning_rate?" in error and len(error.splitlines()) < 5


def test_a_mistyped_setting_of_a_file_is_answered_with_the_right_one(tmp_path, refused):
    (tmp_path / "run.yaml").write_text("lerning_rate: 1.0e-5\n")
    assert "did you mean learning_rate?" in refused("run-mlm", tmp_path / "run.yaml")


@pytest.mark.parametrize("has_device", [False, True])
def test_memory_is_pinned_only_where_there_is_a_device_or_it_is_asked_for(has_device, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_device)
    parser = parser_of("run-mlm")
    assert experiments.parse(parser, []).dataloader_pin_memory is has_device
    asked = experiments.parse(parser, ["--dataloader_pin_memory", "true"])
    assert asked.dataloader_pin_memory is True
    not_asked = experiments.parse(parser, ["--no_dataloader_pin_memory"])
    assert not_asked.dataloader_pin_memory is False
