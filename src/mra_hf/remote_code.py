"""What a saved directory carries so that `trust_remote_code=True` opens it where mra_hf is
installed: `auto_map` in config.json, and a module of one line that imports this package.

Transformers would mark classes opened so and copy their sources into every directory they save. A
copy is another class: its settings reach neither the attention nor the checks of this package.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedConfig, PreTrainedModel

#: The module that saved directories point to.
REMOTE_MODULE = "modeling_mra_hf"

#: Configuration class -> its model classes, each with the Auto classes that open it.
_CLASSES: dict[type[PreTrainedConfig], dict[type[PreTrainedModel], tuple[type, ...]]] = {}


def add_model_class(
    config_class: type[PreTrainedConfig],
    model_class: type[PreTrainedModel],
    auto_classes: tuple[type, ...],
) -> None:
    """Let directories of `config_class` name `model_class`, and `auto_classes` that open it."""
    _CLASSES.setdefault(config_class, {})[model_class] = auto_classes


class OwnCode:
    """Classes of this package are imported, never copied; those that extend them elsewhere may."""

    @classmethod
    def register_for_auto_class(cls, auto_class=None):
        """As the base class for code outside this package; for its own classes nothing."""
        if cls.__module__.partition(".")[0] != __name__.partition(".")[0]:
            arguments = [] if auto_class is None else [auto_class]
            # Configurations and models have the method, and no base class in common.
            super().register_for_auto_class(*arguments)  # type: ignore[misc]


if TYPE_CHECKING:  # what `OwnConfig` is mixed into
    _Config = PreTrainedConfig
else:
    _Config = object


class OwnConfig(OwnCode, _Config):
    """Mixin of the configuration classes of this package."""

    if TYPE_CHECKING:

        @property
        def num_labels(self) -> int:
            """Two where nothing names the labels, so never None."""

        @num_labels.setter
        def num_labels(self, value: int) -> None: ...

        def validate(self) -> None:
            """What huggingface_hub's `strict` gives to configuration classes."""

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As the base class; writes the module of one line beside config.json."""
        config_class = next((base for base in type(self).__mro__ if base in _CLASSES), None)
        if config_class is not None and not os.path.isfile(save_directory):
            models = _CLASSES[config_class]
            names = sorted(each.__name__ for each in (config_class, *models))
            folder = Path(save_directory)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{REMOTE_MODULE}.py").write_text(f"from mra_hf import {', '.join(names)}\n")
            # A class that extends ours elsewhere has named itself; other entries are old.
            others = {
                auto_class: path
                for auto_class, path in (getattr(self, "auto_map", None) or {}).items()
                if isinstance(path, str) and path.rpartition(".")[2] not in names
            }
            self.auto_map = _auto_map(config_class) | others
        return super().save_pretrained(save_directory, *args, **kwargs)


def check_config_class(config: PreTrainedConfig, config_class: type[PreTrainedConfig]) -> None:
    """Raise a `ValueError` unless `config` is a `config_class`, or extends it."""
    if not isinstance(config, config_class):
        given, name = type(config), config_class.__name__
        raise ValueError(
            f"config must be a mra_hf.{name}, got {given.__name__} of {given.__module__}. If it "
            "was read from a directory that holds a copy of this package's source, `import mra_hf` "
            "before opening it, and save it again; for another type of model see `mra-hf convert`."
        )


def _auto_map(config_class: type[PreTrainedConfig]) -> dict[str, str]:
    """Auto class -> class in the module that saved directories hold."""
    return {"AutoConfig": f"{REMOTE_MODULE}.{config_class.__name__}"} | {
        auto_class.__name__: f"{REMOTE_MODULE}.{model_class.__name__}"
        for model_class, auto_classes in _CLASSES[config_class].items()
        for auto_class in auto_classes
    }
