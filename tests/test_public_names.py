"""The names that packages give: each is there, hides no module, and loads nothing before it is asked for."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import hf_dskd


ROOT = Path(hf_dskd.__file__).parent
LAZY = [
    ".".join(["hf_dskd", *path.parent.relative_to(ROOT).parts])
    for path in ROOT.rglob("__init__.py")
    if "__getattr__" in path.read_text()
]


@pytest.mark.parametrize("package", LAZY)
def test_names_are_what_they_say(package):
    module = importlib.import_module(package)
    assert set(module.__all__) - {"__version__"} <= set(dir(module)) and len(module.__all__) > 1
    for name in set(module.__all__) - {"__version__"}:
        given = getattr(module, name)
        # A module of that name would take its place once it is imported.
        assert given.__name__ == name and not (Path(module.__file__).parent / f"{name}.py").exists()
    with pytest.raises(AttributeError, match=f"'{package}' has no attribute 'forward_lk'"):
        _ = module.forward_lk


def test_nothing_heavy_is_imported():
    code = f"import sys, {', '.join(LAZY)}\nprint([name for name in ('torch', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
