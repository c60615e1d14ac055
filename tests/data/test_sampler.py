import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.utils.data import BatchSampler

from hf_dskd.data.sampler import EpochSampler, LengthGroupedEpochSampler, example_lengths


def lengths(size=1003, seed=0):
    """Long-tailed, as texts are; the longest of 400 is there once."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(size).log_normal_(4.0, 0.8, generator=generator).long().clamp(5, 399)
    values[size // 2] = 400
    return values


def order(values, group_size=8, seed=0, epoch=0, **options):
    return list(LengthGroupedEpochSampler(values, group_size, seed, lambda: epoch, **options))


def padded(values, indices, batch_size):
    """Padded tokens per real token of whole batches."""
    rows = values[indices[: len(indices) // batch_size * batch_size]].view(-1, batch_size)
    return (rows.max(1).values.sum() * batch_size / rows.sum()).item()


@pytest.mark.parametrize("make", [lambda n, *rest: EpochSampler(n, *rest), lambda n, *rest: grouped(n, *rest)])
def test_order_is_a_function_of_seed_and_epoch_alone(make):
    epochs = [0]
    sampler = make(103, 5, lambda: epochs[-1])
    assert len(sampler) == 103
    torch.manual_seed(1)
    state = torch.get_rng_state()
    orders = []
    for epoch in (0, 1, 1, 0):
        epochs.append(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(103))
        torch.rand(7)
    assert orders[0] == orders[3] and orders[1] == orders[2] and orders[0] != orders[1]
    assert list(make(103, 6, lambda: 0)) != orders[0]
    torch.set_rng_state(state)
    list(sampler)
    assert torch.equal(torch.get_rng_state(), state)


def grouped(size, seed, epoch):
    return LengthGroupedEpochSampler(lengths(size), 4, seed, epoch)


@pytest.mark.parametrize("size", [1, 3, 4, 5, 8, 400, 403])
def test_every_example_once_whatever_the_size(size):
    for values in (lengths(size), torch.full((size,), 7)):
        for epoch in range(3):
            assert sorted(order(values, 4, epoch=epoch)) == list(range(size))


def test_little_is_padded():
    values = lengths()
    random = torch.tensor(list(EpochSampler(len(values), 0, lambda: 0)))
    assert padded(values, random, 8) > 1.6
    assert padded(values, torch.tensor(order(values)), 8) < 1.1
    # More sorted together pads less.
    windows = [padded(values, torch.tensor(order(values, window=window)), 8) for window in (1, 5, 25, 125)]
    assert windows == sorted(windows, reverse=True) and windows[0] > 1.6


def test_longest_is_first_in_every_epoch():
    values = lengths()
    for epoch in range(20):
        assert order(values, epoch=epoch)[0] == values.argmax()
    # And the first group has the longest of the first window, not a chance group around it.
    first = values[order(values)[:8]]
    assert torch.equal(first, first.sort(descending=True).values) and first[-1] > values.float().mean()


def test_groups_are_shuffled():
    """Neither do lengths fall over an epoch, nor do the same examples meet in each."""
    values = lengths(4000)
    differences, first = [], []
    for epoch in range(40):
        means = values[order(values, epoch=epoch)[8:]].view(-1, 8).float().mean(1)
        differences.append(means[:250].mean() - means[250:].mean())
        first.append(frozenset(order(values, epoch=epoch)[8:16]))
    difference = torch.stack(differences)
    # Four standard errors of a mean of 40.
    assert abs(difference.mean()) < 4 * difference.std() / 40**0.5
    assert len(set(first)) == 40


def test_what_fills_no_group_is_last_and_of_any_length():
    values = lengths(1003)  # 125 groups of 8, and 3
    last = torch.stack([values[order(values, epoch=epoch)[-3:]] for epoch in range(400)]).float()
    others = values[values < 400].float()
    assert abs(last.mean() - others.mean()) < 4 * others.std() / 1200**0.5
    assert last.max() < 400


def test_ranks_have_equal_work_and_share_no_example():
    """Through what accelerate does with a sampler: batch i goes to rank i % ranks."""
    values, batch_size, ranks = lengths(1024), 4, 4

    def work(sampler):
        shards = [list(BatchSamplerShard(BatchSampler(sampler, batch_size, False), ranks, rank)) for rank in range(4)]
        assert sorted(index for shard in shards for batch in shard for index in batch) == list(range(1024))
        longest = torch.stack(
            [values[torch.tensor(shard)].max(1).values for shard in shards]
        ).float()  # [ranks, steps]
        return (longest.max(0).values.sum() / longest.mean(0).sum()).item()

    assert work(EpochSampler(1024, 0, lambda: 0)) > 1.2
    assert work(LengthGroupedEpochSampler(values, batch_size * ranks, 0, lambda: 0)) < 1.07


def test_micro_batches_of_one_step_differ_in_length():
    """What is grouped is what ranks hold at a time, not a whole optimizer step: steps of one length would be noisy."""
    values = lengths(4000)
    steps = values[order(values, group_size=8)].view(-1, 4, 8).float().mean(2)  # [steps, micro-batches]
    assert steps.std(1).mean() > 0.5 * values.float().std()


def test_lengths_are_those_of_both_models():
    rows = [{"input_ids": [1] * (3 + i), "teacher_input_ids": [2] * (2 * i + 1), "cut": False} for i in range(25)]
    dataset = Dataset.from_list(rows)
    both = torch.tensor([3 + i + 2 * i + 1 for i in range(25)])
    torch.testing.assert_close(example_lengths(dataset), both)
    # A selection is another view of the same table.
    chosen = [7, 3, 3, 24]
    torch.testing.assert_close(example_lengths(dataset.select(chosen)), both[chosen])
    torch.testing.assert_close(example_lengths(dataset.with_format("torch")), both)
    # Without a teacher.
    torch.testing.assert_close(example_lengths(dataset.remove_columns("teacher_input_ids")), 3 + torch.arange(25))
