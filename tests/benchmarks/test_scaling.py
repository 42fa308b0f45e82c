"""tests/benchmarks/scaling.py: exponents are those of the law, and every table and panel comes out. Nothing is timed here."""

from __future__ import annotations

import argparse
import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import gradsurgery as gs
from tests.benchmarks import growth, limit, places, scaling
from tests.benchmarks.power_law import Fit, Series, draw, fit
from tests.benchmarks.processes import processes

SIZES = (1, 3, 10, 30, 100)
TINY = replace(
    growth.QUICK,
    repeats=2,
    parameters=(2000, 6000),
    objectives=(2, 3, 4),
    blocks=(1, 300),
    protected=(1, 2),
    rule_rows=(2, 8, 11),
    rule_blocks=(1, 2),
    numbers=3000,
)


def laws(*exponents: float, fixed: float = 0.0) -> Series:
    """Seconds that follow one law in each round."""
    return Series("a law", {size: [fixed + 3e-3 * size**exponent for exponent in exponents] for size in SIZES})


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 1.37, 2.0])
def test_the_exponent_of_a_power_law_is_found(exponent: float) -> None:
    found = fit(laws(exponent, exponent, exponent))
    expected = Fit(exponent, exponent, exponent, np.log(3e-3), 1.0)
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_spread_is_that_of_the_rounds() -> None:
    found = fit(laws(0.9, 1.0, 1.1, 1.2, 1.3))
    assert found[:3] == pytest.approx((1.1, 1.0, 1.2), abs=1e-12)


def test_a_noisy_round_is_fitted_by_least_squares() -> None:
    noisy = np.random.default_rng(0).lognormal(0.0, 0.3, (len(SIZES), 3)) * np.array(SIZES)[:, None]
    found = fit(Series("noise", dict(zip(SIZES, noisy.tolist(), strict=True))))
    slopes = np.polyfit(np.log(SIZES), np.log(noisy), 1)[0]
    assert found.exponent == pytest.approx(float(np.median(slopes)), abs=1e-12)
    left = np.log(np.median(noisy, axis=1)) - found.exponent * np.log(SIZES)
    assert found.off == pytest.approx(float(np.exp(np.abs(left - left.mean()).max())), abs=1e-12)


def test_what_is_no_power_law_is_seen() -> None:
    assert fit(laws(1.0, 1.0, fixed=0.1)).off > 1.2


@pytest.mark.parametrize("series", [laws(1.0), Series("one size", {1: [1.0, 1.0]})])
def test_a_law_needs_two_sizes_and_two_rounds(series: Series) -> None:
    with pytest.raises(ValueError, match="expected two sizes and two rounds or more, found"):
        fit(series)


def test_every_table_and_panel_comes_out_and_takes_its_place_in_the_results(tmp_path: Path) -> None:
    here = [name for name in scaling.STUDIES if name != "processes"]
    text, studies = scaling.report(TINY, [*here, "rules"])
    lines = text.splitlines()
    for name in (*gs.rules.RULES, "sago"):
        assert any(f"{name} |" in line or f"`{name}` |" in line for line in lines), name
    (refused,) = (line for line in lines if line.startswith("| `mgda`"))
    assert "| - / - |" in refused  # 11 rows are one more than it takes
    assert "nan" not in text
    for name, drawn in (("picture.svg", studies), ("picture.png", studies[:1])):
        draw(drawn, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 10_000
    picture = (tmp_path / "picture.svg").read_text()  # which has every text as a comment beside its outlines
    for study in studies:
        assert f"<!-- {study.title} -->" in picture
        for series in study.series:
            assert f"<!-- {series.name}: {fit(series).exponent:.2f} -->" in picture
    results = tmp_path / "RESULTS.md"
    begin, end = places.begin("scaling"), places.end("scaling")
    results.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    places.write(results, "scaling", text)
    assert results.read_text() == f"before\n{begin}\n{text}\n{end}\nafter\n"


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_report_every_round_of_both_kinds() -> None:
    # Whose import tells the server that forks them what to import once: the tests share one.
    importlib.import_module("tests.gradsurgery.optimizer.distributed_workers")
    found = processes(replace(TINY, processes=(2,), repeats=1))
    assert [series.name for series in found.series] == [
        "divided, CPU",
        "on each, CPU",
        "divided, wall",
        "on each, wall",
    ]
    for series in found.series:
        assert {world: len(rounds) for world, rounds in series.seconds.items()} == {2: 1}
        assert all(seconds > 0.0 for rounds in series.seconds.values() for seconds in rounds)


@pytest.mark.parametrize("choice", ["compiled", "eager"])
def test_a_pass_takes_the_blocks_it_is_given_and_changes_little(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if choice not in growth.backends():
        pytest.skip("no C++ compiler")
    rows = [growth.cut(flat, 3000, 10) for (flat,) in limit.filled([(3000,)], 3)]
    before, seen = [tensor.clone() for tensor in rows[0]], []
    gru = gs.rules.gru
    monkeypatch.setattr(gs.rules, "gru", lambda gram: seen.append(gram) or gru(gram))
    growth.one_pass(rows, [tensor // 5 for tensor in range(10)], choice)()
    for block, part in enumerate((slice(0, 5), slice(5, 10))):
        flat = torch.stack([torch.cat(row[part] if k else before[part]) for k, row in enumerate(rows)]).double()
        torch.testing.assert_close(seen[0][block], flat @ flat.mT, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(torch.cat(rows[0]), torch.cat(before), rtol=0, atol=1e-7)


def test_protected_rows_conflict_and_have_the_rank_they_are_given() -> None:
    matrices = growth.grams(3, 7, rank=4)
    assert torch.linalg.matrix_rank(matrices[:, 1:, 1:], hermitian=True, rtol=1e-9).tolist() == [4, 4, 4]
    assert bool((growth.grams(3, 7)[:, 0, 1:].sum(-1) < 0).all())


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"parameters": 10}, "--parameters: expected 3000000 or more, found 10"),
        ({"repeats": 1}, "--repeats: expected 2 or more"),
        ({"processes": 1}, "--processes: expected 2 or more"),
    ],
)
def test_sizes_that_give_no_exponent_are_refused(given: dict[str, int], match: str) -> None:
    nothing = {"quick": True, "only": None, "repeats": None, "parameters": None, "processes": None}
    with pytest.raises(ValueError, match=match):
        scaling.planned(argparse.Namespace(**{**nothing, **given}))
    with pytest.raises(ValueError, match="free memory"):
        scaling.fitting(10**6)


def test_the_largest_size_leaves_half_of_the_free_memory() -> None:
    assert scaling.fitting(16 * 10**9) == 3 * 10**8
    assert scaling.sizes_up_to(5 * 10**6) == (10**6, 3 * 10**6, 5 * 10**6)
