"""The tokenizer of a result: for its new length, and the same ids as the source's.

Not every tokenizer of Transformers survives `save_pretrained`, so the saved one is opened again and
encodes texts in several scripts. Where it differs, the source's own files are copied instead.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mra_hf.loading import leave_out_token_types

#: What a tokenizer takes over from a `tokenizer.json` that cuts or pads.
_LENGTH_SETTINGS = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of")
_CONFIG_NAME = "tokenizer_config.json"
_FILES = (
    *("tokenizer.json", _CONFIG_NAME, "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt", "bpe.codes"),
    *("sentencepiece.bpe.model", "spiece.model", "tokenizer.model"),
)
PROBES = (
    "hello world",
    "The quick brown fox doesn't jump over 12,345.67 lazy dogs - twice!",
    "  Two spaces,\ta tab\nand a new line ",
    "naïve façade, Ångström, STRASSE straße, e\u0301 é",
    "Съешь же ещё этих мягких французских булок",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "我能吞下玻璃而不伤身体。日本語のテキストと한국어 문장",
    "أكل الولد التفاحة، דג סקרן שט בים",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा",
    "😀 👩‍🔬 🇪🇺 ½ ∑ \u00ad \u200b https://example.org/a?b=c #tag @user",
    "A B C D E F Q V E V Q L V E S G G G L V Q P G G S L R L",
)


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, max_length: int, type_vocab_size: int
) -> list[str]:
    """Set the new length, and leave token types out where the model has no second one; return
    sentences on what was changed.
    """
    notes = []
    tokenizer.model_max_length = max_length
    backend = getattr(tokenizer, "_tokenizer", None)
    if backend is not None and (backend.truncation or backend.padding):
        lengths = [
            f"{name} to {settings[key]} tokens" if settings[key] else name
            for name, settings, key in (
                ("truncation", backend.truncation, "max_length"),
                ("padding", backend.padding, "length"),
            )
            if settings
        ]
        notes.append(
            f"tokenizer.json held {' and '.join(lengths)}; they are removed, as the result reads "
            f"{max_length} tokens."
        )
        backend.no_truncation()
        backend.no_padding()
    for name in _LENGTH_SETTINGS:
        tokenizer.init_kwargs.pop(name, None)
    if leave_out_token_types(tokenizer, type_vocab_size):
        notes.append(
            "The tokenizer tells the two texts of a pair apart by token types, but the model has "
            "one type only (type_vocab_size 1): the tokenizer of the result leaves them out."
        )
    return notes


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write `tokenizer` to `folder`, which holds the config.json of the result.

    Raises:
        ValueError: opened again it would give other ids, whether saved or copied.
    """
    expected = list(_encodings(tokenizer))
    written = [Path(file) for file in tokenizer.save_pretrained(folder)]
    if _difference(folder, expected) is None:
        return
    for file in written:
        file.unlink(missing_ok=True)
    _copy_files(tokenizer, folder)
    difference = _difference(folder, expected)
    if difference is not None:
        raise ValueError(
            f"the tokenizer of SOURCE ({type(tokenizer).__name__}) does not survive being saved: "
            f"{difference}. Save it as a fast tokenizer (tokenizer.json) that encodes as it does, "
            "and pass its directory as tokenizer (--tokenizer)."
        )


def _encodings(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, dict[str, list[int]]]]:
    """Each probe, with the special tokens in it, and each pair, with its encoding."""
    texts = [*PROBES, f"{PROBES[0]} {tokenizer.mask_token or ''} {PROBES[1]}"]
    for first, second in zip(texts, [*texts[1:], texts[0]], strict=True):
        yield first, dict(tokenizer(first, verbose=False))
        yield f"{first} | {second}", dict(tokenizer(first, second, verbose=False))


def _difference(folder: Path, expected: list) -> str | None:
    """How the tokenizer in `folder` encodes otherwise than `expected`; None if it does not."""
    try:
        again = AutoTokenizer.from_pretrained(folder)
        for (text, before), (_, after) in zip(expected, _encodings(again), strict=True):
            if before != after:
                names = (*before, *after)
                name = next(each for each in names if before.get(each) != after.get(each))
                return f"{text!r} has the {name} {before.get(name)}, and then {after.get(name)}"
    except Exception as error:  # each tokenizer library raises its own
        return f"it cannot be opened again ({' '.join(str(error).split())})"
    return None


def _copy_files(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Copy the files of the source's tokenizer, with the settings of `tokenizer` for its length and
    its inputs.
    """
    source = Path(tokenizer.name_or_path)
    for name in {*_FILES, *tokenizer.vocab_files_names.values()}:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    file = folder / _CONFIG_NAME
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    settings = {name: settings[name] for name in settings if name not in _LENGTH_SETTINGS}
    settings["model_max_length"] = tokenizer.model_max_length
    settings.setdefault("tokenizer_class", type(tokenizer).__name__)
    if "model_input_names" in tokenizer.init_kwargs:
        settings["model_input_names"] = list(tokenizer.model_input_names)
    _write_json(file, settings)
    file = folder / "tokenizer.json"
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        _write_json(file, content | {"truncation": None, "padding": None})


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
