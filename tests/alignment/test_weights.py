"""Attention in tiles against attention by matrices."""

import pytest
import runs
import torch

from hf_dskd.alignment import weights as module
from hf_dskd.alignment.chunked import chunk_mask
from hf_dskd.alignment.cross_model import cross_model_attention
from hf_dskd.alignment.weights import AlignmentWeights, TiledAttention


def make():
    g = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(3, r, 8, generator=g, dtype=torch.float64).requires_grad_() for r in (7, 5))
    values = [torch.randn(3, r, 4, generator=g, dtype=torch.float64).requires_grad_() for r in (5, 7)]
    # The second example has fewer rows, the third none of the teacher's.
    query_mask = torch.arange(7) < torch.tensor([[7], [4], [2]])
    key_mask = torch.arange(5) < torch.tensor([[5], [2], [0]])
    # One chunk of the second example has no token of the teacher within its mask.
    query_chunks = torch.tensor([[0, 0, 1, 2, 2, 3, 3], [0, 1, 1, 2, -1, -1, -1], [0, 1, -1, -1, -1, -1, -1]])
    key_chunks = torch.tensor([[0, 1, 1, 2, 3], [0, 1, -1, -1, -1], [-1] * 5])
    return queries, keys, query_mask, key_mask, query_chunks, key_chunks, values


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("at_once", [1, 3 * 5 * 2, 10**6])
def test_tiles_equal_matrices(chunked, at_once):
    queries, keys, query_mask, key_mask, query_chunks, key_chunks, values = make()
    pairs = chunk_mask(query_chunks, key_chunks) if chunked else None
    whole = AlignmentWeights(*cross_model_attention(queries, keys, query_mask, key_mask, pairs))
    chunks = (query_chunks, key_chunks) if chunked else (None, None)
    tiled = TiledAttention(queries, keys, query_mask, key_mask, *chunks, scores_at_once=at_once)
    assert torch.equal(tiled.has_teacher, whole.has_teacher) and torch.equal(tiled.has_student, whole.has_student)
    assert whole.has_teacher.any() and not whole.has_teacher.all()
    results = []
    for alignment in (whole, tiled):
        outputs = alignment.to_student(values[0]), alignment.to_teacher(values[1])
        loss = sum((output * torch.linspace(1, 2, 4, dtype=torch.float64)).square().sum() for output in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, [queries, keys, *values])])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("method", ["dskd_cma", "dskd_cla"])
def test_a_loss_in_tiles_is_the_same(method, tmp_path, monkeypatch):
    run = runs.trainer(tmp_path, method=method)
    rows = run.data_collator([run.train_dataset[i] for i in range(3)])
    results, kinds, shown = [], [], []
    for above in (module.TILED_ABOVE, 0):
        monkeypatch.setattr(module, "TILED_ABOVE", above)
        views = run.distiller.views(run.model, rows)
        aligned = run.distiller.align(views.student, views.teacher)
        kinds.append(type(aligned))
        shown.append((aligned.t2s, aligned.s2t))
        loss = run.compute_loss(run.model, rows)
        results.append([loss, *torch.autograd.grad(loss, list(run.projectors.parameters()))])
    assert kinds == [AlignmentWeights, TiledAttention]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*shown)
