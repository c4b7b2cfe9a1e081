"""The tasks of the Long Range Arena: made here, or read from files.

Every task is a function that returns `LraData`: sequences of small integers with labels, in three
parts.
"""

from collections.abc import Callable

from mra_hf.data.lra import images, listops, pathfinder, retrieval, texts
from mra_hf.data.lra.parts import LraData

#: The task functions by name.
TASKS: dict[str, Callable[..., LraData]] = {
    "listops": listops.listops,
    "text": texts.text,
    "retrieval": retrieval.retrieval,
    "image": images.image,
    "pathfinder": pathfinder.pathfinder,
}

__all__ = ["TASKS", "LraData"]
