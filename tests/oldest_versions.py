"""Prints the lower bounds of pyproject.toml as exact pins, for `make test-oldest`."""

import re
import tomllib
from pathlib import Path


project = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["project"]
for requirement in project["dependencies"] + project["optional-dependencies"]["demo"]:
    name, version = re.match(r"([\w.-]+)>=([\w.]+)", requirement).groups()
    print(f"{name}=={version}")
