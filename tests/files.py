"""Files that tests write and read."""

import csv
import json
from pathlib import Path


def read_json(path):
    return json.loads(Path(path).read_text())


def read_csv(path) -> list[dict[str, str]]:
    with Path(path).open() as file:
        return list(csv.DictReader(file))


def write_json_lines(path, rows) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
