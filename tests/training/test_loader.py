import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emoe_med.errors import ConfigError, Fault, VolumeError
from emoe_med.training.loader import (
    ResumableSampler,
    augmentation_keys,
    derived_seed,
    make_loader,
    mixed,
    read_batches,
)


class Rows:
    def __init__(self, length, broken=()):
        self.length, self.broken = length, broken

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.broken:
            fault = Fault("VOL-CRC", "gzip checksum differs", file="scan.nii.gz", row=index + 2)
            raise VolumeError(fault)
        return {"row": index + 2, "pid": os.getpid()}


sizes = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 40), st.integers(0, 9))


@given(sizes, st.integers(0, 3))
def test_an_epoch_takes_each_sample_at_most_once_in_whole_steps(sizes, epoch):
    batch_size, accumulate, ranks, extra, seed = sizes
    length = batch_size * accumulate * ranks + extra
    orders = []
    for rank in range(ranks):
        sampler = ResumableSampler(length, batch_size, seed, accumulate, rank, ranks)
        sampler.epoch = epoch
        batches = list(sampler)
        assert len(batches) == len(sampler) == sampler.steps * accumulate
        assert all(len(batch) == batch_size for batch in batches)
        orders.append([index for batch in batches for index in batch])
    taken = [index for order in orders for index in order]
    assert (
        len(set(taken)) == len(taken) == length // (batch_size * accumulate * ranks) * (batch_size * accumulate * ranks)
    )


@given(sizes, st.integers(0, 5))
def test_samples_of_a_step_do_not_depend_on_the_number_of_ranks(sizes, epoch):
    batch_size, _, ranks, extra, seed = sizes
    length = batch_size * ranks + extra
    alone = ResumableSampler(length, batch_size * ranks, seed)
    shards = [ResumableSampler(length, batch_size, seed, 1, rank, ranks) for rank in range(ranks)]
    for sampler in (alone, *shards):
        sampler.epoch = epoch
    for whole, *parts in zip(alone, *shards, strict=True):
        assert sorted(whole) == sorted(index for part in parts for index in part)


@given(sizes, st.data())
def test_resuming_gives_the_rest_of_the_epoch(sizes, data):
    batch_size, accumulate, _, extra, seed = sizes
    whole = ResumableSampler(batch_size * accumulate + extra, batch_size, seed, accumulate)
    resumed = ResumableSampler(batch_size * accumulate + extra, batch_size, seed, accumulate)
    resumed.cursor = data.draw(st.integers(0, len(whole)))
    assert list(resumed) == list(whole)[resumed.cursor :]


def test_orders_differ_between_epochs_and_seeds():
    orders = set()
    for seed in range(3):
        sampler = ResumableSampler(50, 50, seed)
        for sampler.epoch in range(3):
            orders.add(tuple(next(iter(sampler))))
    assert len(orders) == 9


def test_fewer_samples_than_one_step_are_refused_with_the_numbers():
    with pytest.raises(ConfigError, match=r"7 training samples .* batch_size 4 x accumulate 2 x 1 ranks"):
        ResumableSampler(7, 4, 0, accumulate=2)


def test_augmentation_keys_depend_on_seed_epoch_and_row_alone():
    keys = augmentation_keys(1, 2, torch.tensor([5, 6, 7]))
    assert keys.dtype == torch.int64
    assert torch.equal(augmentation_keys(1, 2, torch.tensor([7, 5])), keys[[2, 0]])
    others = {derived_seed(1, 2, 5), derived_seed(1, 3, 5), derived_seed(2, 2, 5), derived_seed(12, 5)}
    assert len(others) == 4
    assert all(0 <= seed < 2**63 for seed in others)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_the_sampler_s_order_whatever_the_workers(workers):
    sampler = ResumableSampler(23, 4, 3)
    loader = make_loader(Rows(23), sampler, workers)
    for sampler.epoch, sampler.cursor in ((0, 0), (1, 2)):
        expected = [[index + 2 for index in batch] for batch in sampler]
        batches = list(read_batches(loader))
        assert [batch["row"].tolist() for batch in batches] == expected
        assert all((batch["pid"] == os.getpid()).all() == (workers == 0) for batch in batches)


def test_evaluation_reads_a_sorted_listing_mixed_and_whole():
    label = torch.arange(400) // 100  # a listing by class
    order = [sample["row"] - 2 for sample in (mixed(Rows(400))[i] for i in range(400))]
    assert sorted(order) == list(range(400))
    assert order == [sample["row"] - 2 for sample in (mixed(Rows(400))[i] for i in range(400))]
    batches = label[order].view(10, 40)
    assert all(len(batch.unique()) == 4 for batch in batches)


def test_fetching_ahead_does_not_move_the_cursor():
    sampler = ResumableSampler(23, 4, 3)
    next(iter(make_loader(Rows(23), sampler, 2)))
    assert sampler.cursor == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_in_a_worker_arrives_whole(workers):
    loader = make_loader(Rows(8, broken=(4, 5)), 4, workers)
    batches = read_batches(loader)
    assert next(batches)["row"].tolist() == [2, 3, 4, 5]
    with pytest.raises(VolumeError) as caught:
        next(batches)
    assert [(fault.code, fault.row) for fault in caught.value.faults] == [("VOL-CRC", 6), ("VOL-CRC", 7)]
    assert str(caught.value).splitlines()[0] == "error VOL-CRC  row 6  scan.nii.gz  gzip checksum differs"


def test_making_an_iterator_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(iter(make_loader(Rows(8), ResumableSampler(8, 4, 0), 0)))
    assert torch.equal(before, torch.get_rng_state())
