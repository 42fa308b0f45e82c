"""Batches of similar length: every example once an epoch, whatever the number of processes."""

from __future__ import annotations

import random

import pytest

from lightning_modules.data.lengths import LengthBatches

LENGTHS = random.Random(7).choices(range(3, 41), k=203)


@pytest.mark.parametrize("batch_size", [1, 4, 8, 300])
def test_every_epoch_sees_every_example_once(batch_size: int) -> None:
    batches = LengthBatches(LENGTHS, batch_size)
    for epoch in range(3):
        batches.set_epoch(epoch)
        found = list(batches)
        assert len(found) == len(batches)
        assert sorted(place for batch in found for place in batch) == list(range(len(LENGTHS)))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first, again, other = LengthBatches(LENGTHS, 8), LengthBatches(LENGTHS, 8), LengthBatches(LENGTHS, 8, seed=1)
    epochs = []
    for epoch in range(3):
        first.set_epoch(epoch)
        epochs.append(list(first))
    again.set_epoch(2)  # a resumed run starts here
    random.random()
    assert list(again) == epochs[2]
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(other) != epochs[0]


def test_two_processes_see_together_what_one_sees_with_twice_the_batch() -> None:
    whole = list(LengthBatches(LENGTHS[:200], 8))
    shares = [list(LengthBatches(LENGTHS[:200], 4, num_replicas=2, rank=rank)) for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1]) == len(whole)
    for batch, *parts in zip(whole, *shares, strict=True):
        assert sorted(batch) == sorted(parts[0] + parts[1])


def test_an_uneven_batch_is_filled_with_its_own_examples_so_that_no_process_waits() -> None:
    shares = [list(LengthBatches(LENGTHS[:5], 2, num_replicas=4, rank=rank)) for rank in range(4)]
    assert {len(share) for share in shares} == {1}
    seen = [place for share in shares for place in share[0]]
    assert set(seen) == set(range(5))
    assert {len(share[0]) for share in shares} == {2}


def test_batches_hold_examples_of_similar_length() -> None:
    padding = {}
    for size in (8, 1):  # batches of one have no padding at all
        padding[size] = sum(max(LENGTHS[p] for p in batch) * len(batch) for batch in LengthBatches(LENGTHS, size))
    unsorted = sum(max(LENGTHS[start : start + 8]) * 8 for start in range(0, 200, 8))
    assert padding[1] == sum(LENGTHS)
    assert padding[8] - padding[1] < 0.3 * (unsorted - padding[1])
