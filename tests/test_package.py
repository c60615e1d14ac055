"""What is published: a wheel and a source distribution that work without the repository."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("hf_dskd", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")


def run(*command, **options):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The two files, built from a copy of the sources: the wheel out of the source distribution."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    run("-m", "build", "--no-isolation", "--outdir", folder / "dist", source)
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return wheel, sdist


def test_twine_accepts_both(built):
    assert run("-m", "twine", "check", "--strict", *built).count("PASSED") == 2


def test_they_hold_the_package_and_nothing_else(built):
    wheel, sdist = built
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "hf_dskd"], cwd=ROOT, capture_output=True
    )
    expected = set(tracked.stdout.decode().split()) or {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "hf_dskd").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"hf_dskd/py.typed", "hf_dskd/hub/card.md", "hf_dskd/report/page.html"} <= expected
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == expected
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert expected <= packed and not any(name.startswith(("tests", "recipes")) for name in packed)


def test_the_wheel_says_what_pyproject_says(built):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with zipfile.ZipFile(built[0]) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        metadata = archive.read(name).decode()
    from hf_dskd import __version__

    assert f"\nVersion: {__version__}\n" in metadata and project["version"] == __version__
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    needed = {re.match(r"[\w.-]+", line)[0] for line in re.findall(r"Requires-Dist: (.*)", metadata)}
    assert {re.match(r"[\w.-]+", line)[0] for line in project["dependencies"]} <= needed


def test_the_wheel_works_without_the_repository(built, tmp_path):
    """From another folder, with the wheel's files alone on the path: commands, a run, its card."""
    zipfile.ZipFile(built[0]).extractall(tmp_path / "site")
    (tmp_path / "run.yaml").write_text(
        "model_name_or_path: gpt2\nteacher_model_name_or_path: Qwen/Qwen3-8B\noutput_dir: out\nmethod: dskd_cma_ga\n"
        "eval_strategy: 'no'\nsave_strategy: 'no'\n"
    )
    code = """
import hf_dskd
from hf_dskd.cli import run
print(hf_dskd.__file__)
assert run("train --config run.yaml --smoke --max_steps 1".split()) == 0
assert run("push out_smoke --dry_run pushed".split()) == 0
"""
    # -P and the site folder first: neither the working folder nor an editable install of the repository is used.
    environment = {"PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    printed = run("-P", "-c", code, cwd=tmp_path, env={**os.environ, **environment})
    assert printed.splitlines()[0] == str(tmp_path / "site" / "hf_dskd" / "__init__.py")
    assert "dskd_cma_ga" in (tmp_path / "pushed" / "README.md").read_text()
    assert (tmp_path / "pushed" / "model.safetensors").is_file()


def test_versions_are_the_same_everywhere():
    import yaml

    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert hooks["rev"] == f"v{pinned['ruff']}"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cited["version"], cited["license"]) == (project["version"], project["license"])
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["jobs"]["tests"]["steps"][-1] == {"run": ".ci/run"}
