"""The as-published mode against golden values of the published code, where these are at hand."""

from pathlib import Path

import parity
import pytest
from safetensors.torch import load_file, save_file


ORACLE = Path(__file__).resolve().parents[2] / "shared" / "reference" / "oracle"
BUILT = ["cross_entropy", "dual_space_kd_with_cma-", "gan"]


@pytest.mark.skipif(not ORACLE.is_dir(), reason="the golden values are not beside this checkout")
@pytest.mark.parametrize("only", BUILT)
def test_built_criteria_agree(only, capsys):
    assert parity.main([str(ORACLE), "--only", only]) == 0
    assert "ok  " in capsys.readouterr().out


@pytest.mark.skipif(not ORACLE.is_dir(), reason="the golden values are not beside this checkout")
def test_a_wrong_value_fails(tmp_path, capsys):
    name = "a-dual_space_kd_with_cma-forward_kl"
    (tmp_path / "cases.json").write_text((ORACLE / "cases.json").read_text())
    tensors = load_file(ORACLE / f"{name}.safetensors")
    tensors["grad.projector.query.0.weight"] *= 1.001
    save_file(tensors, tmp_path / f"{name}.safetensors")
    assert parity.main([str(tmp_path), "--only", name]) == 1
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.skipif(not ORACLE.is_dir(), reason="the golden values are not beside this checkout")
def test_a_criterion_that_is_not_built_fails(capsys):
    assert parity.main([str(ORACLE), "--only", "universal_logit_distillation"]) == 1
    assert "NOT BUILT" in capsys.readouterr().out


def test_a_folder_without_cases(tmp_path, capsys):
    assert parity.main([str(tmp_path)]) == 2
    assert "cases.json" in capsys.readouterr().err
