"""`mra-hf convert`: the program, its script and its way of saying no."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel, RobertaConfig, RobertaForMaskedLM
from transformers.utils import logging

from files import read_json
from mra_hf.commands import main, run_command
from sapiens import SPECIALS, VOCABULARY, letter_tokenizer

ROOT = Path(__file__).parents[2]
SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    RobertaForMaskedLM(RobertaConfig(max_position_embeddings=34, **SIZES)).save_pretrained(folder)
    letter_tokenizer(VOCABULARY, SPECIALS, 32).save_pretrained(folder)
    return folder


def test_convert_prints_the_report_and_what_to_try(source, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "text.txt").write_text("ACDEFGHIKLMNPQRSTVWY" * 30)
    options = ["--max-length", "512", "--block-per-row", "4", "--approx-mode", "sparse"]
    options += ["--prior-first", "1", "--prior-diagonal", "0", "--dtype", "bfloat16"]
    options += ["--tokenizer", str(source), "--text", str(tmp_path / "text.txt")]
    capsys.readouterr()
    assert main(["convert", str(source), str(out), *options]) == 0
    printed = capsys.readouterr()
    assert "MraForMaskedLM" in printed.out and "64 of 256 block pairs" in printed.out
    assert "untrained" in printed.out and "python -c" in printed.out and str(out) in printed.out
    assert "reading the weights of source ..." in printed.err and "writing" in printed.err
    assert "%|" not in printed.err, "progress bars of transformers are switched off"
    config = read_json(out / "config.json")
    assert config["max_position_embeddings"] == 514 and config["dtype"] == "bfloat16"
    assert (config["block_per_row"], config["approx_mode"]) == (4, "sparse")
    assert config["initial_prior_first_n_blocks"] == 1


def test_logging_is_as_before_afterwards(source, tmp_path):
    logging.enable_progress_bar()
    logging.set_verbosity_info()
    try:
        assert main(["convert", str(source), str(tmp_path / "out"), "--max-length", "64"]) == 0
        assert logging.is_progress_bar_enabled()
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity_warning()
        logging.disable_progress_bar()


def test_bad_input_is_one_sentence_and_status_2(source, tmp_path, capsys):
    out = str(tmp_path / "out")
    for arguments, said in (
        (["nowhere/at/all", out], "there is no directory nowhere/at/all"),
        ([str(source), str(source)], "OUT must lie outside SOURCE"),
        ([str(source), str(tmp_path)], "OUT must lie outside SOURCE"),
        ([str(source), out, "--max-length", "0"], "max_length must be an integer of at least 1"),
        ([str(source), out, "--prior-first", "9"], "block_per_row must be at least 19"),
        ([str(source), out, "--text", "none.txt"], "none.txt"),
    ):
        capsys.readouterr()
        assert main(["convert", *arguments]) == 2
        err = capsys.readouterr().err.splitlines()
        assert err[-1].startswith("mra-hf convert: error: ") and said in err[-1]
        assert "Traceback" not in "".join(err)
        assert not (tmp_path / "out").exists()


def test_a_filled_output_needs_force(source, tmp_path, refused):
    out = tmp_path / "out"
    arguments = ["convert", str(source), str(out), "--max-length", "64"]
    assert main(arguments) == 0
    assert "--force" in refused(*arguments)
    assert main([*arguments, "--force"]) == 0


def test_a_model_without_lm_head_gets_its_own_next_command(tmp_path, capsys):
    folder = tmp_path / "source"
    BertModel(BertConfig(max_position_embeddings=32, **SIZES)).save_pretrained(folder)
    letter_tokenizer(VOCABULARY, SPECIALS, 32).save_pretrained(folder)
    assert main(["convert", str(folder), str(tmp_path / "out"), "--max-length", "64"]) == 0
    assert "AutoModel.from_pretrained" in capsys.readouterr().out


def test_wrong_options_are_refused_by_name(source, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command("convert", [str(source), str(tmp_path / "out"), "--max-length", "long"])
    assert stopped.value.code == 2
    assert "--max-length" in capsys.readouterr().err


@pytest.mark.slow
def test_the_script_is_the_same_program(source, tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "convert_roberta.py")]
    paths = [str(ROOT / "src"), str(ROOT / "kernels" / "torch-ext"), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [*command, str(source), str(tmp_path / "out"), "--max-length", "64"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "MraForMaskedLM" in done.stdout and (tmp_path / "out" / "README.md").is_file()


@pytest.mark.slow
def test_the_program_is_a_module_too(source, tmp_path):
    """As `python -m mra_hf`, for machines and launchers that have no program of that name."""
    command = [sys.executable, "-m", "mra_hf", "convert", str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()
    done = subprocess.run(
        [sys.executable, "-m", "mra_hf", "nonsense"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "mra-hf: error" in done.stderr
