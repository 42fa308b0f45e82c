"""The one command over the benchmarks: what it writes where, what it leaves alone, and what it says. Nothing is measured."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.benchmarks import picture, places, runner
from tests.benchmarks.runner import BENCHMARKS, Benchmark, Found

TABLE = "| times a copy | short | long |\n| --- | ---: | ---: |\n| ours | 1.20 (1.1 to 1.3) | **1.10** |\n| all | 3 ms | - |"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A file with places for two benchmarks and the picture, and something between them."""
    path = tmp_path / "RESULTS.md"
    path.write_text(
        "".join(f"about {name}\n{places.begin(name)}\n{places.end(name)}\n" for name in ("ratios", "a", "b"))
    )
    return path


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, Found]:
    """What the two benchmarks find; a test may change it."""
    answers = {"a": Found(TABLE, None), "b": Found("b's text", None)}
    monkeypatch.setattr(runner, "BENCHMARKS", {"a": Benchmark("a"), "b": Benchmark("b", drawing="b.png")})

    def run(benchmark: Benchmark, options: Sequence[str]) -> Found:
        return answers[benchmark.module]._replace(text=f"{' '.join(options)}\n{answers[benchmark.module].text}\n")

    monkeypatch.setattr(runner, "run", run)
    return answers


def test_each_result_takes_its_own_place_and_the_prose_stays(results: Path, found: dict[str, Found]) -> None:
    assert runner.main(["--write", "--quick", "--results", str(results)]) == 0
    first = places.written(results, "a")
    assert first == f"--quick\n{TABLE}"
    written = places.written(results, "b") or ""
    assert re.fullmatch(r"--quick --picture \S*b\.png\nb's text\n\n!\[b\]\(b\.png\)", written)
    found["a"], found["b"] = Found("newer", None), Found("never seen", None)
    assert runner.main(["a", "--write", "--results", str(results), "--", "--rounds", "7"]) == 0
    assert places.written(results, "a") == "--rounds 7\nnewer"
    assert places.written(results, "b") == written
    assert re.findall("^about .*", results.read_text(), re.MULTILINE) == ["about ratios", "about a", "about b"]


def test_what_fails_says_so_in_one_line_and_stops_nothing(
    results: Path, found: dict[str, Found], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--write", "--results", str(results)]
    for reason in ("no\ncompiler", "no GPU"):
        found["a"] = Found("half a ta", reason)
        assert runner.main(words) == 1
        assert re.fullmatch(r"Not measured on \d{4}-\d\d-\d\d: no \w+\.", places.written(results, "a") or "")
        assert "b's text" in (places.written(results, "b") or "")
        assert f"a was not measured: {reason}" in capsys.readouterr().err
    found["a"] = Found(TABLE, None)
    assert runner.main(words) == 0
    assert places.written(results, "a") == TABLE
    for reason in ("killed", "no GPU"):
        found["a"] = Found("", reason)
        assert runner.main(words) == 1
        line, blank, *older = (places.written(results, "a") or "").splitlines()
        assert re.fullmatch(rf"Not measured on \S+: {reason}\. What follows is older\.", line)
        assert not blank
        assert older == TABLE.splitlines()


def test_without_write_nothing_is_written(
    results: Path, found: dict[str, Found], capsys: pytest.CaptureFixture[str]
) -> None:
    before = results.read_bytes()
    assert runner.main(["--results", str(results)]) == 0
    assert TABLE in capsys.readouterr().out
    assert results.read_bytes() == before
    assert list(results.parent.iterdir()) == [results]


def test_the_picture_has_every_ratio_that_is_written(results: Path, found: dict[str, Found]) -> None:
    (panel,) = picture.panels("a", f"text\n{TABLE}\n\n| seconds | wall |\n|---|---:|\n| ours | 1.25 |\n")
    assert panel == ("a: times a copy", ["ours"], {"short": {"ours": 1.2}, "long": {"ours": 1.1}})
    assert runner.main(["b", "--write", "--results", str(results)]) == 0
    assert not places.written(results, "ratios")  # nothing to draw yet
    assert runner.main(["a", "--write", "--results", str(results)]) == 0
    assert "(ratios.png)" in (places.written(results, "ratios") or "")
    drawn = results.with_name("ratios.png")
    assert drawn.stat().st_size > 5000
    drawn.unlink()
    found.clear()
    assert runner.main(["ratios", "--write", "--results", str(results)]) == 0  # which runs nothing
    assert drawn.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nosuch"], "expected one of a, b, or the name of a file of theirs, found 'nosuch'"),
        (["--", "--rounds", "7"], "expected one benchmark that these options go to, found 2"),
        (["--write", "--quick"], "expected a whole measurement, found --quick"),
        (["--write", "--results", "no/where.md"], "expected a copy of .*RESULTS.md, found no file no/where.md"),
        (["--write"], "expected the lines <!-- a: .* found none"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_runs(
    words: list[str],
    said: str,
    found: dict[str, Found],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "run", lambda *_: pytest.fail("ran"))
    with pytest.raises(SystemExit, match="2"):
        runner.main(words)
    assert re.search(said, " ".join(capsys.readouterr().err.split()))


def test_every_benchmark_has_a_file_and_a_place_in_the_results_and_no_place_is_nobodys() -> None:
    text = places.RESULTS.read_text()
    assert sorted(re.findall(r"^<!-- (\S+): python -m tests\.benchmarks ", text, re.MULTILINE)) == sorted(
        [*BENCHMARKS, "ratios"]
    )
    for name in (*BENCHMARKS, "ratios"):
        assert places.written(places.RESULTS, name) is not None, name
    for benchmark in BENCHMARKS.values():
        assert places.RESULTS.with_name(f"{benchmark.module}.py").exists()


def test_a_file_without_a_place_stays_as_it_is(tmp_path: Path) -> None:
    bare = tmp_path / "RESULTS.md"
    bare.write_text("no marks\n")
    for write in (places.write, places.write_failure):
        with pytest.raises(ValueError, match=r"RESULTS\.md: expected the lines"):
            write(bare, "scaling", "tables")
    assert bare.read_text() == "no marks\n"


def test_a_process_that_ends_well_is_read_and_one_that_does_not_is_quoted(capsys: pytest.CaptureFixture[str]) -> None:
    text, failure = runner.run(Benchmark("scoring", ("--help",)), ["--rounds", "2"])
    assert "--questions" in text
    assert failure is None
    assert runner.run(Benchmark("scoring"), []).failure == (
        "scoring.py: error: the following arguments are required: --model (exit code 2)"
    )
    assert "required: --model" in capsys.readouterr().err  # as it happens
    assert runner.run(Benchmark("places"), []).failure == "it printed nothing"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_everything_that_needs_nothing_else_runs_and_is_written(tmp_path: Path) -> None:
    results = tmp_path / "RESULTS.md"
    shutil.copy(places.RESULTS, results)
    runner.main(["--quick", "--write", "--results", str(results)])
    for name in BENCHMARKS:
        needs = name == "scoring" or name.endswith("-cuda")
        assert needs or not (places.written(results, name) or "").startswith("Not measured"), name
