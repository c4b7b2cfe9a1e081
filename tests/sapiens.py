"""A small real RoBERTa for tests: Sapiens, a language model of human antibodies.

`sapiens==1.0.5` (MIT licence) carries a genuine fairseq RoBERTa of heavy chains with its masked-LM
head: 4 layers, hidden size 128, 8 heads, one token per amino acid, 144 positions. The package is
neither installed nor imported: `sapiens_checkpoint` fetches the wheel with pip, reads the
checkpoint out of it with `weights_only=True` and writes an ordinary Hugging Face directory.
`HEAVY_CHAINS` are sample texts.
"""

import argparse
import io
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

CACHE = Path(os.environ.get("MRA_HF_CACHE", "~/.cache/mra_hf")).expanduser()
REQUIREMENT = "sapiens==1.0.5"  # later versions of the package hold no weights

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"  # the order of the package's dict.txt
VOCABULARY = ("<s>", "<pad>", "</s>", "<unk>", *AMINO_ACIDS, "<mask>")
SPECIALS = {
    **{"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"},
    **{"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"},
}

# Variable heavy domains of approved human or humanised antibodies.
HEAVY_CHAINS = (
    # trastuzumab
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLR"
    "AEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS",
    # adalimumab
    "EVQLVESGGGLVQPGRSLRLSCAASGFTFDDYAMHWVRQAPGKGLEWVSAITWNSGHIDYADSVEGRFTISRDNAKNSLYLQMNSLR"
    "AEDTAVYYCAKVSYLSTASSLDYWGQGTLVTVSS",
    # pembrolizumab
    "QVQLVQSGVEVKKPGASVKVSCKASGYTFTNYYMYWVRQAPGQGLEWMGGINPSNGGTNFNEKFKNRVTLTTDSSTTTAYMELKSLQ"
    "FDDTAVYYCARRDYRFDMGFDYWGQGTTVTVSS",
    # bevacizumab
    "EVQLVESGGGLVQPGGSLRLSCAASGYTFTNYGMNWVRQAPGKGLEWVGWINTYTGEPTYAADFKRRFTFSLDTSKSTAYLQMNSLR"
    "AEDTAVYYCAKYPHYYGSSHWYFDVWGQGTLVTVSS",
    # nivolumab
    "QVQLVESGGGVVQPGRSLRLDCKASGITFSNSGMHWVRQAPGKGLEWVAVIWYDGSKRYYADSVKGRFTISRDNSKNTLFLQMNSLR"
    "AEDTAVYYCATNDDYWGQGTLVTVSS",
    # atezolizumab
    "EVQLVESGGGLVQPGGSLRLSCAASGFTFSDSWIHWVRQAPGKGLEWVAWISPYGGSTYYADSVKGRFTISADTSKNTAYLQMNSLR"
    "AEDTAVYYCARRHWPGGFDYWGQGTLVTVSS",
    # ipilimumab
    "QVQLVESGGGVVQPGRSLRLSCAASGFTFSSYTMHWVRQAPGKGLEWVTFISYDGNNKYYADSVKGRFTISRDNSKNTLYLQMNSLR"
    "AEDTAIYYCARTGWLGPFDYWGQGTLVTVSS",
    # durvalumab
    "EVQLVESGGGLVQPGGSLRLSCAASGFTFSRYWMSWVRQAPGKGLEWVANIKQDGSEKYYVDSVKGRFTISRDNAKNSLYLQMNSLR"
    "AEDTAVYYCAREGGWFGELAFDYWGQGTLVTVSS",
)

# fairseq name -> RobertaForMaskedLM name, for whole names and for the parts inside one layer.
TENSORS = {
    "decoder.sentence_encoder.embed_tokens.weight": "roberta.embeddings.word_embeddings.weight",
    "decoder.sentence_encoder.embed_positions.weight": (
        "roberta.embeddings.position_embeddings.weight"
    ),
    "decoder.sentence_encoder.emb_layer_norm.weight": "roberta.embeddings.LayerNorm.weight",
    "decoder.sentence_encoder.emb_layer_norm.bias": "roberta.embeddings.LayerNorm.bias",
    "decoder.lm_head.dense.weight": "lm_head.dense.weight",
    "decoder.lm_head.dense.bias": "lm_head.dense.bias",
    "decoder.lm_head.layer_norm.weight": "lm_head.layer_norm.weight",
    "decoder.lm_head.layer_norm.bias": "lm_head.layer_norm.bias",
    "decoder.lm_head.weight": "lm_head.decoder.weight",
    "decoder.lm_head.bias": "lm_head.bias",
}
LAYER_PARTS = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
}
LAYER_NAME = re.compile(r"decoder\.sentence_encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def fetch_wheel(requirement: str) -> Path:
    """Return the wheel of "name==version", downloaded by pip, without building or installing.

    It lies in `CACHE / "wheels"` and is reused from there. Raises OSError if pip cannot fetch it.
    """
    name, version = requirement.replace("-", "_").split("==")
    folder = CACHE / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as download:
        if not (cached := list(folder.glob(f"{name}-{version}-*.whl"))):
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
            command += ["--only-binary", ":all:", "--retries", "2", "-d", download, requirement]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise OSError(f"pip could not download {requirement}: {done.stderr[-500:]}")
            cached = [wheel.replace(folder / wheel.name) for wheel in Path(download).glob("*.whl")]
    return cached[0]


def sapiens_checkpoint() -> Path:
    """Return a Hugging Face directory (roberta, masked LM, tokenizer), built once in `CACHE`.

    Inputs are plain amino acid letters, at most 142 of them.
    """

    def write(folder: Path) -> None:
        with zipfile.ZipFile(fetch_wheel(REQUIREMENT)) as archive:
            content = io.BytesIO(archive.read("sapiens/models/v1/checkpoint_vh.pt"))
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(content, weights_only=True, map_location="cpu")
        roberta_from_fairseq(checkpoint["model"], checkpoint["args"]).save_pretrained(folder)
        tokenizer = letter_tokenizer(VOCABULARY, SPECIALS, checkpoint["args"].max_positions)
        tokenizer.save_pretrained(folder)

    return build_once(CACHE / "sapiens-1.0.5-heavy-layout1", write)


def build_once(target: Path, write: Callable[[Path], None]) -> Path:
    """Return the folder `target`, made by `write(folder)` if it is not there yet.

    `write` fills a temporary folder beside it that is renamed at the end, so that `target` is
    never seen half written, also when two processes build it at the same time.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as scratch:
        built = Path(scratch) / target.name
        built.mkdir()
        write(built)
        try:
            built.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process finished first
                raise
    return target


def roberta_from_fairseq(
    tensors: dict[str, torch.Tensor], args: argparse.Namespace
) -> RobertaForMaskedLM:
    """Return the RobertaForMaskedLM with the weights and sizes of a fairseq RoBERTa.

    Every tensor of the fairseq model is used, and every tensor of the result is set.
    """

    def renamed(name):
        if match := LAYER_NAME.fullmatch(name):
            return f"roberta.encoder.layer.{match[1]}.{LAYER_PARTS[match[2]]}.{match[3]}"
        return TENSORS[name]

    state = {renamed(name): tensor for name, tensor in tensors.items()}
    words = state["roberta.embeddings.word_embeddings.weight"]  # [vocabulary, hidden]
    assert torch.equal(words, state["lm_head.decoder.weight"]), "the result ties the two"
    state["lm_head.decoder.bias"] = state["lm_head.bias"]
    # fairseq's RoBERTa has no segments; Transformers adds row 0 of this table to every token.
    state["roberta.embeddings.token_type_embeddings.weight"] = words.new_zeros(1, words.shape[1])

    config = RobertaConfig(
        vocab_size=words.shape[0],
        hidden_size=words.shape[1],
        num_hidden_layers=args.encoder_layers,
        num_attention_heads=args.encoder_attention_heads,
        intermediate_size=args.encoder_ffn_embed_dim,
        hidden_act=args.activation_fn,
        hidden_dropout_prob=args.dropout,
        attention_probs_dropout_prob=args.attention_dropout,
        # position 2 is the first one in use, as in every RoBERTa
        max_position_embeddings=args.max_positions + 2,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=VOCABULARY.index("<pad>"),
        bos_token_id=VOCABULARY.index("<s>"),
        eos_token_id=VOCABULARY.index("</s>"),
    )
    model = RobertaForMaskedLM(config)
    model.load_state_dict(state)
    return model.eval()


def letter_tokenizer(
    vocabulary: tuple[str, ...], specials: dict[str, str], max_length: int
) -> PreTrainedTokenizerFast:
    """Return a fast tokenizer with one token per letter and ids in the order of `vocabulary`.

    White space between letters is ignored; whatever is not in `vocabulary` becomes the unknown
    token. `specials` names the special tokens as the Transformers tokenizers do ("cls_token",
    "sep_token", "unk_token", ...); a text becomes cls, letters, sep.
    """
    ids = {token: index for index, token in enumerate(vocabulary)}
    cls, sep = specials["cls_token"], specials["sep_token"]
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=specials["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+"), behavior="removed"),
            pre_tokenizers.Split(Regex("."), behavior="isolated"),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A:0 {sep}:0 {sep}:0 $B:0 {sep}:0",
        special_tokens=[(cls, ids[cls]), (sep, ids[sep])],
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        **specials,
    )
