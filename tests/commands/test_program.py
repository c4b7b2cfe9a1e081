"""The program `mra-hf`: quick where nothing has to run, and help that fits on a screen or two."""

import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

import mra_hf
from mra_hf.commands import command_parser, experiments, main, parse
from mra_hf_cli import ALIASES, COMMANDS, GROUPS, program

ROOT = Path(__file__).parents[2]
COMMAND_FILES = sorted((ROOT / "src/mra_hf/commands").glob("*.py"))
RUNS = [name for name in COMMANDS if name.startswith("run-")]
OPTION = re.compile(r"^  (--\w[\w-]*)", re.MULTILINE)


def help_of(capsys, *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*arguments])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def examples_in(printed: str) -> list[list[str]]:
    """The words of each command line in the first paragraph of a help text."""
    title, *lines = printed.split("\n\n")[0].splitlines()
    assert title in ("example:", "examples:")
    commands = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [shlex.split(command.partition(" > ")[0]) for command in commands]


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


def test_help_of_the_program_begins_with_examples_and_groups_the_commands(capsys):
    printed = help_of(capsys, "--help")
    examples = examples_in(printed)
    assert 2 <= len(examples) <= 3 and all(words[0] == "mra-hf" for words in examples)
    assert {words[1] for words in examples} <= {"COMMAND", *COMMANDS}
    lines = printed.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    for title, group in GROUPS.items():
        begin = lines.index(f"{title}:") + 1
        assert [line.split()[0] for line in lines[begin : begin + len(group)]] == list(group)
    modules = {path.stem.replace("_", "-") for path in COMMAND_FILES}
    assert modules - {"--init--", "experiments", "parsing"} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_begins_with_examples_that_the_command_takes(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(ROOT)  # where the YAML files of examples lie
    examples = examples_in(help_of(capsys, name, "--help"))
    assert 1 <= len(examples) <= 3
    for words in examples:
        assert words[:2] == ["mra-hf", name]
        parse(command_parser(name)[1], words[2:])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_screen_or_is_grouped(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = help_of(capsys, name, "--help").splitlines()
    assert max(map(len, lines)) <= 80
    titles = [line for line in lines if re.fullmatch(r"[^ ].*:", line) and line != "example:"]
    assert len(lines) <= 40 or len(titles) >= 3
    assert len(lines) <= 110
    options = [line for line in lines if OPTION.match(line)]
    if name not in RUNS and len(options) > 10:
        assert titles[:2] == ["arguments:", "most used options:"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_its_default(name, capsys):
    _, parser = command_parser(name)
    formatter = parser._get_formatter()
    for action in parser._actions:
        is_flag = action.nargs == 0 or (action.nargs == "?" and not action.default)
        if not action.option_strings or action.required or is_flag or "--no_" in str(action):
            continue
        if action.dest in {field.name for field in dataclasses.fields(TrainingArguments)}:
            continue
        said = formatter._get_help_string(action)
        assert "default" in said or "not set" in said, action.option_strings


def test_a_usage_error_is_answered_in_two_short_lines(capsys):
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main([name, "--no-such-option"])
        assert stopped.value.code == 2
        usage, *error = capsys.readouterr().err.splitlines()
        assert usage.startswith(f"usage: mra-hf {name}") and len(usage) <= 100
        assert len(error) == 1


@pytest.mark.parametrize("name", RUNS)
def test_a_run_shows_its_own_options_first_and_all_of_trainer_when_asked(name, capsys):
    parser = command_parser(name)[1]
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
    assert "\nusage: mra-hf run-mnli [FILE.yaml]" in printed
    usage = ("usage: mra-hf run-mnli", "usage: mra-hf run-classification")
    assert printed.replace(*usage) == help_of(capsys, "run-classification", "--help")


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
    parser = command_parser("run-mlm")[1]
    assert experiments.parse(parser, []).dataloader_pin_memory is has_device
    asked = experiments.parse(parser, ["--dataloader_pin_memory", "true"])
    assert asked.dataloader_pin_memory is True
    not_asked = experiments.parse(parser, ["--no_dataloader_pin_memory"])
    assert not_asked.dataloader_pin_memory is False
