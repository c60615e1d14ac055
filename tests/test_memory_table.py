"""The table of what a step takes: its rows, and a run against its formulas."""

import json
import sys
from functools import partial
from pathlib import Path

import memory_table as recipe
import pytest
import torch
import yaml

from hf_dskd import UserError


RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets the most memory that a process had")
def test_a_run_takes_what_is_computed(tmp_path):
    (row,) = recipe.check((("small", 4, 256, "float32", "live"),), tmp_path)
    assert row["error"] == pytest.approx(0, abs=0.15), row


@pytest.mark.parametrize(
    "row, name",
    [(name, name) for name in recipe.RECIPES if name != "llama3_qwen2"] + [("llama3_qwen2", "llama32_1b_qwen25_7b")],
)
def test_rows_are_the_recipes(row, name):
    given = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    shape, found = recipe.SHAPES[recipe.RECIPES[row].shape], recipe.RECIPES[row]
    assert shape.lora_r == given.get("lora_r", 0)
    assert not shape.lora_r or given["lora_target_modules"] in (shape.lora_targets, [*shape.lora_targets])
    assert found.batch_size == given["per_device_train_batch_size"] and found.max_length == given["max_length"]
    assert found.accumulation == given["total_batch_size"] // found.batch_size
    assert found.four_bit == given.get("load_teacher_in_4bit", False)


def test_the_table_says_what_fits():
    def found(gigabytes):
        return {"computed": {"total": gigabytes * 1e9}}

    row = {"title": "a ← b", "batch_size": 4, "max_length": 512, "gradient_checkpointing": True}
    rows = [{**row, "live": found(16.2), "cached": {**found(1.0), "measured": 12.2e9}}]
    head, rule, line = recipe.markdown(rows).splitlines()
    assert head.count("|") == rule.count("|") == line.count("|")
    assert line == ("| a ← b, gradient checkpointing | 4 × 512 | 16.2 | 12.2 | cached | no | live and cached |")


def test_the_command_computes(monkeypatch, capsys):
    given = ["--computed", "--json", "--recipes", "smollm2_qwen_coder"]
    monkeypatch.setattr(recipe, "parse", partial(recipe.parse, given))
    recipe.main()
    *text, last = capsys.readouterr().out.splitlines()
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
