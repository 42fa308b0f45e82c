"""GRU keeps more than the same loss alone at equal forgetting, and a placebo does not: on the real TOFU text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import pytest
import torch

import gradsurgery as gs
from tests.experiments.matched_forgetting import METHODS, TARGET, Matched, Outcome

TOFU = Path(__file__).parents[3] / "shared" / "tofu"
SEEDS = (0, 1, 2)
LOSSES = {"GA": gs.losses.gradient_ascent, "CE-U": gs.losses.ceu}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(not TOFU.is_dir(), reason=f"needs TOFU's files in {TOFU}"),
]


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[tuple[str, str, int], Outcome]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    matched = Matched(str(TOFU))
    start = matched.probability(matched.model, "forget"), matched.probability(matched.model, "retain")
    print(
        f"\n\nTOFU, 8 + 2 authors, matched at forget probability {TARGET}; start: forget {start[0]:.3f}, retain {start[1]:.3f}\n"
    )
    print(
        "| forget loss | method | retain probability, seeds 0 1 2 | mean | against alone, by seed | conflicts | steps that raise retain | steps |"
    )
    print("|---|---|---|---|---|---|---|---|")
    found: dict[tuple[str, str, int], Outcome] = {}
    for name, loss in LOSSES.items():
        for method in METHODS:
            for seed in SEEDS:
                found[name, method, seed] = matched.run(method, loss, seed)
            rows = [found[name, method, seed] for seed in SEEDS]
            kept = [row.retain_probability for row in rows]
            deltas = [
                row.retain_probability - found[name, "alone", seed].retain_probability for seed, row in enumerate(rows)
            ]
            print(
                f"| {name} | {method} | {' '.join(f'{value:.3f}' for value in kept)} | {mean(kept):.3f} | "
                f"{' '.join(f'{delta:+.3f}' for delta in deltas)} | {mean(row.conflicts for row in rows):.0%} | "
                f"{mean(row.step_conflicts for row in rows):.0%} | {mean(row.steps for row in rows):.1f} |"
            )
    yield found
    torch.set_num_threads(threads)


def test_every_run_has_forgotten_equally_much(outcomes: dict[tuple[str, str, int], Outcome]) -> None:
    assert all(abs(outcome.forget_probability - TARGET) < 0.004 for outcome in outcomes.values())


@pytest.mark.parametrize("loss", LOSSES)
def test_gru_keeps_more_in_every_pair(outcomes: dict[tuple[str, str, int], Outcome], loss: str) -> None:
    gains = [outcomes[loss, "GRU", s].retain_probability - outcomes[loss, "alone", s].retain_probability for s in SEEDS]
    assert min(gains) > 0.03
    assert mean(gains) > 0.08


@pytest.mark.parametrize("loss", LOSSES)
def test_a_placebo_of_the_same_length_does_not(outcomes: dict[tuple[str, str, int], Outcome], loss: str) -> None:
    gains = [
        outcomes[loss, "placebo", s].retain_probability - outcomes[loss, "alone", s].retain_probability for s in SEEDS
    ]
    assert abs(mean(gains)) < 0.04
