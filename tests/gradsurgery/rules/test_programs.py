"""The quadratic program of `gru`: on a CPU it solves no more than is needed, and answers the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gradsurgery as gs
from tests import zoo


@pytest.mark.parametrize("rule", ["gru", "gem", "upgrad"])
@pytest.mark.parametrize("number", [3, 6])
def test_problems_that_are_solved_one_after_another_get_the_same_bits(rule: str, number: int) -> None:
    """Under vmap the host sees no numbers, and every problem takes every ridge and every round, as on an accelerator."""
    function = gs.rules.by_name(rule)
    rows = torch.randn(60, number, number + 2)
    rows[:20, -1] = rows[:20, 0] * (1 + 1e-5 * torch.randn(20, 1))
    rows[20:40] = rows[20:40, :, :2] @ torch.randn(20, 2, number + 2)
    rows[41, 1], rows[42, 0] = torch.nan, 0.0
    found = (rows @ rows.mT).double()  # float32 products are slightly indefinite, so that ridges are needed
    if number in zoo.SIZES:
        found = torch.cat([found, zoo.stacked(number)[2]])
    together, apart = function(found), torch.func.vmap(function)(found)
    assert torch.equal(together.isnan(), apart.isnan())
    assert torch.equal(together.nan_to_num(), apart.nan_to_num())


def test_no_more_systems_are_solved_than_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[int] = []
    solve = torch.linalg.solve_ex

    def counted(matrix: Tensor, right: Tensor) -> Any:
        solved.append(len(matrix))
        return solve(matrix, right)

    monkeypatch.setattr(torch.linalg, "solve_ex", counted)
    rows = torch.randn(300, 31, 60, dtype=torch.float64)
    rows[7] = rows[7, :, :1] * rows[7, 0]  # one degenerate problem is no reason to ease the others
    gs.rules.gru(rows @ rows.mT)
    assert sum(solved) < 300 * 40  # all ridges and rounds are 300 * 4 * 155
