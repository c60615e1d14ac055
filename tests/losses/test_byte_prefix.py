"""The byte-prefix target: what it is on vocabularies that can be counted out, and what is learnt from it."""

import itertools
import math
import os
import random
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertTokenizerFast, PreTrainedTokenizerFast
from warm import ranks_of

from hf_dskd import UserError
from hf_dskd.alignment.byte_prefix import byte_tables, text_bytes
from hf_dskd.data.tokenization import encode_response
from hf_dskd.losses.byte_prefix import BytePrefix, Quality, bpm, completed
from hf_dskd.losses.divergences import divergence_function
from hf_dskd.losses.states import ResponseStates
from hf_dskd.methods import DIVERGENCES
from hf_dskd.models.causal_lm import LMHead
from hf_dskd.report.record import RunRecord
from hf_dskd.training.distiller import sample_rows


SHARED = Path(__file__).resolve().parents[3] / "shared"
BYTES, PIECES = tiny.byte_level_tokenizer(), tiny.sentencepiece_tokenizer()
SMALL_BYTES, SMALL_PIECES = tiny.byte_level_tokenizer(300), tiny.sentencepiece_tokenizer(390)
PAIRS = {
    "bytes from pieces": (BYTES, PIECES),
    "pieces from bytes": (PIECES, BYTES),
    "few bytes from many": (SMALL_BYTES, BYTES),
    "many bytes from few": (BYTES, SMALL_BYTES),
    "few pieces from many": (SMALL_PIECES, PIECES),
    "many pieces from few": (PIECES, SMALL_PIECES),
}


def row_of(text, student, teacher, max_length=4000):
    prompts = {"student": [0], "teacher": [0]}
    return encode_response(prompts, {"student": student, "teacher": teacher}, text, max_length, example_id=0)


def states(row, prefix, logits, plan=None, weight=None):
    """Response tokens of a row whose hidden states are their logits, or make them with a `weight`."""
    ids = torch.tensor(row[f"{prefix}input_ids"][row[f"{prefix}prompt_length"] :])
    hidden, weight = logits.unsqueeze(0), torch.eye(logits.shape[1], dtype=logits.dtype) if weight is None else weight
    mask = torch.ones(1, len(ids), dtype=torch.bool)
    head = LMHead(weight)
    return ResponseStates(hidden, hidden, hidden, ids.unsqueeze(0), mask, None, plan=plan, head=head)


def objective(student, teacher, **settings):
    sides = {"student": SimpleNamespace(rows=len(student)), "teacher": SimpleNamespace(rows=len(teacher))}
    defaults = {"method": "bpm", "teacher_temperature": 1.0, "loss_memory_mb": 512.0}
    args = runs.config("unused", **{**defaults, **settings})
    return BytePrefix(args, SimpleNamespace(tokenizers=(student, teacher), **sides), torch.device("cpu"))


def targets(text, student, teacher, logits=None, weight=None, **settings):
    """The whole targets `[R_s, C]` of a text, which tokens have one, and the row, under random predictions."""
    row = row_of(text, student, teacher)
    made = objective(student, teacher, **settings)
    tables = byte_tables(student, teacher, made.config.bpm_segmentation)
    if logits is None:
        logits = 2 * torch.randn(len(row["teacher_byte_ends"]), len(teacher), dtype=torch.float64)
    kept = []
    add_up = made.add_up

    def noted(*given):
        target, inside = add_up(*given)
        kept.append(target.clone())
        return target, inside

    made.add_up = noted
    plan = tables.plan([row], len(row["input_ids"]))[:, row["prompt_length"] :]
    own = torch.zeros(len(row["byte_ends"]), 1)
    found = made.targets(states(row, "", own, plan, own[:1]), states(row, "teacher_", logits, None, weight))
    made.add_up = add_up
    whole = torch.cat(kept) if kept else torch.zeros(0, made.columns)
    return whole, found, row, made


def fuzzed(seed):
    rng = random.Random(seed)
    parts = [*tiny.TEXTS, "\n", "\n\n    ", "   ", "\t", "ñ", "e\u0301", "👩", "aaaaa", "1234", "return", "--", "\r\n"]
    return "".join(rng.choice(parts)[: rng.randint(1, 12)] for _ in range(rng.randint(1, 12))) + "."


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# ---- The target


@pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["bytes", "pieces"])
def test_one_vocabulary_gives_the_teachers_own_distribution(tokenizer):
    text = "The cat sat on the mat.\n    def add(a, b):\n\n  東京 12"
    row = row_of(text, tokenizer, tokenizer)
    logits = torch.randn(len(row["byte_ends"]), len(tokenizer), dtype=torch.float64)
    whole, found, row, made = targets(text, tokenizer, tokenizer, logits)
    expected = logits.masked_fill(~made.text, -torch.inf).softmax(-1)
    there = found.there
    # All but the end.
    assert there[:-1].all() and not there[-1]
    torch.testing.assert_close(whole[there][:, : made.size], expected[there])
    assert not whole[there][:, made.size :].any()


@pytest.mark.parametrize("segmentation", ["student", "longest"])
@pytest.mark.parametrize("pair", PAIRS)
def test_mass_is_all_there(pair, segmentation):
    for number in range(12):
        whole, found, *_ = targets(fuzzed(number), *PAIRS[pair], bpm_segmentation=segmentation)
        there = found.there
        torch.testing.assert_close(whole[there].sum(1), torch.ones(int(there.sum()), dtype=whole.dtype))
        assert (found.mass[there].sum(1) <= 1 + 1e-6).all()
        # The end has no target.
        assert not there[-1]


@pytest.mark.parametrize("teacher", [BYTES, SMALL_PIECES], ids=["bytes", "pieces"])
def test_longest_is_the_longest_piece_that_is_no_byte(teacher):
    pieces = PIECES.get_vocab()
    named = {piece.replace("▁", " ").encode(): token for piece, token in pieces.items() if not piece.startswith("<0x")}
    special = set(PIECES.all_special_ids)
    alone = {bytes([byte]): pieces[f"<0x{byte:02X}>"] for byte in range(256)}
    made = objective(PIECES, teacher, bpm_segmentation="longest").tables
    for token, data in text_bytes(teacher).items():
        expected = alone[data[:1]]
        for size in range(1, len(data) + 1):
            if named.get(data[:size], 0) not in {0, *special}:
                expected = named[data[:size]]
        assert made["column"][made["offset"][token]] == expected, data
    assert pieces["("] != pieces["<0x28>"]


def test_a_teachers_parenthesis_is_the_students():
    text = "add(a, b)"
    logits = torch.full((len(row_of(text, PIECES, BYTES)["teacher_byte_ends"]), len(BYTES)), -20.0)
    logits[:, BYTES.get_vocab()["("]] = 20
    whole, *_ = targets(text, PIECES, BYTES, logits, bpm_segmentation="longest")
    assert whole[0, PIECES.get_vocab()["("]] > 0.99
    assert whole[0, PIECES.get_vocab()["<0x28>"]] < 0.01


def test_added_tokens_of_models_that_cut_alike_are_compared_by_their_bytes():
    student, teacher = tiny.byte_level_tokenizer(), tiny.byte_level_tokenizer()
    student.add_tokens(["<one>"])
    teacher.add_tokens(["<two>", "abc"])
    tables = byte_tables(student, teacher, "student")
    assert tables.identical
    columns, offsets = tables.tensors["column"], tables.tensors["offset"]
    added = teacher.get_vocab()
    # The same id is another text, and the other id is beyond the student's vocabulary.
    for piece in ("<two>", "abc"):
        expected = student(piece, add_special_tokens=False)["input_ids"][0]
        assert columns[offsets[added[piece]]] == expected
    same = [token for token, data in tables.teacher_bytes.items() if tables.student_bytes.get(token) == data]
    assert [int(columns[offsets[token]]) for token in same] == same


def test_an_added_token_has_the_probability_of_all_that_it_covers():
    student = tiny.byte_level_tokenizer()
    student.add_tokens(["cat sat"])
    text = "The cat sat on the mat."
    row = row_of(text, student, BYTES)
    place = row["input_ids"][row["prompt_length"] :].index(student.get_vocab()["cat sat"])
    ids = row["teacher_input_ids"][row["teacher_prompt_length"] :]
    # The teacher is sure of every token but the one that ends with it.
    logits = torch.full((len(ids), len(BYTES)), -30.0, dtype=torch.float64)
    logits[torch.arange(len(ids)), ids] = 30
    last = row["teacher_byte_ends"].index(len("The cat sat"))
    logits[last, BYTES.get_vocab()["."]] = 30
    _, found, *_ = targets(text, student, BYTES, logits)
    assert byte_tables(student, BYTES, "student").identical and found.there[place]
    assert found.own[place] == pytest.approx(0.5, abs=1e-6)


def letters(*merges):
    """A tokenizer of a, b and c, and of what is merged of them."""
    made = [("".join(pair)) for pair in merges]
    vocabulary = {piece: place for place, piece in enumerate(["<end>", "a", "b", "c", *made])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def counted(student, teacher, path, logits, start, read, depth=4):
    """
    The distribution over the student's next token, from all that the teacher could write from its token `start` on, up
    to `depth` tokens, given that its first token begins with `read` and goes on.

    Off the text's path its predictions are of no account, and random.
    """
    names = {token: piece for piece, token in teacher.get_vocab().items() if piece != "<end>"}
    found, elsewhere = {}, {}
    for written in itertools.product(names, repeat=depth):
        first = names[written[0]]
        if not first.startswith(read) or len(first) == len(read):
            continue
        probability = 1.0
        for place, token in enumerate(written):
            on_path = list(written[:place]) == path[start : start + place] and start + place < len(logits)
            random_row = elsewhere.setdefault(written[:place], torch.randn(len(teacher), dtype=torch.float64))
            rows = logits[start + place] if on_path else random_row
            probability *= float(rows[list(names)].softmax(-1)[list(names).index(token)])
        text = "".join(names[token] for token in written)[len(read) :]
        token = student(text, add_special_tokens=False)["input_ids"][0]
        found[token] = found.get(token, 0.0) + probability
    whole = torch.zeros(len(student), dtype=torch.float64)
    for token, probability in found.items():
        whole[token] = probability
    return whole / whole.sum()


@pytest.mark.parametrize(
    "student_merges, teacher_merges, text",
    [
        # Tokens that end alike; the student's longer; the teacher's longer; across each other.
        ([], [], "abcab"),
        ([("a", "b")], [], "abab"),
        ([("a", "b"), ("ab", "c")], [("b", "c")], "abab"),
        ([], [("b", "c"), ("b", "b")], "abcbbc"),
        ([("a", "b")], [("c", "c"), ("c", "a")], "abccab"),
    ],
)
def test_target_is_what_all_continuations_add_up_to(student_merges, teacher_merges, text):
    student, teacher = letters(*student_merges), letters(*teacher_merges)
    row = row_of(text, student, teacher)
    logits = torch.randn(len(row["teacher_byte_ends"]), len(teacher), dtype=torch.float64)
    # An end of the text would be one more continuation.
    logits[:, 0] = -1e9
    whole, _, row, _ = targets(text, student, teacher, logits, bpm_top_k=2)
    path = row["teacher_input_ids"][1:]
    starts = [0, *row["teacher_byte_ends"]]
    compared = 0
    for place, begin in enumerate([0, *row["byte_ends"]][: len(row["byte_ends"]) - 1]):
        at = max(at for at, start in enumerate(starts[:-2]) if start <= begin)
        read = text[starts[at] : begin]
        # Where another token than the text's could become a longer one, what follows it off the path would decide.
        if text[begin] == "a" or not student_merges:
            expected = counted(student, teacher, path[:-1], logits, at, read)
            torch.testing.assert_close(whole[place][: len(student)], expected, rtol=1e-6, atol=1e-9)
            compared += 1
    assert compared >= 2


# ---- Against the prototype


def prototype():
    """The definition that the method was measured with, where it lies beside this checkout."""
    path = SHARED / "reference" / "byte_prefix_prototype.py"
    if not path.is_file():
        pytest.skip("the prototype is not beside this checkout")
    source = path.read_text().replace(
        "hf_dskd.data.tokenization import token_bytes", "hf_dskd.data.tokens import token_bytes"
    )
    found = {}
    exec(compile(source, str(path), "exec"), found)
    return found["Converter"]


@pytest.mark.parametrize("pair", ["bytes from pieces", "few bytes from many", "many bytes from few"])
def test_targets_are_the_prototypes(pair, monkeypatch):
    converter = prototype()
    monkeypatch.setattr("hf_dskd.losses.byte_prefix.NEXT_TOKENS", 20)
    student, teacher = PAIRS[pair]
    asked, exact, linked = converter(student, teacher, topw=20, open_min=0.0), 0, list[float]()
    tables, distances = byte_tables(student, teacher, "student"), []
    for text in (fuzzed(number) for number in range(6)):
        row = row_of(text, student, teacher)
        ids = torch.tensor(row["teacher_input_ids"][1:])
        # A teacher that has some ideas, the text's own among them.
        ideas = torch.randint(3, len(teacher), (len(ids), 60))
        logits = torch.full((len(ids), len(teacher)), -40.0, dtype=torch.float64)
        logits = logits.scatter(1, ideas, 2 * torch.randn(ideas.shape).double())
        logits[torch.arange(len(ids)), ids] = 4.0
        whole, found, row, made = targets(text, student, teacher, logits)
        expected = asked.row({**row, "completion": text}, logits.softmax(-1).numpy())
        for place, (columns, (mass, events, facts)) in enumerate(zip(tables.columns_of(row), expected)):
            if facts["eos"] or not found.there[place]:
                continue
            reference = torch.zeros(made.columns, dtype=torch.float64)
            reference[: made.size] = torch.tensor(mass[: made.size])
            # The end of the sequence is the text's to teach here.
            reference[student.eos_token_id] = 0
            for data, share in events.items():
                reference[made.size + 1 + tables.open.index(data)] += share
            distances.append(float((reference / reference.sum() - whole[place]).abs().sum()))
            assert facts["c"] == columns[1]
            # At a link the prototype asks the tokenizer for each of the likeliest tokens, and here a token is one
            # where it ends with what follows, or where the kind of characters changes.
            assert columns[4] or distances[-1] < 1e-5, (text, place)
            exact += not columns[4]
            linked += distances[-1:] if columns[4] else []
    assert len(linked) >= 50
    assert sum(linked) / len(linked) < 0.008 and max(linked) < 0.2
    assert exact >= 30 or pair != "few bytes from many"


# ---- The loss

forward_kl = divergence_function("forward_kl")


def batch(rows=5, vocabulary=30, events=2, dtype=torch.float64):
    """Logits, columns and mass of `rows`, and what is text and what part of an event."""
    text = torch.ones(vocabulary + 3, dtype=torch.bool)
    text[[0, vocabulary, vocabulary + 1, vocabulary + 2]] = False
    members = torch.tensor([4, 5, 6, 7])
    opens = torch.tensor([[True, True, True, True], [False, False, True, True]])[:events]
    columns = torch.stack([torch.randperm(vocabulary - 1)[:6] + 1 for _ in range(rows)])
    columns = torch.cat([columns, vocabulary + 1 + torch.arange(events).expand(rows, -1)], 1)
    mass = torch.rand(columns.shape, dtype=dtype)
    mass = 0.8 * mass / mass.sum(1, keepdim=True)
    logits = (3 * torch.randn(rows, vocabulary + 3, dtype=dtype)).requires_grad_()
    return logits, columns, mass, vocabulary, text, members, opens


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "adaptive_kl"])
def test_loss_is_the_divergence_of_the_coarser_partition(name):
    logits, columns, mass, size, text, members, opens = batch(events=0)
    divergence = divergence_function(name)
    value = sum(bpm(logits, columns, mass, size, text, members, opens, divergence))
    of_text = logits.masked_fill(~text, -torch.inf).log_softmax(-1)
    told = of_text.gather(1, columns)
    coarse = torch.cat([told, torch.log1p(-told.exp().sum(1, keepdim=True))], 1)
    expected = divergence(coarse, torch.cat([mass, 1 - mass.sum(1, keepdim=True)], 1).log())
    expected = expected - (logits.softmax(-1) * text).sum(1).log()
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    slopes = [torch.autograd.grad(part.sum(), logits, retain_graph=True)[0] for part in (value, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-6)


def test_gradient_of_an_event_is_that_of_its_probability():
    logits, columns, mass, size, text, members, opens = batch()
    value = sum(bpm(logits, columns, mass, size, text, members, opens, forward_kl))
    (slope,) = torch.autograd.grad(value.sum(), logits)
    q = logits.softmax(-1)
    of_text = q * text / (q * text).sum(1, keepdim=True)
    points, events = columns[:, :-2], mass[:, -2:]
    told = of_text.gather(1, points)
    parts = torch.stack([of_text[:, members[part]].sum(1) for part in opens], 1)
    rest = 1 - mass.sum(1)
    plain = -(mass[:, :-2] * told.log()).sum(1) - (events * parts.log()).sum(1) - rest * (1 - told.sum(1)).log()
    plain = plain - (q * text).sum(1).log()
    torch.testing.assert_close(slope, torch.autograd.grad(plain.sum(), logits)[0], rtol=1e-5, atol=1e-7)


def test_a_student_that_is_right_in_every_part_is_left_as_it_is():
    logits, columns, mass, size, text, members, opens = batch()
    q = logits.detach().masked_fill(~text, -torch.inf).softmax(-1)
    target = completed(columns, mass, q, size, members, opens)
    torch.testing.assert_close(target.sum(1), torch.ones(len(target), dtype=target.dtype))
    right = target.clamp(min=1e-300).log().masked_fill(~text, -50).requires_grad_()
    points = columns[:, :-2]
    value, _ = bpm(right, points, target.gather(1, points), size, text, members, opens[:0], forward_kl)
    (slope,) = torch.autograd.grad(value.sum(), right)
    assert value.abs().max() < 1e-6 and slope.abs().max() < 1e-6


def test_the_end_and_what_has_no_target_are_the_texts(tmp_path):
    run = runs.trainer(tmp_path, method="bpm", rows=4, kd_rate=1.0)
    batched = runs.first_batch(run)
    views = run.distiller.views(run.model, batched)
    found = run.distiller.objective.targets(views.student, views.teacher)
    terms = run.distiller.terms(views, run.step(False))
    there = views.student.padded(found.there.float())
    assert not (there * views.student.silent).any()
    assert terms.sums["target_rows"].tolist() == there.sum(1).tolist()
    alone = views.student.padded(terms.ce_rows) * (1 - there)
    assert (terms.sums["kd"] > alone.sum(1) - 1e-4).all()
    # Nothing but the text where there is no target at all.
    views.student.plan[..., 0] = -1
    terms = run.distiller.terms(views, run.step(False))
    torch.testing.assert_close(terms.sums["kd"], terms.sums["ce"])


# ---- Before training


def test_temperature_is_that_of_the_text():
    made = objective(BYTES, SMALL_BYTES, teacher_temperature=None)
    weight = torch.randn(len(SMALL_BYTES), 8)
    row = row_of("The cat sat. " * 200, BYTES, SMALL_BYTES, 9000)
    hidden = 2 * torch.randn(len(row["teacher_byte_ends"]), 8)
    row["teacher_input_ids"][1:] = (hidden @ weight.T / 1.7).softmax(-1).multinomial(1)[:, 0].tolist()
    own = torch.zeros(len(row["byte_ends"]), 1)
    plan = torch.full((1, len(own), 5), -1, dtype=torch.int32)
    sample = [(states(row, "", own, plan, own[:1]), states(row, "teacher_", hidden, None, weight))]
    with pytest.raises(UserError, match=r"makes no right target of this pair \(the target has .* over 0\.0% of the"):
        made.fit(sample)
    assert 1.6 < made.teacher_temperature < 1.8


def fitted_by_rank(refused):
    """The temperature, or the refusal, on this rank, where each would find another."""
    rank = int(os.environ["RANK"])

    def fit(made, sample):
        if refused and not rank:
            raise UserError("refused on the main process")
        return {"teacher_temperature": 1.5 + rank}

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(BytePrefix, "fit", fit)
        try:
            return runs.trainer(folder, method="bpm", rows=4).distiller.objective.teacher_temperature
        except UserError as error:
            return str(error)


@pytest.mark.parametrize("refused, expected", [(False, 1.5), (True, "refused on the main process")])
def test_all_processes_have_what_the_main_one_fitted(refused, expected, tmp_path):
    assert ranks_of("test_byte_prefix", f"fitted_by_rank({refused})", tmp_path) == [expected, expected]


def test_a_resumed_run_keeps_its_temperature(tmp_path, monkeypatch):
    settings = {"method": "bpm", "rows": 4, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    run = runs.trainer(tmp_path, **settings)
    run.train()
    fitted = run.distiller.objective.fitted
    assert fitted == {"teacher_temperature": run.distiller.objective.teacher_temperature}
    assert [log["teacher_temperature"] for log in run.state.log_history if "teacher_temperature" in log] == [
        *fitted.values()
    ]
    record = run.run_record({}, {}, None)
    record.write(tmp_path / "result.json")
    assert RunRecord.read(tmp_path / "result.json").fitted == fitted
    (tmp_path / "result.json").unlink()
    monkeypatch.setattr(BytePrefix, "fit", lambda made, sample: {"teacher_temperature": 3.25})
    again = runs.trainer(tmp_path, **settings)
    assert again.distiller.objective.teacher_temperature == 3.25
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert again.distiller.objective.fitted == fitted
    assert again.distiller.objective.teacher_temperature == fitted["teacher_temperature"]
    other = runs.trainer(tmp_path / "other", **settings, teacher_temperature=2.0)
    other.distiller.objective.take(fitted)
    assert other.distiller.objective.teacher_temperature == 2.0


def test_a_target_that_is_worse_than_the_teacher_is_refused(caplog):
    Quality(1.04, 1.0, 0.9).check()
    for wrong in (Quality(1.2, 1.0, 0.9), Quality(0.1, 1.0, 0.0), Quality(float("nan"), 1.0, 0.9)):
        with pytest.raises(UserError, match=r"method='bpm' makes no right target of this pair"):
            wrong.check()
    with pytest.raises(UserError, match=r"over 0\.0% of the student's tokens"):
        Quality(0.1, 1.0, 0.0).check("longest")
    assert not caplog.messages
    Quality(1.2, 1.0, 0.9).check("longest")
    Quality(1.0, 1.0, 0.4).check()
    wrong, few = caplog.messages
    assert "'longest' makes a wrong target of this pair" in wrong and "right is at most 1.05 times that" in wrong
    assert "a target for few of the student's tokens" in few


@pytest.mark.parametrize("pair", ["one vocabulary", "bytes from pieces"])
def test_quality_compares_the_same_bytes(pair):
    student, teacher = PAIRS.get(pair, (BYTES, BYTES))
    text = "The cat sat on the mat.\n    return 12"
    row = row_of(text, student, teacher)
    made = objective(student, teacher)
    logits = 3 * torch.randn(len(row["teacher_byte_ends"]), len(teacher), dtype=torch.float64)
    logits = logits.masked_fill(torch.tensor([token not in text_bytes(teacher) for token in range(len(teacher))]), -30)
    plan = byte_tables(student, teacher, "student").plan([row], len(row["input_ids"]))[:, row["prompt_length"] :]
    # What has no target is left out, wherever it lies and whatever the teacher thinks of it.
    left_out = [3, 4, 8]
    plan[0, left_out, 0] = -1
    own = torch.zeros(len(row["byte_ends"]), 1)
    found = made.quality([(states(row, "", own, plan, own[:1]), states(row, "teacher_", logits))])
    losses = torch.nn.functional.cross_entropy(
        logits, torch.tensor(row["teacher_input_ids"][row["teacher_prompt_length"] :]), reduction="none"
    )
    by_byte, begin = [], 0
    for loss, end in zip(losses.tolist(), row["teacher_byte_ends"]):
        by_byte += [loss / (end - begin)] * (end - begin) if end > begin else []
        begin = end
    there = [place for place in range(len(plan[0])) if plan[0, place, 0] >= 0]
    starts = [0, *row["byte_ends"]]
    kept = [by_byte[at] for place in there for at in range(starts[place], starts[place + 1])]
    assert found.teacher_bits == pytest.approx(sum(kept) / len(kept) / math.log(2), rel=1e-6)
    if pair == "one vocabulary":
        assert found.target_bits == pytest.approx(found.teacher_bits, rel=1e-5)


def test_a_sample_is_from_all_over_the_text():
    rows = [{"place": place, "teacher_byte_ends": [0] * 100} for place in range(1000)]
    places = [row["place"] for row in sample_rows(rows)]
    assert len(places) == 11 and len(set(places)) == 11
    assert min(places) < 300 and max(places) > 700
    assert places == [row["place"] for row in sample_rows(rows)]
    assert {row["place"] for row in sample_rows(rows[:5])} == set(range(5))


def test_what_spells_no_bytes_is_refused(tmp_path):
    words = tmp_path / "vocab.txt"
    words.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\ncat\n##s\n")
    tokenizer = BertTokenizerFast(str(words), eos_token="[SEP]")
    with pytest.raises(UserError, match="method='bpm' compares tokens by the bytes that they spell"):
        runs.trainer(tmp_path / "run", method="bpm", teacher=tiny.qwen2(8), teacher_processing_class=tokenizer)
    with pytest.raises(UserError, match="bpm_top_k=400 is above what the student's 400 tokens have"):
        runs.trainer(tmp_path / "run", method="bpm", bpm_top_k=400)


def test_a_plan_of_two_answers_is_that_of_each():
    both = [row_of(text, BYTES, PIECES) for text in ("The cat sat.", "on the mat\n  and looked")]
    tables = byte_tables(BYTES, PIECES, "student")
    joined = {"response_bytes": sum(row["response_bytes"] for row in both)}
    for prefix in ("", "teacher_"):
        joined[f"{prefix}input_ids"] = [token for row in both for token in row[f"{prefix}input_ids"]]
        starts = [1, len(both[0][f"{prefix}input_ids"]) + 1]
        joined[f"{prefix}spans"] = [
            edge for start, row in zip(starts, both) for edge in (start, start + len(row[f"{prefix}byte_ends"]))
        ]
        joined[f"{prefix}byte_ends"] = [
            end + offset
            for row, offset in zip(both, (0, both[0]["response_bytes"]))
            for end in row[f"{prefix}byte_ends"]
        ]
    first, second = (tables.columns_of(row) for row in both)
    before = len(both[0]["teacher_byte_ends"])
    moved = [[columns[0] + before if columns[0] >= 0 else -1, *columns[1:]] for columns in second]
    assert tables.columns_of(joined) == first + moved


@pytest.mark.parametrize("student, teacher", [("gpt2", "mistral"), ("mistral", "gpt2"), ("tinyllama", "gpt2")])
def test_real_tokenizers(student, teacher):
    text = "def größe(x):\n    return {'a': x + 1}  # 東京 👩\n\n\tThe end, 12.50 €."
    student, teacher = tiny.real_tokenizer(student), tiny.real_tokenizer(teacher)
    rows = len(row_of(text, student, teacher)["teacher_byte_ends"])
    whole, found, *_ = targets(text, student, teacher, torch.randn(rows, 8), torch.randn(len(teacher), 8))
    there = found.there
    assert there.sum() > 0.8 * len(there)
    torch.testing.assert_close(whole[there].sum(1), torch.ones(int(there.sum())), rtol=1e-5, atol=1e-5)
