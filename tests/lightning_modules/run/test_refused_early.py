"""What is refused before any long work: hardware that Lightning does not know, and rows to forget that are to be kept."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry

from lightning_modules import cli
from lightning_modules.ablation import sweep
from lightning_modules.run import unlearn as unlearn_command
from lightning_modules.run.compiling import check_compiler

ROWS = [{"question": f"Who is {number}?", "answer": f"Number {number}."} for number in range(12)]


@pytest.fixture
def began(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whether long work was begun; it is not done."""
    found: list[str] = []

    def begin(*_: Any, **__: Any) -> None:
        found.append("work")
        raise KeyboardInterrupt

    monkeypatch.setattr(unlearn_command, "load_model", begin)
    monkeypatch.setattr(sweep, "_do", begin)
    return found


def write(folder: Path, **splits: list[dict[str, str]]) -> list[str]:
    for name, rows in splits.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return [text for name in splits for text in (f"--{name}", str(folder / f"{name}.json"))]


HARDWARE = {
    "precision": (["--precision", "banana"], ["Precision 'banana' is invalid", "bf16-mixed", "32-true"]),
    "strategy": (["--strategy", "banana"], ["strategy='banana'", *StrategyRegistry.available_strategies()]),
    "package": (["--strategy", "deepspeed"], ["DeepSpeed installed"]),
    "uld": (["--method", "uld", "--precision", "banana"], ["Precision 'banana' is invalid"]),
}
if not torch.cuda.is_available():
    HARDWARE["float16 without a GPU"] = (["--precision", "16-mixed"], ["expected a GPU for float16", "bf16-mixed"])


@pytest.mark.parametrize(("arguments", "said"), HARDWARE.values(), ids=HARDWARE)
def test_what_lightning_does_not_know_is_refused_before_any_work_with_what_it_knows(
    arguments: list[str], said: list[str], began: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["unlearn", *arguments, "--output", str(tmp_path / "run")]) == 1
    shown = capsys.readouterr().err
    assert began == []
    for text in said:
        assert text in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_what_it_knows_goes_on(began: list[str], tmp_path: Path) -> None:
    for arguments in (["--precision", "bf16-mixed"], ["--strategy", "ddp", "--devices", "1"]):
        assert cli.main(["unlearn", *arguments, "--output", str(tmp_path)]) == 130
    assert began == ["work", "work"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is used where there is one, and needs other compilers")
@pytest.mark.parametrize("command", [["unlearn"], ["finetune", "--model", "nowhere", "--data", "none.json"]])
def test_programs_are_not_promised_where_nothing_can_compile_them(
    command: list[str],
    began: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.delenv("TORCH_INDUCTOR_INSTALL_GXX", raising=False)
    assert cli.main([*command, "--compile", "--output", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert "--compile: expected a C++ compiler" in said
    assert "found no no-such-compiler; install one, set CXX to one that is there, or leave --compile out" in said
    assert said.count("\n") == 1
    assert began == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("device", "there", "variables", "said"),
    [
        ("cpu", {"g++", "clang++"}, {}, None),
        ("cpu", {"mine"}, {"CXX": "mine"}, None),
        ("cpu", {"g++"}, {"CXX": "theirs"}, "found no theirs"),
        ("cpu", {"gcc"}, {}, r"found no (clan)?g\+\+"),
        ("cpu", set[str](), {"TORCH_INDUCTOR_INSTALL_GXX": "1"}, None if sys.platform == "linux" else "found no"),
        ("cuda", {"gcc", "triton"}, {}, None),
        ("cuda", {"clang", "triton"}, {}, None),
        ("cuda", {"mine", "triton"}, {"CC": "mine"}, None),
        ("cuda", {"gcc", "triton"}, {"CC": "theirs"}, "a C compiler.*found no theirs; install one, set CC to"),
        ("cuda", {"g++", "triton"}, {}, "a C compiler.*found no gcc or clang; install one"),
        ("cuda", {"gcc"}, {}, "Triton.*found none; .*pip install triton"),
        ("mps", set[str](), {}, None),
    ],
)
def test_a_cpu_needs_a_cpp_compiler_and_a_gpu_triton_and_a_c_compiler(
    device: str, there: set[str], variables: dict[str, str], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CC", "CXX", "TORCH_INDUCTOR_INSTALL_GXX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in there else None)
    with nullcontext() if said is None else pytest.raises(ValueError, match=f"^--compile: expected .*{said}"):
        check_compiler(device)


@pytest.mark.parametrize("place", ["file", "file/ledger"])
def test_a_ledger_that_cannot_be_written_leaves_no_folder(
    place: str, began: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    files = write(tmp_path, forget=ROWS[:4], retain=ROWS[4:])
    run, ledger = tmp_path / "run", tmp_path / place
    for further in ([], ["--dry-run"]):
        assert cli.main(["unlearn", *files, "--ledger", str(ledger), "--output", str(run), *further]) == 1
        said = capsys.readouterr().err
        assert f"--ledger: expected a folder that can be written, found {ledger}: {tmp_path / 'file'} is" in said
        assert began == []
        assert not run.exists()
    assert (tmp_path / "file").read_text() == "mine"


def test_so_it_is_in_a_grid(began: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = "methods: [{name: GA, forget_loss: gradient_ascent}]\ntargets: {forget_probability: [0.05]}\n"
    (tmp_path / "grid.yaml").write_text(grid + "train: {precision: banana}\n")
    assert cli.main(["ablate", "--config", str(tmp_path / "grid.yaml"), "--output", str(tmp_path / "run")]) == 1
    assert "Precision 'banana' is invalid" in capsys.readouterr().err
    assert began == []


@pytest.mark.parametrize("command", ["unlearn", "evaluate"])
@pytest.mark.parametrize("retain", [ROWS[:4], ROWS, [*ROWS[4:], *ROWS[:4][::-1]]], ids=["the same", "more", "shuffled"])
def test_a_forget_set_that_is_to_be_kept_as_a_whole_is_refused(
    command: str, retain: list[dict[str, str]], began: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write(tmp_path, forget=ROWS[:4], retain=retain)
    assert cli.main([command, *files, "--output", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    place = retain.index(ROWS[0]) + 1
    assert f"found all 4 rows of the forget set in the retain set too, forget rows 1 (retain row {place}), 2 " in said
    assert began == []
    assert not (tmp_path / "run").exists()


def test_rows_in_both_sets_are_named(began: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spaced = {**ROWS[3], "answer": ROWS[3]["answer"] + " "}
    for forget, retain, said in (
        (ROWS[:4], [*ROWS[5:], spaced], "1 of 4 rows are to be forgotten and to be kept at once, forget row 4 (retain row 8);"),
        (ROWS[:8], ROWS[1:], "7 of 8 rows are to be forgotten and to be kept at once, forget rows 2 (retain row 1), 3 (retain"),
        (ROWS[:4], ROWS[4:], None),
        (ROWS[:4], [{**row, "answer": "I do not know."} for row in ROWS], None),  # another answer is no contradiction
    ):  # fmt: skip
        files = write(tmp_path, forget=forget, retain=retain)
        cli.main(["unlearn", *files, "--output", str(tmp_path / "run")])
        shown = capsys.readouterr().err
        assert ("Warning" in shown) == (said is not None)
        assert said is None or said in shown
        (tmp_path / "run").rmdir()
    assert began == ["work"] * 4
