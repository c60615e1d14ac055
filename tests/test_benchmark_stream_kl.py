"""The benchmark of `stream_kl`: all forms compute the same numbers, and what is printed is what was measured."""

import benchmark_stream_kl as recipe
import measuring
import pytest
import torch

from hf_dskd import UserError


SMALL = ("--device", "cpu", "--lengths", "96", "--head-sizes", "8", "--batch-heads", "2")


@pytest.fixture(autouse=True)
def memory_is_kept(monkeypatch):
    """Looking for what could be given back takes most of the time of a small pass."""
    monkeypatch.setattr(measuring, "return_freed_memory", lambda: None)


def here(function, *arguments):
    """Instead of a process for each cell, which takes seconds to import everything."""
    return 1e9 if function is recipe.matrix_rate else function(*arguments)


def benchmark(*arguments):
    return recipe.benchmark(recipe.parse([*SMALL, *arguments]), run=here)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 3e-2)])
def test_all_forms_compute_the_same(dtype, tolerance, monkeypatch):
    monkeypatch.setitem(recipe.CHUNK, "cpu", 20 * 2 * 96)
    rows = benchmark("--dtype", dtype)["rows"]
    assert len(rows) == 3 * 2 * 3
    for of_eager, *others in zip(*(rows[i::3] for i in range(3))):
        assert of_eager["form"] == "eager" and [row["form"] for row in others] == ["chunked", "stream_kl"]
        for row in others:
            assert all(row[name] == of_eager[name] for name in ("what", "mask", "length"))
            assert row["kl"] == pytest.approx(of_eager["kl"], rel=tolerance)
            assert row["gradients"] == pytest.approx(of_eager["gradients"], rel=tolerance)
            assert len(row["gradients"]) == (0 if row["what"] == "forward" else 2)
    kl = {(row["what"], row["mask"]): row["kl"] for row in rows}
    assert kl["forward", "full"] != pytest.approx(kl["forward", "causal"], rel=1e-3)
    norms = [row["gradients"] for row in rows[-6:]]
    assert norms[0] != pytest.approx(norms[3], rel=1e-3)


def test_compiled_is_the_eager_form(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: asked.append(function) or function)
    recipe.form("compile")
    assert asked == [recipe.eager]


def test_default_cells():
    on_cpu = recipe.cells(recipe.parse([]), "cpu")
    assert len(on_cpu) == 3 * 2 * 4 * 3 and {cell.form for cell in on_cpu} == {"eager", "chunked", "stream_kl"}
    assert {cell.length for cell in on_cpu} == {1024, 2048, 4096, 8192}
    on_gpu = recipe.cells(recipe.parse([]), "cuda")
    assert {(cell.batch_heads, cell.head_size) for cell in on_gpu} == {(16, 64), (16, 128), (32, 64), (32, 128)}
    assert {cell.length for cell in on_gpu} == set(recipe.PAPER_LENGTHS) and max(recipe.PAPER_LENGTHS) == 512 * 1024
    assert {(cell.form, cell.dtype, cell.repeats) for cell in on_gpu} == {(f, "bfloat16", 5) for f in recipe.FORMS}


def cell(form="stream_kl", mask="full", what="forward", batch_heads=16, length=65536, head_size=128):
    return recipe.Cell("cuda", "bfloat16", form, mask, what, batch_heads, length, head_size, 5)


def test_matrix_products_that_are_needed():
    """papers.md: two products of 16 x 64K x 64K x 128 are 3.5e13."""
    assert cell().flops == pytest.approx(3.5e13, rel=0.01)
    assert cell(mask="causal").flops == cell().flops / 2
    assert cell(what="backward 1").flops == 2 * cell().flops


def test_the_paper_s_numbers_stand_beside_the_same_cell():
    def numbers(**changes):
        return tuple(cell(**changes).paper().values())

    assert numbers() == (112, 268, 16)
    assert numbers(mask="causal") == (60, 144, 16)
    assert numbers(what="backward 2") == (249, 681, 528)
    assert numbers(what="backward 1", mask="causal") == (138, 372, 532)
    assert numbers(length=512 * 1024) == (7500, 17000, None)
    assert numbers(form="eager", length=16384) == (106, None, None)
    none = (None, None, None)
    # Extrapolated there, or no cell of it.
    assert numbers(form="eager") == numbers(form="chunked") == none
    assert numbers(head_size=64) == numbers(batch_heads=32) == numbers(length=65535) == none
    assert {len(values) for gpu in recipe.PAPER.values() for key, values in gpu.items() if key[0] == "stream_kl"} == {
        8
    }
    row = {**recipe.asdict(cell()), **cell().paper(), "seconds": None}
    shown = recipe.line(row)
    assert "out of memory" in shown and shown.split()[-3:] == ["112", "268", "16"]


def test_what_does_not_fit_is_left_out(monkeypatch):
    import psutil

    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=4 * 2 * 96**2 * 6))
    lines = []
    result = recipe.benchmark(recipe.parse([*SMALL, "--passes", "forward"]), run=here, show=lines.append)
    assert [row["form"] for row in result["rows"] if row["seconds"] is None] == ["eager", "eager"]
    assert sum("out of memory" in line for line in lines) == 2


def test_a_slow_cell_is_not_repeated(monkeypatch):
    assert {row["passes"] for row in benchmark("--repeats", "3", "--passes", "forward")["rows"]} == {3}
    monkeypatch.setattr(recipe, "ENOUGH_SECONDS", 0)
    assert {row["passes"] for row in benchmark("--repeats", "3", "--passes", "forward")["rows"]} == {1}


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("--forms", "eager,stream"), "--forms: 'stream' is unknown: did you mean 'stream_kl'?"),
        (("--masks", "window"), "one of full, causal"),
        (("--passes", "backward"), "one of forward, backward 2, backward 1"),
        (("--device", "tpu"), "one of cpu, cuda"),
        (("--dtype", "float64"), "one of float32, bfloat16, float16"),
        (("--lengths", "4K"), "--lengths: '4K' must be a whole number above 0; several as 1024,2048"),
        (("--batch-heads", "16,0"), "--batch-heads: '0' must be"),
        (("--length", "16"), "--length"),
    ],
)
def test_wrong_arguments(arguments, expected):
    with pytest.raises(UserError) as error:
        recipe.parse(list(arguments))
    assert expected in str(error.value) and "\n" not in str(error.value)
