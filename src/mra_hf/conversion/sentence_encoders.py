"""Sources written by sentence-transformers: the modules around their encoder, in and out.

`modules.json` lists them: first a Transformer, the encoder, in the directory itself or in a folder
such as `0_Transformer`; then what turns its states into one vector. The encoder is converted, its
settings get the new length, everything else is copied. Directories of a CrossEncoder are the same
with a classifier in place of an encoder; older ones have no `modules.json`, only fields in
config.json. The library itself is not imported.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mra_hf.conversion.files import read_json

MODULES_NAME = "modules.json"
#: Prompts, similarity function, activation of a CrossEncoder.
MODEL_SETTINGS_NAME = "config_sentence_transformers.json"
ENCODER_SETTINGS_NAME = "sentence_bert_config.json"
#: Modules behind the encoder that work on any states: their files are copied.
CARRIED_MODULES = ("Pooling", "Normalize", "Dense", "LayerNorm", "Dropout")
#: Fields of config.json that a CrossEncoder reads its activation from.
CLASSIFIER_FIELDS = ("sentence_transformers", "sbert_ce_default_activation_function")

_LIBRARY = "sentence_transformers."
_ENCODER = "Transformer"
#: Names that older versions gave to `ENCODER_SETTINGS_NAME`.
_OLD_SETTINGS_NAMES = tuple(
    f"sentence_{kind}_config.json" for kind in ("roberta", "camembert", "xlm-roberta")
)
_MODULE_FILES = ("config.json", "model.safetensors", "pytorch_model.bin")
_KEPT_SETTINGS = (
    *("max_seq_length", "do_lower_case"),
    *("transformer_task", "modality_config", "module_output_name"),
)
_OPENERS = {"feature-extraction": "SentenceTransformer", "sequence-classification": "CrossEncoder"}
_TASKS = tuple(_OPENERS)
_OUTPUTS = ("last_hidden_state", "pooler_output", "logits")


class SentenceModules(NamedTuple):
    """What `modules.json` of a source says.

    Args:
        root: the folder it lies in.
        rows: its rows, the encoder first.
        settings: of the encoder, from `sentence_bert_config.json`.
    """

    root: Path
    rows: tuple[dict[str, Any], ...]
    settings: dict[str, Any]

    @property
    def encoder_folder(self) -> Path:
        """Where config, weights and tokenizer of the encoder lie."""
        return self.root / self.rows[0]["path"]

    @property
    def names(self) -> tuple[str, ...]:
        """The modules as words, such as "Pooling (cls)"."""
        names = [_class_name(row) for row in self.rows]
        modes = "+".join(self.pooling)
        return tuple(f"{name} ({modes})" if name == "Pooling" else name for name in names)

    @property
    def pooling(self) -> tuple[str, ...]:
        """The modes of the pooling, such as ("mean",); empty where there is none."""
        for row in self.rows[1:]:
            if _class_name(row) == "Pooling":
                return _pooling_modes(read_json(self.root / row["path"] / "config.json"))
        return ()

    @property
    def opened_by(self) -> str:
        """The class of sentence-transformers that opens such a directory."""
        file = self.root / MODEL_SETTINGS_NAME
        by_task = _OPENERS[self.settings.get("transformer_task", _TASKS[0])]
        return read_json(file).get("model_type", by_task) if file.is_file() else by_task


def read_modules(root: Path) -> SentenceModules | None:
    """Return the modules that `modules.json` in the folder `root` lists; None without that file.

    Raises:
        OSError: a file of a module is missing.
        ValueError: the file is not such a list, or holds a module or a setting that a converted
            encoder cannot have.
    """
    file = root / MODULES_NAME
    if not file.is_file():
        return None
    rows = _read_rows(file)
    _refuse_modules(root, rows)
    encoder_folder = root / rows[0]["path"]
    names = (ENCODER_SETTINGS_NAME, *_OLD_SETTINGS_NAMES)
    files = (encoder_folder / name for name in names)
    found = next((path for path in files if path.is_file()), None)
    modules = SentenceModules(root, rows, read_json(found) if found else {})
    _refuse_settings(found or file, modules.settings)
    if modules.opened_by not in _OPENERS.values():
        raise ValueError(
            f"{root / MODEL_SETTINGS_NAME} says model_type {modules.opened_by!r}; "
            f"directories of a {' or a '.join(_OPENERS.values())} can be converted."
        )
    for row in rows[1:]:
        _check_files(root, row)
    return modules


def tokenizer_folder(root: Path) -> Path:
    """Return where the tokenizer of the folder `root` lies: in it, or with its encoder."""
    file = root / MODULES_NAME
    return root / _read_rows(file)[0]["path"] if file.is_file() else root


def _read_rows(file: Path) -> tuple[dict[str, Any], ...]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}.") from error
    is_list = isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
    if not is_list or not all(
        isinstance(row.get(field), str) for row in rows for field in ("name", "path", "type")
    ):
        raise ValueError(f"{file} must be a list of modules with name, path and type.")
    for row in rows:
        path = PurePosixPath(row["path"])
        if path.is_absolute() or ".." in path.parts or "\\" in row["path"]:
            raise ValueError(
                f"{file} names the path {row['path']!r}; only folders below it can be read."
            )
    return tuple(rows)


def _refuse_modules(root: Path, rows: tuple[dict[str, Any], ...]) -> None:
    """Raise a `ValueError` for a module that is neither converted nor copied."""
    for place, row in enumerate(rows):
        allowed = CARRIED_MODULES if place else (_ENCODER,)
        if not row["type"].startswith(_LIBRARY) or _class_name(row) not in allowed:
            where = f"behind it only {', '.join(CARRIED_MODULES)} are" if place else "it must be"
            raise ValueError(
                f"SOURCE {root.name} has the module {row['type']!r} at place {place}, which "
                f"cannot be carried over: a {_ENCODER} of sentence-transformers is converted, "
                f"{where} {'copied' if place else 'the first module'}. To convert the encoder "
                f"without its modules, remove {MODULES_NAME}."
            )


def _class_name(row: Mapping[str, Any]) -> str:
    return row["type"].rpartition(".")[2]


def _refuse_settings(file: Path | str, settings: Mapping[str, Any]) -> None:
    """Raise a `ValueError` for settings of the encoder that the result would not follow."""
    for name, value in settings.items():
        if name not in _KEPT_SETTINGS and value not in (None, False, {}, []):
            raise ValueError(
                f"{file} sets {name} to {value!r}, which cannot be carried over; allowed are "
                f"{', '.join(_KEPT_SETTINGS)}. Remove it to convert the source without it."
            )
    task = settings.get("transformer_task", _TASKS[0])
    if task not in _TASKS:
        raise ValueError(
            f"{file} sets transformer_task to {task!r}; allowed are {' and '.join(_TASKS)}."
        )
    inputs = settings.get("modality_config", {"text": {}})
    text = inputs.get("text") if isinstance(inputs, dict) else None
    if (
        not isinstance(text, dict)
        or len(inputs) != 1
        or text.get("method", "forward") != "forward"
        or text.get("method_output_name", _OUTPUTS[0]) not in _OUTPUTS
    ):
        raise ValueError(
            f"{file} sets modality_config to {inputs!r}; allowed is only text, by forward, with "
            f"one of the outputs {', '.join(_OUTPUTS)}."
        )


def _check_files(root: Path, row: Mapping[str, Any]) -> None:
    """Raise where a module lacks a file that it is opened from."""
    folder, kind = root / row["path"], _class_name(row)
    if row["path"] in ("", "."):
        raise ValueError(
            f"{root / MODULES_NAME} puts {row['type']} into the folder of the encoder; "
            "every module behind it needs a folder of its own."
        )
    if kind != "Normalize":  # has no settings in older versions, often not even a folder
        read_json(folder / "config.json")
    if kind in ("Dense", "LayerNorm") and not any(
        (folder / name).is_file() for name in _MODULE_FILES[1:]
    ):
        raise OSError(f"{folder} has no weights: looked for {', '.join(_MODULE_FILES[1:])}.")


def _pooling_modes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The modes of a Pooling, from one field or from the older field per mode."""
    modes = config.get("pooling_mode")
    if modes is None:
        old = {"cls_token": "cls", "max_tokens": "max", "mean_tokens": "mean"}
        old |= {"mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "lasttoken": "lasttoken"}
        old |= {"weightedmean_tokens": "weightedmean"}
        modes = [mode for field, mode in old.items() if config.get(f"pooling_mode_{field}")]
    modes = [modes] if isinstance(modes, str) else modes
    return tuple(modes) or ("mean",)


def write_modules(modules: SentenceModules, folder: Path, max_length: int) -> None:
    """Write all that sentence-transformers needs beside the encoder in `folder`.

    The encoder lies in `folder` itself and reads `max_length` tokens. Types of modules stay those
    of the source, so that the same versions of the library open both.
    """
    rows = [dict(modules.rows[0], path=""), *modules.rows[1:]]
    _write_json(folder / MODULES_NAME, rows)
    settings = dict(modules.settings)
    if "max_seq_length" in settings or "transformer_task" not in settings:
        settings["max_seq_length"] = max_length  # newer versions ask the tokenizer instead
    _write_json(folder / ENCODER_SETTINGS_NAME, settings)
    if (modules.root / MODEL_SETTINGS_NAME).is_file():
        shutil.copy(modules.root / MODEL_SETTINGS_NAME, folder)
    for row in modules.rows[1:]:
        for name in _MODULE_FILES:
            file = modules.root / row["path"] / name
            if file.is_file():
                copy = folder / row["path"] / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
