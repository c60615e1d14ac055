"""`hf-dskd report`."""

import subprocess
import sys
from pathlib import Path

import pytest
from run_folders import ANALYSES, comparison, folder, full_folder

from hf_dskd import UserError, cli


pytestmark = pytest.mark.usefixtures("undrawn")


def test_a_comparison_stands_for_its_cells(tmp_path, capsys):
    base = tmp_path / "grid" / "cells"
    comparison(base / "alm", [0.5, 0.75], label="alm-t1", method="alm")
    comparison(base / "sft", [0.75], label="sft", method="sft")
    (base / "uld-seed0").mkdir()
    assert cli.run(["report", str(tmp_path / "grid")]) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [str(tmp_path / "grid" / "report" / name) for name in ("report.md", "report.html")]
    markdown = Path(printed[0]).read_text()
    assert markdown.startswith("# 3 runs: alm-t1, sft\n") and "left out: uld-seed0." in markdown


def test_one_run_and_output_dir(tmp_path, capsys):
    run = folder(tmp_path / "run")
    assert cli.run(["report", str(run)]) == 0 and (run / "report" / "report.md").is_file()
    for given in (["--output_dir", str(tmp_path / "a")], [f"--output-dir={tmp_path / 'b'}"]):
        assert cli.run(["report", *given, str(run)]) == 0
    assert (tmp_path / "a" / "report.html").read_bytes() == (tmp_path / "b" / "report.html").read_bytes()
    other = folder(tmp_path / "other")
    assert cli.run(["report", str(run), str(other), "--output_dir", str(tmp_path / "c")]) == 0
    assert "2 runs" in (tmp_path / "c" / "report.md").read_text()
    assert (
        "\n".join(capsys.readouterr().out.split()[-2:])
        == f"{tmp_path / 'c' / 'report.md'}\n{tmp_path / 'c' / 'report.html'}"
    )


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], "nothing to report on"),
        (["nothere"], "'nothere' isn't a folder"),
        (["run", "--output_dir"], "--output_dir: expected one argument; `hf-dskd report --help`"),
        (["run", "--output_dir", ""], "--output_dir has no value"),
        (["run", "--seeds", "1"], "--seeds"),
        (["run", "other/../run"], "'other/../run' is named twice"),
        (["run", "other"], "--output_dir is not set"),
        (["grid"], "no finished run"),
    ],
)
def test_wrong_arguments(arguments, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "run"), folder(tmp_path / "other")
    (tmp_path / "grid" / "cells" / "sft-seed0").mkdir(parents=True)
    with pytest.raises(UserError) as error:
        cli.run(["report", *arguments])
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_reports_need_no_torch(tmp_path):
    run, other = full_folder(tmp_path / "run"), folder(tmp_path / "other", analyses=ANALYSES)
    both = tmp_path / "both"
    code = f"""
import sys
from hf_dskd.cli import run
for words in ([{str(run)!r}], [{str(run)!r}, {str(other)!r}, "--output_dir", {str(both)!r}]):
    assert run(["report", *words]) == 0
    print("matplotlib" in sys.modules, {{"torch", "transformers", "datasets"}} & {{*sys.modules}})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[2::3] == ["True set()"] * 2, done.stderr
    for place in (run / "report", both):
        assert {"curves.png", "analysis.png"} <= {path.name for path in place.glob("*.png")}
