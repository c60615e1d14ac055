"""A teacher's states from the cache give what the teacher itself gives, for every method."""

import pytest
import runs
import torch

from hf_dskd import UserError
from hf_dskd.teacher.cache import CachedTeacher
from hf_dskd.teacher.load import Teacher


# One of each kind of objective: nothing after the source of states can tell where they are from.
CASES = ("kd", "dskd_cma_ga", "dskd_eta", "teacher_space", "uld", "min_edit", "alm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


class RoundedTeacher(Teacher):
    """A teacher whose states have the cache's precision."""

    def __call__(self, *args):
        return super().__call__(*args).bfloat16()


def cache_of(folder, settings):
    # The teacher of `kd` and `dskd` has the student's tokenizer.
    same = settings["method"] in ("kd", "dskd")
    return str(folder / ("same" if same else "other"))


@pytest.mark.parametrize("case", CASES)
def test_losses_and_weights_are_the_same(case, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_dskd.teacher.source.Teacher", RoundedTeacher)
    results = []
    for cache in (None, cache_of(folder, runs.CASES[case])):
        run = runs.trainer(
            tmp_path / str(cache is None),
            teacher_cache=cache,
            max_steps=2,
            optim="sgd",
            learning_rate=0.1,
            eval_dataset=runs.tiny.dataset(20).select(range(16, 20)),
            **runs.CASES[case],
        )
        assert isinstance(run.teacher, CachedTeacher) == (cache is not None)
        run.train()
        evaluated = run.evaluate()
        names = [name for name in run.state.log_history[0] if name.endswith(("loss", "rate", "agreement"))]
        losses = {name: value for name, value in evaluated.items() if name.endswith(("loss", "byte"))}
        results.append((torch.tensor(runs.history(run, *names)), losses, runs.weights(run)))
    (live, live_losses, live_weights), (cached, cached_losses, cached_weights) = results
    torch.testing.assert_close(cached, live, rtol=1e-4, atol=1e-5)
    assert cached_losses == pytest.approx(live_losses, rel=1e-4)
    for name, value in live_weights.items():
        torch.testing.assert_close(cached_weights[name], value, rtol=1e-4, atol=1e-5)


def test_a_filled_cache_needs_no_teacher(folder, tmp_path, monkeypatch):
    settings = {"teacher_cache": cache_of(folder, {"method": "dskd_cma"}), "method": "dskd_cma"}
    runs.trainer(tmp_path / "first", **settings)

    def load(*args):
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr("hf_dskd.training.pair.load_teacher_model", load)
    run = runs.trainer(tmp_path / "second", **settings)
    run.train()
    with pytest.raises(AssertionError, match="the teacher was loaded"):
        runs.trainer(tmp_path / "more", rows=24, **settings)


def test_data_to_evaluate_on_later_is_added(tmp_path):
    run = runs.trainer(tmp_path / "run", method="dskd_cma", teacher_cache=str(tmp_path / "cache"), rows=4)
    before = len(run._preparation.cache)
    assert run.evaluate(runs.tiny.dataset(8).select(range(4, 8)))["eval_s2t_kd_loss"] > 0
    assert len(run._preparation.cache) > before


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_read_the_cache(workers, folder, tmp_path):
    run = runs.trainer(
        tmp_path / "run",
        method="dskd_cma",
        teacher_cache=cache_of(folder, {"method": "dskd_cma"}),
        dataloader_num_workers=workers,
    )
    batch = next(iter(run.get_train_dataloader()))
    expected = run._preparation.cache.batch([run.train_dataset[int(i)] for i in batch["example_ids"]])
    assert torch.equal(batch["teacher_states"], expected) and expected.abs().sum() > 0


def test_a_collator_of_ones_own_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"teacher_cache='.*' and a data_collator of your own"):
        runs.trainer(tmp_path, method="dskd_cma", teacher_cache=str(tmp_path / "cache"), data_collator=list)


def test_an_evaluation_split_may_be_called_train(tmp_path):
    held_out = {"train": runs.tiny.dataset(20).select(range(16, 20))}
    run = runs.trainer(
        tmp_path / "run", method="dskd_cma", teacher_cache=str(tmp_path / "cache"), eval_dataset=held_out
    )
    cache = run._preparation.cache
    assert not cache.missing(run.train_dataset) and not cache.missing(run.eval_dataset["train"])
