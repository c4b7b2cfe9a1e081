"""The Sapiens source: a real fairseq RoBERTa, read from a wheel into a Hugging Face directory.

Masked accuracy hides one residue at a time and asks for it. Measured on CPU in float32, top-1
accuracy and mean negative log-likelihood in nats (uniform over 20 letters: 0.05, 3.0):

    trastuzumab   0.767  1.010        nivolumab     0.894  0.528
    adalimumab    0.868  0.564        atezolizumab  0.856  0.732
    pembrolizumab 0.758  0.987        ipilimumab    0.907  0.470
    bevacizumab   0.724  1.191        durvalumab    0.967  0.263
"""

import argparse

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, RobertaForMaskedLM, pipeline

import sapiens
from real_checkpoints import fetched

ACCURACIES = (0.767, 0.868, 0.758, 0.724, 0.894, 0.856, 0.907, 0.967)
NLLS = (1.010, 0.564, 0.987, 1.191, 0.528, 0.732, 0.470, 0.263)


def checkpoint(chain):
    return fetched(lambda: sapiens.sapiens_checkpoint(sapiens.default_cache_dir(), chain))


@pytest.fixture(scope="session")
def heavy():
    return checkpoint("heavy")


@pytest.fixture(scope="session")
def heavy_model(heavy):
    return AutoModelForMaskedLM.from_pretrained(heavy).eval()


@pytest.fixture(scope="session")
def heavy_tokenizer(heavy):
    return AutoTokenizer.from_pretrained(heavy)


@torch.no_grad()
def masked_scores(model, tokenizer, text):
    """Return (top-1 accuracy, mean NLL) over all letters, each hidden once on its own."""
    ids = tokenizer(text, return_tensors="pt").input_ids  # [1, letters + 2]
    letters = ids[0, 1:-1]
    row = torch.arange(len(letters))
    masked = ids.repeat(len(letters), 1)  # row i hides letter i
    masked[row, row + 1] = tokenizer.mask_token_id
    log_probs = model(masked).logits[row, row + 1].log_softmax(-1)  # [letters, vocabulary]
    accuracy = (log_probs.argmax(-1) == letters).float().mean()
    return accuracy.item(), -log_probs[row, letters].mean().item()


def tiny_fairseq():
    """Return tensors and args of a small random fairseq RoBERTa of one layer."""
    hidden, inner, vocabulary, positions = 8, 12, 25, 10
    shapes = {
        "embed_positions.weight": (positions + 2, hidden),
        "emb_layer_norm.weight": (hidden,),
        "emb_layer_norm.bias": (hidden,),
    }
    for part in sapiens.LAYER_PARTS:
        rows, columns = {"fc1": (inner, hidden), "fc2": (hidden, inner)}.get(part, (hidden, hidden))
        norm = part.endswith("layer_norm")
        shapes[f"layers.0.{part}.weight"] = (rows,) if norm else (rows, columns)
        shapes[f"layers.0.{part}.bias"] = (rows,)
    tensors = {f"decoder.sentence_encoder.{name}": torch.randn(s) for name, s in shapes.items()}
    for name in ("dense.weight", "dense.bias", "layer_norm.weight", "layer_norm.bias"):
        size = (hidden, hidden) if name == "dense.weight" else (hidden,)
        tensors[f"decoder.lm_head.{name}"] = torch.randn(size)
    tensors["decoder.lm_head.bias"] = torch.randn(vocabulary)
    tensors["decoder.lm_head.weight"] = torch.randn(vocabulary, hidden)
    tensors["decoder.sentence_encoder.embed_tokens.weight"] = tensors["decoder.lm_head.weight"]
    args = argparse.Namespace(
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_embed_dim=inner,
        activation_fn="gelu",
        dropout=0.1,
        attention_dropout=0.1,
        max_positions=positions,
    )
    return tensors, args


def test_directory_opens_with_every_weight_matched(heavy):
    model, info = AutoModelForMaskedLM.from_pretrained(heavy, output_loading_info=True)
    assert isinstance(model, RobertaForMaskedLM)
    assert model.config.architectures == ["RobertaForMaskedLM"]
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 568_985
    assert not model.roberta.embeddings.token_type_embeddings.weight.any()


def test_light_chain_directory_opens_with_its_own_length():
    light = checkpoint("light")
    model = AutoModelForMaskedLM.from_pretrained(light)
    assert model.config.max_position_embeddings == 130
    assert AutoTokenizer.from_pretrained(light).model_max_length == 128


def test_tokenizer_gives_one_token_per_letter_in_the_models_order(heavy_tokenizer):
    assert heavy_tokenizer("ACDEFGHIKLMNPQRSTVWY").input_ids == [0, *range(4, 24), 2]
    assert heavy_tokenizer.convert_tokens_to_ids(list(sapiens.VOCABULARY)) == list(range(25))
    assert heavy_tokenizer.model_max_length == 144
    assert heavy_tokenizer.cls_token_id == heavy_tokenizer.bos_token_id == 0
    assert heavy_tokenizer.pad_token_id == 1
    assert heavy_tokenizer.sep_token_id == heavy_tokenizer.eos_token_id == 2
    assert heavy_tokenizer.unk_token_id == 3
    assert heavy_tokenizer.mask_token_id == 24


def test_tokenizer_ignores_white_space_and_marks_other_characters_unknown(heavy_tokenizer):
    assert heavy_tokenizer(" E V\n<mask> L\t").input_ids == heavy_tokenizer("EV<mask>L").input_ids
    assert heavy_tokenizer("EvX1é").input_ids == [0, 7, 3, 3, 3, 3, 2]


def test_tokenizer_pads_and_decodes(heavy_tokenizer):
    batch = heavy_tokenizer(["EVQ", "E"], padding=True, return_tensors="pt")
    assert batch.input_ids.tolist() == [[0, 7, 21, 17, 2], [0, 7, 2, 1, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert heavy_tokenizer.decode(batch.input_ids[0], skip_special_tokens=True) == "EVQ"


def test_masked_accuracy_is_that_of_the_trained_model(heavy_model, heavy_tokenizer):
    scores = [masked_scores(heavy_model, heavy_tokenizer, text) for text in sapiens.HEAVY_CHAINS]
    accuracies, nlls = zip(*scores, strict=True)
    assert sum(accuracies) / len(accuracies) > 0.7
    assert accuracies == pytest.approx(ACCURACIES, abs=0.01)  # a residue is 0.0085
    assert nlls == pytest.approx(NLLS, abs=0.005)


def test_fill_mask_pipeline_finds_a_conserved_cysteine(heavy):
    text = sapiens.HEAVY_CHAINS[0]
    assert text[21] == "C"
    best, *_ = pipeline("fill-mask", model=str(heavy))(f"{text[:21]}<mask>{text[22:]}")
    assert best["token_str"] == "C"
    assert best["sequence"] == text


def test_second_call_reuses_the_directory_without_pip(heavy, monkeypatch):
    monkeypatch.setattr(sapiens.subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    assert sapiens.sapiens_checkpoint(sapiens.default_cache_dir()) == heavy


def test_heavy_chains_are_amino_acid_letters_that_fit_the_model():
    assert len(set(sapiens.HEAVY_CHAINS)) == len(ACCURACIES)
    for text in sapiens.HEAVY_CHAINS:
        assert set(text) <= set(sapiens.AMINO_ACIDS)
        assert 110 <= len(text) <= 142


def test_cached_wheel_is_found_under_any_spelling(tmp_path, monkeypatch):
    monkeypatch.setattr(sapiens.subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    wheel = tmp_path / "wheels" / "Some_Model-1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.touch()
    assert sapiens.fetch_wheel("some-model==1.2", tmp_path) == wheel


def test_failing_download_says_what_to_do_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(OSError, match="pass a SOURCE directory"):
        sapiens.sapiens_checkpoint(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["wheels"]


@pytest.mark.parametrize("requirement", ["sapiens", "sapiens>=1.0.5", "==1.0.5", "sapiens=="])
def test_unpinned_requirement_is_refused(tmp_path, requirement):
    with pytest.raises(ValueError, match="pinned"):
        sapiens.fetch_wheel(requirement, tmp_path)


def test_unknown_chain_is_refused(tmp_path):
    with pytest.raises(ValueError, match="heavy"):
        sapiens.sapiens_checkpoint(tmp_path, "kappa")


def test_cache_dir_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("MRA_HF_CACHE", str(tmp_path / "own"))
    assert sapiens.default_cache_dir() == tmp_path / "own"
    monkeypatch.delenv("MRA_HF_CACHE")
    assert sapiens.default_cache_dir() == tmp_path / "xdg" / "mra_hf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert sapiens.default_cache_dir().parts[-2:] == (".cache", "mra_hf")


def test_fairseq_conversion_takes_every_tensor():
    tensors, args = tiny_fairseq()
    state = sapiens.roberta_from_fairseq(tensors, args).state_dict()
    layer = "roberta.encoder.layer.0"
    source = "decoder.sentence_encoder.layers.0"
    assert state[f"{layer}.attention.self.key.bias"].equal(
        tensors[f"{source}.self_attn.k_proj.bias"]
    )
    assert state[f"{layer}.output.dense.weight"].equal(tensors[f"{source}.fc2.weight"])
    assert state["lm_head.decoder.bias"].equal(tensors["decoder.lm_head.bias"])


@pytest.mark.parametrize("change", ["extra", "missing", "missing in layer", "shape", "untied"])
def test_fairseq_conversion_refuses_other_tensors(change):
    tensors, args = tiny_fairseq()
    match change:
        case "extra":
            tensors["decoder.sentence_encoder.layers.0.adapter.weight"] = torch.zeros(1)
        case "missing":
            del tensors["decoder.lm_head.dense.bias"]
        case "missing in layer":
            del tensors["decoder.sentence_encoder.layers.0.fc1.bias"]
        case "shape":
            tensors["decoder.sentence_encoder.embed_positions.weight"] = torch.zeros(5, 8)
        case "untied":
            tensors["decoder.lm_head.weight"] = torch.randn(25, 8)
    with pytest.raises(ValueError, match=r"fairseq|tie"):
        sapiens.roberta_from_fairseq(tensors, args)
