"""The benchmark of the loss: both sides compute the same numbers, and what is printed is what was measured."""

import json
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import benchmark_loss as recipe
import measuring
import pytest
import torch

from hf_dskd import UserError
from hf_dskd.kernels import linear_divergence
from hf_dskd.run.arguments import variant


SMALL = ("--shape", "tiny", "--device", "cpu", "--max-length", "48", "--response-tokens", "10")


@pytest.fixture(autouse=True)
def memory_is_kept(monkeypatch):
    """Looking for what could be given back takes most of the time of a small pass."""
    monkeypatch.setattr(measuring, "return_freed_memory", lambda: None)


def small_problem(*arguments):
    """A configuration, and hidden states of the tiny shape for it."""
    args = recipe.parse([*SMALL, *arguments])
    config = recipe.configuration(args, "cpu")
    sizes = (recipe.SHAPES["tiny"], args.batch_size, args.max_length, args.response_tokens)
    return config, recipe.make_problem(*sizes, torch.float32, "cpu", config.method_row.dual_space)


def test_json_comes_last(monkeypatch, capsys):
    monkeypatch.setattr(recipe, "parse", partial(recipe.parse, [*SMALL, "--json"]))
    recipe.main()
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    for name in ("time_ratio", "cpu_time_ratio", "peak_memory_ratio"):
        assert 0 < result[name] < math.inf
    assert result["time_ratio"] == pytest.approx(result["seconds"]["dense"] / result["seconds"]["ours"])
    assert result["peak_memory_ratio"] == pytest.approx(result["peak_mb"]["dense"] / result["peak_mb"]["ours"])
    assert result["max_relative_difference"] < 1e-5
    assert result["response_rows"] == {"student": 40, "teacher": 40}
    settings = result["settings"]
    assert (settings["shape"], settings["method"], settings["divergence"]) == ("tiny", "dskd_cma", "forward_kl")
    assert settings["loss_memory_mb"] == 512 and settings["device"] == "cpu" and settings["repeats"] == 1
    assert result["torch"] == torch.__version__ and result["threads"] >= 1 and result["device_name"]
    text = "\n".join(table)
    for shown in ("seconds", "peak MB", "response rows 40", f"{result['peak_memory_ratio']:.2f}"):
        assert shown in text


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--divergence", "adaptive_kl"),
        ("--spaces", "student"),
        ("--spaces", "teacher"),
        ("--method", "sft"),
        ("--method", "uld"),
        ("--batch-size", "1"),
        ("--repeats", "2", "--loss-memory-mb", "1"),
    ],
    ids=" ".join,
)
def test_both_sides_compute_the_same(arguments):
    result = recipe.benchmark(recipe.parse([*SMALL, *arguments]))
    assert result["max_relative_difference"] < 1e-5, result["max_relative_difference_in"]
    assert min(result[name] for name in ("time_ratio", "cpu_time_ratio", "peak_memory_ratio")) > 0


def test_bfloat16_differs_by_its_rounding():
    result = recipe.benchmark(recipe.parse([*SMALL, "--dtype", "bfloat16"]))
    assert 1e-5 < result["max_relative_difference"] < 0.05


@pytest.mark.parametrize(
    "changes",
    [
        {"kd_temperature": 2.1},
        {"kd_rate": 0.51},
        {"correctness_mask": False},
        {"student_space_divergence": "reverse_kl"},
        {"teacher_space_divergence": "reverse_kl"},
    ],
    ids=str,
)
def test_another_loss_is_seen(changes):
    """Every term has its share: changed in ours alone it shows, the divergence that correctness masks among them."""
    config, problem = small_problem()
    ours = recipe.measure(recipe.our_loss, variant(config, **changes), problem)
    dense = recipe.measure(recipe.dense_loss, config, problem)
    assert recipe.largest_difference(ours, dense)[0] > 1e-3


def test_every_leaf_gets_its_gradient():
    config, problem = small_problem()
    projectors = {f"{layer}.{part}" for layer in ("query", "s2t", "t2s") for part in ("weight", "bias")}
    for loss_of in (recipe.our_loss, recipe.dense_loss):
        one = recipe.measure(loss_of, config, problem)
        assert set(one.gradients) == {"hidden", "head", *projectors}
        assert all(gradient.abs().max() > 0 for gradient in one.gradients.values())
        assert all(leaf.grad is None for leaf in problem.leaves().values())
    frozen = replace(recipe.SHAPES["tiny"], trained_head=False)
    problem = recipe.make_problem(frozen, 2, 16, 5, torch.float32, "cpu", True)
    for loss_of in (recipe.our_loss, recipe.dense_loss):
        assert set(recipe.measure(loss_of, config, problem).gradients) == {"hidden", *projectors}


def test_the_largest_difference():
    def one(loss, **gradients):
        return recipe.Pass(loss, {name.replace("_", "."): g for name, g in gradients.items()}, 1.0, 1.0, 1)

    weight, bias = torch.tensor([[2.0, -4.0]]), torch.tensor([1e-9])
    dense = one(2.0, hidden=torch.tensor([1.0, 8.0]), query_weight=weight, query_bias=bias)
    assert recipe.largest_difference(dense, dense) == (0.0, "loss")
    ours = one(2.1, hidden=torch.tensor([1.0, 8.0]), query_weight=weight, query_bias=bias)
    assert recipe.largest_difference(ours, dense) == (pytest.approx(0.05), "loss")
    ours = one(2.0, hidden=torch.tensor([3.0, 8.0]), query_weight=weight, query_bias=bias)
    assert recipe.largest_difference(ours, dense) == (pytest.approx(2 / 8), "hidden")
    # Rounding where the gradient is nothing is measured by the layer.
    ours = one(2.0, hidden=torch.tensor([1.0, 8.0]), query_weight=weight, query_bias=-bias)
    assert recipe.largest_difference(ours, dense) == (pytest.approx(2e-9 / 4), "query.bias")
    ours = one(2.0, hidden=torch.tensor([1.0, 8.0]), query_bias=bias)
    assert recipe.largest_difference(ours, dense) == (pytest.approx(1.0), "query.weight")
    ours = one(2.0, hidden=torch.tensor([1.0, math.nan]), query_weight=weight, query_bias=bias)
    assert recipe.largest_difference(ours, dense)[1] == "hidden"
    assert recipe.largest_difference(one(1.0, hidden=weight), one(1.0)) == (math.inf, "hidden")


def test_half_of_the_projected_teachers_predictions_are_right():
    config, problem = small_problem("--batch-size", "8")
    sums = recipe.our_terms(config, problem).sums
    assert 0.3 < float(sums["t2s_correct"].sum() / sums["t2s_rows"].sum()) < 0.7


def test_one_seed_one_problem():
    (_, one), (_, other) = small_problem(), small_problem()
    assert one.leaves().keys() == other.leaves().keys()
    for name, leaf in one.leaves().items():
        assert torch.equal(leaf, other.leaves()[name])
    for side in ("student", "teacher"):
        assert torch.equal(getattr(one, side).labels, getattr(other, side).labels)
        # The first token has nothing before it that could predict it.
        assert (getattr(one, side).labels[:, 0] == -100).all()


@pytest.mark.parametrize(
    "batch_size, max_length, mean, shortest, longest",
    [(4, 512, 80, 50, 110), (1, 512, 80, 80, 80), (4, 512, 500, 492, 508), (3, 5, 4, 4, 4), (2, 9, 1, 1, 1)],
)
def test_response_lengths(batch_size, max_length, mean, shortest, longest):
    generator = torch.Generator().manual_seed(0)
    lengths = recipe.response_lengths(batch_size, max_length, mean, generator)
    assert len(lengths) == batch_size and sum(lengths) == mean * batch_size
    assert (min(lengths), max(lengths)) == (shortest, longest)


@pytest.mark.parametrize("arguments", [(), ("--spaces", "student"), ("--spaces", "teacher"), ("--method", "uld")])
@pytest.mark.parametrize("memory", [1, 512])
def test_the_chunks_that_are_reported_were_used(arguments, memory, monkeypatch):
    used = set()

    class Recorded(torch.autograd.Function):
        """In place of the sweep: its plan says what it is going to do."""

        @staticmethod
        def apply(plan, names, states, *tensors):
            used.add((tuple(len(head.weight) for head in plan.heads), min(plan.sizes[0], len(states))))
            return original(plan, names, states, *tensors)

    original = linear_divergence._LinearRows.apply
    monkeypatch.setattr(linear_divergence, "_LinearRows", Recorded)
    config, problem = small_problem("--response-tokens", "20", "--loss-memory-mb", str(memory), *arguments)
    recipe.our_loss(config, problem)
    shape = recipe.SHAPES["tiny"]
    reported = recipe.chunk_rows(config, shape, torch.float32, "cpu", {"student": 80, "teacher": 80})
    assert sorted(rows for _, rows in used) == sorted(reported.values())
    assert max(reported.values()) < 80 if memory == 1 else set(reported.values()) == {80}


def test_a_dense_side_that_is_too_large_is_refused_before_it_starts(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=8e9))
    large = ["--shape", "gpt2-qwen1.5", "--device", "cpu"]
    with pytest.raises(UserError) as error:
        recipe.benchmark(recipe.parse(large))
    assert "8.0 GB are free; lower --batch-size or --max-length" in str(error.value) and "\n" not in str(error.value)
    shape = recipe.SHAPES["gpt2-qwen1.5"]
    for fits in (["--batch-size", "1"], ["--max-length", "128"], ["--method", "sft"]):
        recipe.check_memory(recipe.parse([*large, *fits]), shape, "cpu")


# ---- The command line


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (
            ("--shape", "gpt2-qwen"),
            "--shape 'gpt2-qwen' is unknown: did you mean 'gpt2-qwen1.5'? one of gpt2-qwen1.5,",
        ),
        ((*SMALL, "--method", "alm"), "one of dskd_cma, sft, uld"),
        ((*SMALL, "--divergence", "kl"), "one of forward_kl, "),
        ((*SMALL, "--spaces", "neither"), "one of both, student, teacher"),
        ((*SMALL, "--dtype", "float16"), "one of float32, bfloat16"),
        (("--shape", "tiny", "--device", "tpu"), "one of cpu, cuda"),
        ((*SMALL, "--batch-size", "0"), "--batch-size: '0' must be a whole number above 0"),
        ((*SMALL, "--repeats", "few"), "--repeats: 'few' must be"),
        (("--shape", "tiny", "--max-length", "80"), "--response-tokens 80 leaves no room for a prompt"),
        ((*SMALL, "--bach-size", "2"), "--bach-size"),
        ((), "--shape"),
    ],
)
def test_wrong_arguments(arguments, expected):
    with pytest.raises(UserError) as error:
        recipe.parse(list(arguments))
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_budget_below_one_row_names_the_remedy():
    args = recipe.parse(["--shape", "llama3.2-qwen2.5", "--device", "cpu", "--loss-memory-mb", "1"])
    with pytest.raises(UserError, match="loss_memory_mb=1 can't hold one row"):
        shape = recipe.SHAPES[args.shape]
        recipe.chunk_rows(recipe.configuration(args, "cpu"), shape, torch.float32, "cpu", {"student": 1, "teacher": 1})
