"""Unlearning's pairs in batches of similar length: the same examples, less padding, one order for all processes."""

from __future__ import annotations

import pytest
import torch

from lightning_modules.data.loader import PairLoader
from lightning_modules.data.order import PairDataset, PairSampler, collate_pairs
from lightning_modules.data.tokenization import Encoded

FORGET, RETAIN, BATCH = 70, 90, 4
LENGTHS = torch.randint(3, 40, (FORGET + RETAIN,), generator=torch.Generator().manual_seed(0)).tolist()
TEXTS = [Encoded([1] * length, [-100, *[1] * (length - 1)]) for length in LENGTHS]
DATA = PairDataset(TEXTS[:FORGET], TEXTS[FORGET:])


def order(
    epoch: int = 0, *, world: int = 1, rank: int = 0, batch: int | None = BATCH, seed: int = 0
) -> list[tuple[int, int]]:
    sampler = PairSampler(DATA, seed=seed, num_replicas=world, rank=rank, group_by_length=batch)
    sampler.set_epoch(epoch)
    return list(sampler)


def padding(pairs: list[tuple[int, int]]) -> int:
    found = 0
    for start in range(0, len(pairs), BATCH):
        for column in collate_pairs([DATA[pair] for pair in pairs[start : start + BATCH]], 0).values():
            found += int((column["attention_mask"] == 0).sum())
    return found


@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_the_same_examples_come_in_batches_with_a_third_of_the_padding(epoch: int) -> None:
    plain, grouped = order(epoch, batch=None), order(epoch)
    assert [sorted(column) for column in zip(*grouped, strict=True)] == [
        sorted(column) for column in zip(*plain, strict=True)
    ]
    assert padding(grouped) < padding(plain) / 3
    assert grouped == order(epoch)
    assert len({tuple(order(epoch, seed=seed)) for seed in range(4)}) == 4
    sizes = [LENGTHS[forget] for forget, _ in grouped[::BATCH]]
    assert sizes != sorted(sizes)  # the steps are shuffled


def test_two_processes_see_together_what_one_sees_with_twice_the_batch() -> None:
    alone = order(1, batch=2 * BATCH)
    ranks = [order(1, world=2, rank=rank) for rank in range(2)]
    for step in range(FORGET // (2 * BATCH)):
        together = [pair for rank in ranks for pair in rank[step * BATCH : (step + 1) * BATCH]]
        assert sorted(together) == sorted(alone[2 * step * BATCH : 2 * (step + 1) * BATCH])


def loader(group_by_length: int | None = BATCH) -> PairLoader:
    sampler = PairSampler(DATA, group_by_length=group_by_length)
    return PairLoader(DATA, batch_size=BATCH, sampler=sampler, collate_fn=lambda batch: [pair.index for pair in batch])


def test_it_goes_on_in_the_middle_of_an_epoch() -> None:
    whole, interrupted, resumed = loader(), loader(), loader()
    first = iter(interrupted)
    seen = [next(first) for _ in range(5)]
    resumed.load_state_dict(interrupted.state_dict())
    assert [*seen, *resumed] == list(whole)


def test_an_epoch_that_was_begun_in_the_other_order_is_refused() -> None:
    interrupted, other = loader(None), loader()
    next(iter(interrupted))
    other.load_state_dict(interrupted.state_dict())
    with pytest.raises(ValueError, match="in 1 processes, grouped by length, found one with"):
        next(iter(other))
