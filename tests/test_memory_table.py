"""The table of what a step takes: its rows, and a run against its formulas."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_dskd import UserError


RECIPES = Path(__file__).resolve().parents[1] / "recipes"
# Recipes are run as files; processes that they start look here too.
sys.path.insert(0, str(RECIPES))

import memory_table as recipe  # noqa: E402


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets the most memory that a process had")
def test_a_run_takes_what_is_computed(tmp_path):
    (row,) = recipe.check((("small", 8, 384, "float32", "live"),), tmp_path)
    assert row["error"] == pytest.approx(0, abs=0.15), row


def test_the_table_says_what_fits():
    def found(gigabytes):
        return {"computed": {"total": gigabytes * 1e9}}

    row = {"title": "a ← b", "batch_size": 4, "max_length": 512, "gradient_checkpointing": True}
    rows = [{**row, "live": found(16.2), "cached": {**found(1.0), "measured": 12.2e9}}]
    head, rule, line = recipe.markdown(rows).splitlines()
    assert head.count("|") == rule.count("|") == line.count("|")
    assert line == ("| a ← b, gradient checkpointing | 4 × 512 | 16.2 | 12.2 | cached | no | live and cached |")


def test_the_command_computes(tmp_path):
    done = subprocess.run(
        [sys.executable, str(RECIPES / "memory_table.py"), "--computed", "--json", "--recipes", "smollm2_qwen_coder"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *text, last = done.stdout.splitlines()
    result = json.loads(last)
    assert len(result["rows"]) == 2 and result["checks"] == [] and result["torch"] == torch.__version__
    for row in result["rows"]:
        live, cached = (row[kind]["computed"]["total"] for kind in ("live", "cached"))
        assert 0 < cached < live
        assert f"| {live / 1e9:.1f} | {cached / 1e9:.1f} |" in "\n".join(text)
    assert "computed, not measured" in "\n".join(text)


def test_an_unknown_recipe_is_refused_in_one_line():
    with pytest.raises(UserError) as error:
        recipe.parse(["--recipes", "gpt2_gwen"])
    assert "did you mean 'gpt2_qwen'" in str(error.value) and "\n" not in str(error.value)
