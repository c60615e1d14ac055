"""Files of text, JSON and YAML: never half written, and read with an error that names the file."""

from __future__ import annotations

import json
import os
from enum import Enum
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..redaction import without_values


def write_text(path: Path, text: str) -> None:
    """Writes beside and renames, without tokens: the file is never half there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    # A link that lies there would be followed.
    beside.unlink(missing_ok=True)
    beside.write_text(without_values(text), encoding="utf-8")
    os.replace(beside, path)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON; what JSON doesn't know, as text."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def write_json_lines(path: Path, values: Any) -> None:
    """Writes each of some values as one line of JSON."""
    write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def whole_lines(path: Path) -> int:
    """Counts the lines of a file, after cutting off the one that was being written when a process ended."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        whole = [len(line) for line in file if line.endswith(b"\n")]
    if sum(whole) < path.stat().st_size:
        os.truncate(path, sum(whole))
    return len(whole)


def write_yaml(path: Path, settings: dict[str, Any], sort: bool = True) -> None:
    """Writes a configuration file for `--config`."""
    import yaml

    write_text(path, yaml.safe_dump(settings, sort_keys=sort, allow_unicode=True))


def read_json(path: Path, missing: Any = None) -> Any:
    """Reads a JSON file of a run; gives `missing` if there is none."""
    if not path.is_file():
        return missing
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{str(path)!r} isn't valid JSON ({error}): restore it or run the training again") from None


def read_yaml(option: str, path: str | Path) -> dict[str, Any]:
    """Reads the mapping in a YAML file that the command line names with `option`."""
    import yaml

    if not Path(path).is_file():
        raise UserError(f"{option} {str(path)!r} isn't a file: name a YAML file")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{option} {str(path)!r} isn't valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{option} {str(path)!r} holds no settings: write one `name: value` a line")
    return content


def plain(value: Any) -> Any:
    """Makes a setting what JSON and YAML can hold, at any depth."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value
