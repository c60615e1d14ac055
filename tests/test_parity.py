"""The as-published mode against golden values of the published code, where these are at hand."""

from pathlib import Path

import parity
import pytest
from safetensors.torch import load_file, save_file


ORACLE = Path(__file__).resolve().parents[2] / "shared" / "reference" / "oracle"


@pytest.mark.skipif(not ORACLE.is_dir(), reason="the golden values are not beside this checkout")
def test_every_case_agrees(capsys):
    assert parity.main([str(ORACLE)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("20 of 20")


@pytest.mark.skipif(not ORACLE.is_dir(), reason="the golden values are not beside this checkout")
def test_a_wrong_value_fails(tmp_path, capsys):
    name = "a-dual_space_kd_with_cma-forward_kl"
    (tmp_path / "cases.json").write_text((ORACLE / "cases.json").read_text())
    tensors = load_file(ORACLE / f"{name}.safetensors")
    tensors["grad.projector.query.0.weight"] *= 1.001
    save_file(tensors, tmp_path / f"{name}.safetensors")
    assert parity.main([str(tmp_path), "--only", name]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_folder_without_cases(tmp_path, capsys):
    assert parity.main([str(tmp_path)]) == 2
    assert "cases.json" in capsys.readouterr().err
