"""The files under configs/: read as their commands read them, and held against the paper.

No checkpoint is opened: the configuration a run starts with is derived from its file and from the
`mra-hf` commands in the comments on top of it, and the model is built on the meta device.
"""

import argparse
import copy
import functools
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from transformers import AutoConfig, HfArgumentParser

import mra_hf
from mra_hf.attention import ATTENTION_NAMES, attention_settings
from mra_hf.commands import convert, experiments, main
from mra_hf.conversion.sources import SOURCE_TYPES
from mra_hf.loading import check_length, override, with_attention
from mra_hf.results.paper import PAPER_ROWS
from mra_hf_cli import ALIASES

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
FILES = {
    path.relative_to(CONFIGS).as_posix(): path
    for folder in ("pretrain", "finetune", "smoke")
    for path in sorted((CONFIGS / folder).glob("*.yaml"))
}
ACCELERATE = {path.name: path for path in sorted((CONFIGS / "accelerate").glob("*.yaml"))}
MODELS = {
    "run-mlm": transformers.AutoModelForMaskedLM.from_config,
    "run-classification": transformers.AutoModelForSequenceClassification.from_config,
    "run-wikihop": mra_hf.MraForCandidateChoice,
}

#: Published checkpoints, which tests do not fetch.
PUBLISHED = {
    "FacebookAI/roberta-base": transformers.RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5
    ),
    "sentence-transformers/all-MiniLM-L6-v2": transformers.BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
    ),
}
#: What a configuration keeps on conversion.
SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "type_vocab_size", "layer_norm_eps", "initializer_range"),
    *("hidden_dropout_prob", "pad_token_id", "bos_token_id", "eos_token_id"),
)

# The paper's Table 8, and its tables' block counts with the priors of the published runs.
PAPER_SIZES = {  # layers, hidden, feed-forward, heads, width of the embeddings
    "base": (12, 768, 3072, 12, None),
    "small": (4, 384, 1536, 6, 128),
}
PAPER_TRAINING = {  # sequences a step, learning rate, weight decay, steps or epochs
    ("mlm", "base", 512): (512, 5e-5, 0.01, 20_000),
    ("mlm", "small", 512): (512, 1e-4, 0.01, 150_000),
    ("mlm", "base", 4096): (64, 5e-5, 0.01, 75_000),
    ("mlm", "small", 4096): (64, 5e-5, 0.01, 75_000),
    ("mnli", "base", 512): (32, 3e-5, 0.02, 4),
    ("mnli", "small", 512): (32, 3e-5, 0.02, 10),
    ("wikihop", "base", 4096): (32, 5e-5, 0.01, 15),
    ("wikihop", "small", 4096): (32, 5e-5, 0.01, 25),
}
PAPER_PRIORS = {(512, 4): (0, 0), (512, 8): (0, 0), (4096, 8): (3, 1), (4096, 16): (5, 3)}


def command_of(name: str) -> str:
    """Files of pretrain/ are for run-mlm; others begin with their task, or with MNLI."""
    folder, file = name.split("/")
    task = "mlm" if folder == "pretrain" else re.split(r"[_.]", file)[0]
    return "run-classification" if task == "mnli" else f"run-{task}"


@functools.cache
def parsed(name: str) -> argparse.Namespace:
    """The settings of a file as its command sees them, on a CPU."""
    module = importlib.import_module(f"mra_hf.commands.{command_of(name).replace('-', '_')}")
    parser = HfArgumentParser(module.DATACLASSES)
    module.add_arguments(parser)
    args = experiments.parse(parser, [str(FILES[name]), "--use_cpu", "true"])
    experiments.dataclasses_of(args, module.DATACLASSES)  # their own checks
    return args


def commands_in(path: Path, program: str) -> list[list[str]]:
    """The commands of `program` in the comments on top of a file, without its name."""
    lines = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    found = [line for line in text.splitlines() if line.startswith(f"{program} ")]
    return [shlex.split(line)[len(program.split()) :] for line in found]


@functools.cache
def files_by_output() -> dict[str, str]:
    return {parsed(name).output_dir: name for name in FILES}


@functools.cache
def starting_config(name: str):
    """The configuration that the model of a run starts with."""
    args = parsed(name)
    if args.model_name_or_path is None:
        vocabulary = 50265 if args.tokenizer_name == "FacebookAI/roberta-base" else 6144
        config = AutoConfig.for_model(args.model_type, vocab_size=vocabulary)
    else:
        conversions = [
            converted_config(arguments)
            for arguments in commands_in(FILES[name], "mra-hf convert")
            if arguments[1] == args.model_name_or_path
        ]
        config = (*conversions, None)[0] or config_at(args.model_name_or_path)
    if args.config_overrides:
        override(config, args.config_overrides)
    config._attn_implementation = None
    return config


def config_at(source: str):
    """The configuration of a checkpoint: the published one, one in the repository, a result."""
    if source in PUBLISHED:
        return copy.deepcopy(PUBLISHED[source])
    if (ROOT / source / "config.json").is_file():
        return AutoConfig.from_pretrained(ROOT / source)
    output, _, step = source.partition("/checkpoint-")
    assert output in files_by_output(), f"{source} is made by no file"
    name = files_by_output()[output]
    if step:
        args = parsed(name)
        assert int(step) % args.save_steps == 0 and int(step) < args.max_steps
        assert args.save_total_limit is None, "the checkpoint would be deleted"
    config = starting_config(name)
    return type(config).from_dict(config.to_dict())


def converted_config(arguments: list[str]) -> mra_hf.MraConfig:
    """The configuration of what `mra-hf convert` writes."""
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    args = parser.parse_args(arguments)
    source = config_at(args.source)
    assert source.model_type in SOURCE_TYPES, f"mra-hf convert refuses {args.source}"
    names = ("block_per_row", "approx_mode")
    names += ("initial_prior_first_n_blocks", "initial_prior_diagonal_n_blocks")
    asked = {name: getattr(args, name) for name in names}
    return mra_hf.MraConfig(
        **{field: getattr(source, field) for field in SIZES},
        embedding_size=getattr(source, "embedding_size", None),
        max_position_embeddings=args.max_length + source.pad_token_id + 1,
        **{field: value for field, value in asked.items() if value is not None},
    )


@functools.cache
def built(name: str):
    """The model of a run, without weights."""
    args = parsed(name)
    with torch.device("meta"):
        model = MODELS[command_of(name)](starting_config(name))
    return with_attention(model, args.attn_implementation)


def paper_files() -> dict[str, str]:
    """paper_row -> file."""
    return {row: name for name in FILES if (row := parsed(name).paper_row)}


@pytest.mark.parametrize("name", FILES)
def test_a_command_reads_its_file_and_the_model_fits(name):
    args = parsed(name)
    assert args.do_train and args.output_dir.startswith("runs/")
    assert FILES[name].read_text().startswith("# "), "a stranger is told what it is"
    check_length("max_seq_length", args.max_seq_length, built(name))
    for arguments in commands_in(FILES[name], "mra-hf"):
        if arguments[0].startswith("run-"):
            assert arguments[:2] == [command_of(name), f"configs/{name}"]


def test_no_two_files_write_to_one_place():
    assert len(files_by_output()) == len(FILES)


def test_every_row_of_the_paper_has_its_file():
    named = [parsed(name).paper_row for name in FILES]
    assert len(paper_files()) == len([row for row in named if row]), "a row twice"
    trained = {row for row in PAPER_ROWS if not row.endswith("/mlm-before")}
    assert set(paper_files()) == trained
    for row, name in paper_files().items():
        command = f"run-{PAPER_ROWS[row].result}"
        assert ALIASES.get(command, command) == command_of(name)
        (run,) = [found for found in commands_in(FILES[name], "mra-hf") if found[0] != "convert"]
        assert run == [command_of(name), f"configs/{name}"]


@pytest.mark.parametrize("row", [row for row in PAPER_ROWS if not row.endswith("/mlm-before")])
def test_a_file_says_what_the_paper_says(row):
    name, expected = paper_files()[row], PAPER_ROWS[row]
    args, model = parsed(name), built(name)
    config = model.config

    layers, hidden, feed_forward, heads, width = PAPER_SIZES[expected.size]
    assert (config.num_hidden_layers, config.hidden_size) == (layers, hidden)
    assert (config.intermediate_size, config.num_attention_heads) == (feed_forward, heads)
    assert config.hidden_size // config.num_attention_heads == 64
    assert getattr(config, "embedding_size", None) == width
    assert config.hidden_dropout_prob == 0.1
    assert args.max_seq_length == expected.tokens == config.max_position_embeddings - 2

    if expected.attention == "dense":
        assert config._attn_implementation == "sdpa"
        assert config.attention_probs_dropout_prob == 0.1
    else:
        assert config._attn_implementation in ATTENTION_NAMES
        settings = attention_settings(config, config._attn_implementation)
        mode = {"mra2": "full", "mra2_s": "sparse"}[expected.attention]
        assert (settings.approx_mode, settings.block_per_row) == (mode, expected.blocks)
        first, diagonal = PAPER_PRIORS[expected.tokens, expected.blocks]
        assert settings.initial_prior_first_n_blocks == first
        assert settings.initial_prior_diagonal_n_blocks == diagonal
        assert settings.block_size == 32 and settings.block_budget is None
        if expected.result == "wikihop":
            assert args.initial_prior_first_n_blocks == first

    task = (expected.result, expected.size, expected.tokens)
    batch, rate, decay, length = PAPER_TRAINING[task]
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == batch
    assert (args.learning_rate, args.weight_decay) == (rate, decay)
    assert (args.max_steps if expected.result == "mlm" else args.num_train_epochs) == length
    assert (args.lr_scheduler_type, args.warmup_steps) == ("linear", 0.05)
    assert (args.adam_epsilon, args.adam_beta1, args.adam_beta2) == (1e-6, 0.9, 0.999)
    assert args.max_grad_norm == 0 and args.bf16 and not args.fp16
    if expected.result == "mlm":
        assert args.mlm_probability == 0.15
        assert args.dataset_name and args.train_split != args.validation_split
    else:
        assert args.load_best_model_at_end
        assert args.metric_for_best_model == expected.metrics[0]


def test_the_models_have_the_sizes_of_the_published_ones():
    base = built(paper_files()["table1/base-512/mra2-4/mlm"])
    assert base.num_parameters() == 124_697_433
    # Vocabulary, positions and types of width 128, the projection, 4 layers, and the LM head.
    small = built(paper_files()["table2/small-512/mra2-4/mlm"])
    embeddings = (50265 + 514 + 1) * 128 + 2 * 128 + 128 * 384 + 384
    layer = 4 * (384 * 384 + 384) + 2 * 384 * 1536 + 1536 + 384 + 4 * 384
    head = 384 * 128 + 128 + 2 * 128 + 50265
    assert small.num_parameters() == embeddings + 4 * layer + head


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_reads_its_configurations(name):
    config = load_config_from_file(str(ACCELERATE[name]))  # refuses keys it does not know
    known = {action.dest for action in launch_command_parser()._actions}
    assert {*config.fsdp_config, *config.deepspeed_config} <= known
    kind = {"f": "FSDP", "z": "DEEPSPEED"}.get(
        name.removeprefix("cpu_2_processes_")[0], "MULTI_GPU"
    )
    assert config.distributed_type.value == kind
    assert (config.num_machines > 1) == ("machines" in name)
    assert config.use_cpu == name.startswith("cpu")
    assert config.mixed_precision == "no", "the file of the run says it"
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
        layer = type(built("pretrain/roberta_base_4096_mra2_8.yaml").roberta.encoder.layer[0])
        assert config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] == layer.__name__
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(name[4])
    assert name in (ROOT / "docs" / "guide" / "several-machines.md").read_text()

    (command,) = commands_in(ACCELERATE[name], "accelerate launch")
    assert command[command.index("--config_file") + 1] == f"configs/accelerate/{name}"
    (script,) = [word for word in command if word.startswith("scripts/")]
    file = command[command.index(script) + 1].removeprefix("configs/")
    assert (ROOT / script).stem == command_of(file).replace("-", "_")
    args = parsed(file)
    if args.paper_row:
        accumulated = int(command[command.index("--gradient_accumulation_steps") + 1])
        whole = args.per_device_train_batch_size * args.gradient_accumulation_steps
        assert args.per_device_train_batch_size * accumulated * config.num_processes == whole


def test_the_smoke_twins_are_twins():
    small, twin = "pretrain/roberta_small_512_mra2_8.yaml", "smoke/mlm_small.yaml"
    assert parsed(twin).config_overrides == parsed(small).config_overrides
    for twin, real in (
        ("smoke/mlm_small.yaml", small),
        ("smoke/mnli.yaml", "finetune/mnli_roberta_base_512_mra2_s_4.yaml"),
        ("smoke/wikihop.yaml", "finetune/wikihop_roberta_base_4096_mra2_s_8.yaml"),
    ):
        assert real in FILES[twin].read_text()
        for setting in (
            *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay"),
            *("adam_epsilon", "max_grad_norm", "metric_for_best_model", "load_best_model_at_end"),
        ):
            assert getattr(parsed(twin), setting) == getattr(parsed(real), setting), setting
        assert parsed(twin).paper_row is None, "no row of the paper"


@pytest.mark.parametrize(
    "name", [pytest.param("mlm_small", marks=pytest.mark.slow), "mnli", "wikihop"]
)
def test_a_smoke_twin_runs_from_the_root(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    file, output = f"configs/smoke/{name}.yaml", tmp_path / "run"
    assert main([command_of(f"smoke/{name}.yaml"), file, "--output_dir", str(output)]) == 0
    results = json.loads((output / "results.json").read_text())
    assert results["attention"] == "mra2" and results["train"]["steps"] >= 2
    metric = "eval_matched_accuracy" if name == "mnli" else "eval_accuracy"
    assert 0 <= results["eval"][metric] <= 1 and results["paper_row"] is None
    if name == "wikihop":
        assert results["lengths"]["train"]["in_several_pieces"] > 0
    saved = yaml.safe_load((output / "experiment.yaml").read_text())
    assert saved["output_dir"] == str(output)
