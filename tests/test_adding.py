"""Divergence, alignment, matching and methods that are added from outside: a row each, and nothing else knows."""

import pytest
import runs
import tiny
import torch
from torch import nn

from hf_dskd.analysis.heatmap import cross_attention, plot_attention
from hf_dskd.losses.likelihood import ChunkLikelihood, chunk_log_likelihoods
from hf_dskd.losses.logits import Logits
from hf_dskd.losses.matching import Features, Matching
from hf_dskd.losses.terms import TERMS, Term
from hf_dskd.methods import ALIGNMENTS, DIVERGENCES, MATCHINGS, METHODS, Alignment, Divergence, Method
from hf_dskd.methods import Matching as MatchingRow


def renyi(student_logits, teacher_logits):
    """Rényi divergence of order ½."""
    log_p, log_q = (values.log_softmax(-1) for values in (teacher_logits, student_logits))
    return -2 * (0.5 * (log_p + log_q)).logsumexp(-1)


def first_token(student, teacher, queries, keys):
    """Every position looks at the first one."""
    weights = ALIGNMENTS["identity"].load()(student, teacher, None, None)
    return type(weights)(
        *(
            torch.zeros_like(matrix).index_fill(2, torch.tensor(0), 1.0) * mask.unsqueeze(2)
            for matrix, mask in ((weights.t2s, student.mask), (weights.s2t, teacher.mask))
        )
    )


class Means(Matching):
    """A linear critic that tells queries from keys by their mean difference."""

    def __init__(self, config, size, seed, device):
        super().__init__(config, size, seed, device)
        self.critic = nn.Linear(size, 1).to(device)

    def __call__(self, student, teacher, queries, keys, seed):
        scores = self.critic(student.packed(queries)).squeeze(-1)
        return student.per_example(scores), Features.of(student, teacher, queries, keys)

    def critic_loss(self, features, query_count, key_count, seed):
        queries, keys = (
            self.critic(rows[mask]).sum() / count
            for rows, mask, count in (
                (features.queries, features.query_mask, query_count),
                (features.keys, features.key_mask, key_count),
            )
        )
        return (queries - keys).tanh(), {"guessed": (queries * query_count).detach()}


class SquaredError(Logits):
    """Of the logits that both vocabularies have a place for."""

    def compare(self, step):
        def rows(student_logits, teacher_logits, targets, paired):
            size = min(student_logits.shape[-1], teacher_logits.shape[-1])
            difference = student_logits[..., :size] - teacher_logits[..., :size].detach()
            return difference.square().mean(-1) * paired

        return rows


GAP = Term("gap", "teacher_tokens", title="gap of chunks", rate="kd_rate", better="lower", from_teacher=True)


class ChunkGap(ChunkLikelihood):
    """|log p(c) − log q(c)| of the chunks, under a name of its own."""

    terms = (TERMS["ce"], TERMS["correct"], GAP)

    def compare(self, student, teacher, own, theirs):
        size = teacher.chunks.shape[1]
        ours, other = (
            chunk_log_likelihoods(states.padded(-rows["ce"]), states.chunks, size)
            for states, rows in ((student, own), (teacher, theirs))
        )
        return (ours - other.detach()).abs().sum(1)


ROWS = {
    "divergence": (DIVERGENCES, "renyi", Divergence("−2 log Σ √(p q)", renyi)),
    "alignment": (ALIGNMENTS, "first_token", Alignment("the first token", first_token)),
    "matching": (MATCHINGS, "means", MatchingRow("E_q[w q] − E_k[w k]", Means, "", "tester", "tells means apart")),
    "logits": (
        METHODS,
        "squared",
        Method("position", ("logits",), "squared error", "by hand", SquaredError),
    ),
    "likelihood": (
        METHODS,
        "gap",
        Method("chunks", ("likelihood",), "gap", "by hand", ChunkGap, ("chunks",)),
    ),
}
LOGGED = {"logits": "kd_loss", "likelihood": "gap_loss", "matching": "kq_loss"}


@pytest.mark.parametrize("kind", ROWS)
def test_what_is_added_trains_and_is_shown(kind, tmp_path, monkeypatch):
    table, name, row = ROWS[kind]
    monkeypatch.setitem(table, name, row)
    monkeypatch.setitem(TERMS, "gap", GAP)
    setting = {"logits": "method", "likelihood": "method"}.get(kind, kind)
    settings = {"method": "dskd_cma"} if setting != "method" else {}
    if kind == "alignment":
        settings = {"method": "dskd_clp"}
    run = runs.trainer(
        tmp_path,
        **{**settings, setting: name, "max_steps": 2, "rows": 8, "eval_dataset": tiny.dataset(4)},
        analysis_steps=0,
        analysis_examples=1,
        max_length=96,
    )
    before = runs.weights(run)
    run.train()
    metrics = run.evaluate()
    after = runs.weights(run)
    moved = {part.split(".")[0] for part in after if not torch.equal(before[part], after[part])}
    assert moved == {part.split(".")[0] for part in after}
    log = LOGGED.get(kind, "t2s_kd_loss")
    assert any(log in entry for entry in run.state.log_history) and metrics[f"eval_{log}"] > -1e9

    page = run.write_report().read_text(encoding="utf-8")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert name in page and name in card
    assert (tmp_path / "report" / "curves.png").is_file()
    numbers = (tmp_path / "analysis" / "numbers.jsonl").read_text(encoding="utf-8")
    assert f"gradient_norm_{log.removesuffix('_loss')}" in numbers
    if run.args.method_row.has_alignment:
        plot_attention([cross_attention(run.distiller, run.train_dataset[0])], tmp_path / "one.png")
        assert (tmp_path / "one.png").is_file()
    if kind == "matching":
        assert (tmp_path / "tester.safetensors").is_file()


def test_an_alignment_decides_what_the_student_sees(monkeypatch, tmp_path):
    monkeypatch.setitem(*ROWS["alignment"])
    run = runs.trainer(tmp_path, method="dskd_clp", alignment="first_token", rows=4)
    shown = cross_attention(run.distiller, run.train_dataset[1])
    assert torch.equal(shown.t2s[:, 0], torch.ones(len(shown.t2s))) and not shown.t2s[:, 1:].any()
