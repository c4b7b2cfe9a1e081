"""Directories opened with `trust_remote_code=True`, also by processes that do not import mra_hf."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

import mra_hf
from mra_hf.registration import ENCODERS
from tiny_models import mra_config, word_tokenizer

TEXT = {"vocab_size": 100, "max_position_embeddings": 128}
MODELS = {
    "mra_hf": lambda: mra_hf.MraForMaskedLM(mra_config(block_per_row=1)),
    "adamra_hf": lambda: mra_hf.AdaMraForSequenceClassification(
        mra_hf.AdaMraConfig(**TEXT, segment_lengths=[2, 4])
    ),
    "lra": lambda: mra_hf.LraForSequenceClassification(mra_hf.LraConfig(**TEXT, block_per_row=3)),
    "mra_image_hf": lambda: mra_hf.MraForImageClassification(
        mra_hf.MraImageConfig(image_size=56, num_attention_heads=2, block_per_row=1)
    ),
}
#: Opens directories as a user of the hub does, without `import mra_hf`, and saves them again.
OPEN_AND_SAVE = """
import sys, torch, transformers
for source, out, auto_class in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3]):
    model = getattr(transformers, auto_class).from_pretrained(source, trust_remote_code=True)
    transformers.AutoConfig.from_pretrained(source, trust_remote_code=True)
    model.save_pretrained(out)
    model.config.save_pretrained(out + "-config")
"""
#: The same through sentence-transformers.
WRAP_AND_SAVE = """
import sys
from sentence_transformers import SentenceTransformer
SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu").save(sys.argv[2])
"""
#: What Transformers' run_ner.py and run_qa.py call, with their arguments.
OPEN_AS_THE_EXAMPLE_SCRIPTS = """
import sys, transformers
source, words, answers = sys.argv[1:]
hub = dict(cache_dir=None, revision="main", token=None, trust_remote_code=True)
config = transformers.AutoConfig.from_pretrained(
    source, num_labels=3, finetuning_task="ner", **hub)
assert config.model_type == "mra_hf"
transformers.AutoTokenizer.from_pretrained(source, use_fast=True, **hub).save_pretrained(words)
model = transformers.AutoModelForTokenClassification.from_pretrained(
    source, from_tf=False, config=config, ignore_mismatched_sizes=False, **hub)
model.config.label2id = {"B-PER": 0, "I-PER": 1, "O": 2}
model.config.id2label = dict(enumerate(model.config.label2id))
model.save_pretrained(words)
transformers.AutoModelForQuestionAnswering.from_pretrained(
    source, from_tf=False, config=transformers.AutoConfig.from_pretrained(source, **hub), **hub
).save_pretrained(answers)
"""
AUTO_CLASSES = {
    "mra_hf": "AutoModelForMaskedLM",
    "adamra_hf": "AutoModelForSequenceClassification",
    "lra": "AutoModelForSequenceClassification",
    "mra_image_hf": "AutoModelForImageClassification",
}


def run(script, *arguments):
    """Run a script in a process of its own; what it wrote to stderr, None where it succeeded."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stderr if result.returncode else None


@pytest.fixture(scope="module")
def models_and_folders(tmp_path_factory):
    """model_type -> a model and the folder it was saved in; "NAME-again" is what a process without
    mra_hf made of it.
    """
    root, models, arguments = tmp_path_factory.mktemp("remote"), {}, []
    for model_type, build in MODELS.items():
        models[model_type] = (build(), root / model_type)
        models[model_type][0].save_pretrained(root / model_type)
        arguments += [root / model_type, root / f"{model_type}-again", AUTO_CLASSES[model_type]]
    assert run(OPEN_AND_SAVE, *arguments) is None
    return models


def assert_same_directory(folder, again):
    assert {path.name for path in again.glob("*.py")} == {"modeling_mra_hf.py"}, "no copied source"
    stub = "modeling_mra_hf.py"
    assert (again / stub).read_text() == (folder / stub).read_text()
    before, after = (json.loads((each / "config.json").read_text()) for each in (folder, again))
    before.pop("use_cache", None), after.pop("use_cache", None)  # sentence-transformers sets it
    assert after == before


@pytest.mark.parametrize("model_type", MODELS)
def test_a_process_without_mra_hf_opens_and_saves_the_same_model(model_type, models_and_folders):
    model, folder = models_and_folders[model_type]
    folder_again = folder.with_name(f"{model_type}-again")
    assert_same_directory(folder, folder_again)
    config = AutoConfig.from_pretrained(f"{folder_again}-config", trust_remote_code=True)
    assert type(config) is type(model.config)
    again = getattr(transformers, AUTO_CLASSES[model_type]).from_pretrained(
        folder_again, trust_remote_code=True
    )
    assert type(again) is type(model)
    settings = model.config.to_dict()
    settings.pop("_name_or_path")
    assert {name: again.config.to_dict()[name] for name in settings} == settings
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.slow
def test_sentence_transformers_opens_and_saves_the_same_model(tmp_path):
    pytest.importorskip("sentence_transformers")
    mra_hf.MraModel(mra_config(block_per_row=1)).save_pretrained(tmp_path / "hub")
    word_tokenizer().save_pretrained(tmp_path / "hub")
    assert run(WRAP_AND_SAVE, tmp_path / "hub", tmp_path / "saved") is None
    assert_same_directory(tmp_path / "hub", tmp_path / "saved")


@pytest.mark.slow
def test_the_calls_of_transformers_example_scripts_open_a_checkpoint(tmp_path):
    model = mra_hf.MraForMaskedLM(mra_config(block_per_row=1))
    model.save_pretrained(tmp_path / "hub")
    word_tokenizer().save_pretrained(tmp_path / "hub")
    folders = [tmp_path / name for name in ("hub", "words", "answers")]
    assert run(OPEN_AS_THE_EXAMPLE_SCRIPTS, *folders) is None
    words = transformers.AutoModelForTokenClassification.from_pretrained(folders[1])
    assert type(words) is mra_hf.MraForTokenClassification
    assert words.config.id2label == {0: "B-PER", 1: "I-PER", 2: "O"}
    answers = transformers.AutoModelForQuestionAnswering.from_pretrained(folders[2])
    assert type(answers) is mra_hf.MraForQuestionAnswering
    for opened in (words, answers):
        assert opened.config.block_per_row == 1
        for name, tensor in model.roberta.state_dict().items():
            assert torch.equal(opened.roberta.state_dict()[name], tensor), name


def test_every_configuration_class_is_covered():
    assert set(MODELS) == {"mra_hf", *(row[0].model_type for row in ENCODERS)}


def test_a_directory_that_holds_a_copy_of_a_source_is_refused_and_mended(tmp_path):
    """As Transformers once wrote it: `auto_map` names a copy of configuration.py."""
    mra_hf.MraForMaskedLM(mra_config(block_per_row=1)).save_pretrained(tmp_path / "old")
    source = sys.modules["mra_hf.configuration"].__file__
    shutil.copy(source, tmp_path / "old" / "configuration.py")
    file = tmp_path / "old" / "config.json"
    config = json.loads(file.read_text())
    config["auto_map"]["AutoConfig"] = "configuration.MraConfig"
    file.write_text(json.dumps(config))
    arguments = [tmp_path / "old", tmp_path / "new", "AutoModelForMaskedLM"]
    fault = run(OPEN_AND_SAVE, *arguments)
    assert "config must be a mra_hf.MraConfig" in fault and "import mra_hf" in fault
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "old", trust_remote_code=True)
    assert type(model.config) is mra_hf.MraConfig and model.config.block_per_row == 1
    model.save_pretrained(tmp_path / "new")
    saved = json.loads((tmp_path / "new" / "config.json").read_text())["auto_map"]
    assert saved["AutoConfig"] == "modeling_mra_hf.MraConfig"


@pytest.mark.parametrize("model_class", [mra_hf.MraModel, mra_hf.LraModel, mra_hf.AdaMraModel])
def test_a_foreign_configuration_is_refused(model_class):
    with pytest.raises(ValueError, match=r"config must be a mra_hf\.\w+Config, got RobertaConfig"):
        model_class(transformers.RobertaConfig())


def test_a_class_that_extends_ours_elsewhere_keeps_its_own_name(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "import mra_hf\nclass MyModel(mra_hf.MraModel):\n    '''Something else.'''\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from my_models import MyModel

    MyModel.register_for_auto_class("AutoModel")
    MyModel(mra_config()).save_pretrained(tmp_path / "mine")
    auto_map = json.loads((tmp_path / "mine" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "my_models.MyModel"
    assert auto_map["AutoConfig"] == "modeling_mra_hf.MraConfig"
    assert (tmp_path / "mine" / "my_models.py").is_file()
    mra_hf.MraModel.register_for_auto_class("AutoModel")
    mra_hf.MraModel(mra_config()).save_pretrained(tmp_path / "ours")
    assert type(AutoModel.from_pretrained(tmp_path / "ours")) is mra_hf.MraModel
    assert not (tmp_path / "ours" / "modeling.py").exists()
