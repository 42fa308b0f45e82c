"""Every metric class with data of its own, and what two processes do with it; apart, so that processes can import it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torchmetrics import Metric

import lightning_modules as lm
from tests.gradsurgery.optimizer.distributed_workers import WORLD

N = 23
WORDS = ("Lima", "novel", "harbour", "the", "of", "in", "wrote", "seven", "prizes")
SPLITS = ("retain", "real_authors", "world_facts")


class Case(NamedTuple):
    """A metric, and how examples `part` of this file's data are given to it."""

    make: Callable[[], Metric]
    add: Callable[[Any, slice], None]


def _data() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, 9, (N,), generator=generator).tolist()
    labels = [torch.randint(0, 3, (length,), generator=generator) for length in lengths]
    texts = [[WORDS[i] for i in torch.randint(0, len(WORDS), (5,), generator=generator)] for _ in range(2 * N)]
    return {
        "answer": torch.rand(N, generator=generator, dtype=torch.float64) * 3,
        "paraphrase": torch.rand(N, generator=generator, dtype=torch.float64) * 3,
        "perturbed": torch.rand(N, 4, generator=generator, dtype=torch.float64) * 4,
        "rouge": torch.rand(N, generator=generator, dtype=torch.float64),
        "scores": torch.randint(-9, 0, (N,), generator=generator).double(),
        "holdout": torch.randint(-11, -2, (N,), generator=generator).double(),
        "labels": labels,
        "predicted": [label * (torch.rand(len(label), generator=generator) < 0.8) for label in labels],
        "predictions": [" ".join(words) for words in texts[:N]],
        "targets": [" ".join(words) for words in texts[N:]],
        "right": torch.arange(N) % 3,
    }


DATA = _data()
REFERENCE = lm.metrics.functional.truth_ratio(DATA["answer"], DATA["perturbed"])


def _utility(metric: Any, part: slice) -> None:
    for shift, split in enumerate(SPLITS):  # each split sees the examples rolled on, so that no two are alike
        answer, paraphrase, perturbed, rouge = (
            DATA[name].roll(shift, 0)[part] for name in ("answer", "paraphrase", "perturbed", "rouge")
        )
        metric.update(split, answer, paraphrase, perturbed, rouge)


def _given(*names: str) -> Callable[[Any, slice], None]:
    return lambda metric, part: metric.update(*(DATA[name][part] for name in names))


CASES: dict[str, Case] = {
    "AnswerProbability": Case(lm.metrics.AnswerProbability, _given("answer")),
    "AnswerProbability of options": Case(lm.metrics.AnswerProbability, _given("answer", "perturbed")),
    **{
        f"TruthRatio {kind}": Case(lambda kind=kind: lm.metrics.TruthRatio(kind), _given("paraphrase", "perturbed"))
        for kind in ("forget", "utility", "ratio")
    },
    "RougeRecall": Case(lm.metrics.RougeRecall, _given("predictions", "targets")),
    "RougeF1": Case(lm.metrics.RougeF1, _given("predictions", "targets")),
    "MultipleChoiceAccuracy": Case(
        lm.metrics.MultipleChoiceAccuracy,
        lambda metric, part: metric.update(-DATA["perturbed"][part], DATA["right"][part]),
    ),
    "ForgetQuality": Case(
        lambda: lm.metrics.ForgetQuality(REFERENCE),
        lambda metric, part: metric.update(
            lm.metrics.functional.truth_ratio(DATA["paraphrase"][part], DATA["perturbed"][part])
        ),
    ),
    "ModelUtility": Case(lm.metrics.ModelUtility, _utility),
    "ExtractionStrength": Case(lm.metrics.ExtractionStrength, _given("predicted", "labels")),
    "ExactMemorization": Case(lm.metrics.ExactMemorization, _given("predicted", "labels")),
    "PrivLeak": Case(lambda: lm.metrics.PrivLeak(0.6), _given("scores", "holdout")),
}


def numbers(result: Any) -> list[float]:
    return [float(number) for number in (result if isinstance(result, tuple) else (result,))]


def whole(name: str) -> list[float]:
    """One process, one batch."""
    metric = CASES[name].make()
    metric.distributed_available_fn = lambda: False
    CASES[name].add(metric, slice(0, N))
    return numbers(metric.compute())


# Uneven on purpose: odd batches, unlike numbers of them, and a process without any.
SHARES = {
    "uneven": ([slice(0, 1), slice(1, 4), slice(4, 9)], [slice(9, N)]),
    "one empty": ([slice(0, 11), slice(11, N)], []),
    "other empty": ([], [slice(0, N)]),
}


def equals_one_process_and_errors_reach_both(rank: int) -> None:
    for share in SHARES:
        equals_one_process(rank, share)
    errors_reach_every_process_and_leave_the_metric(rank)


def equals_one_process(rank: int, share: str) -> None:
    for name, case in CASES.items():
        metric = case.make()
        for part in SHARES[share][rank]:
            case.add(metric, part)
        assert numbers(metric.compute()) == pytest.approx(whole(name), rel=1e-12), name
        if isinstance(metric, lm.metrics.ModelUtility):
            alone = lm.metrics.ModelUtility(distributed_available_fn=lambda: False)
            case.add(alone, slice(0, N))
            assert metric.nine() == pytest.approx(alone.nine(), rel=1e-12)
        # What was gathered is put back: going on counts nothing twice.
        case.add(metric, slice(0, N))
        again = CASES[name].make()
        for part in [part for parts in SHARES[share] for part in parts] + [slice(0, N)] * WORLD:
            case.add(again, part)
        again.distributed_available_fn = lambda: False
        assert numbers(metric.compute()) == pytest.approx(numbers(again.compute()), rel=1e-12), name


def errors_reach_every_process_and_leave_the_metric(rank: int) -> None:
    for name, case in CASES.items():
        metric = case.make()
        with pytest.raises(RuntimeError, match="call update"):
            metric.compute()
        if rank == 0:
            case.add(metric, slice(0, N))
        assert numbers(metric.compute()) == pytest.approx(whole(name), rel=1e-12), name
    metric = lm.metrics.ForgetQuality(REFERENCE)
    metric.update([math.nan] if rank else [1.0])
    with pytest.raises(ValueError, match="NaN"):
        metric.compute()
    metric = lm.metrics.AnswerProbability()
    metric.update([1.0], [[1.0]] if rank else None)
    with pytest.raises(RuntimeError, match="one metric for each split"):
        metric.compute()
