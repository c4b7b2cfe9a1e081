"""Data sets fetched by name."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def fetching(name: str) -> Iterator[None]:
    """While a data set is fetched: say what to do where that fails.

    Raises:
        ValueError: it could not be reached.
    """
    try:
        yield
    except ConnectionError as error:
        raise ValueError(
            f"dataset_name {name} could not be fetched ({error}); check the name and the "
            "connection, or pass files with --train_file and --validation_file."
        ) from error
