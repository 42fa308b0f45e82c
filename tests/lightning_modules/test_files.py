"""Files are whole or not there: a full disk, a disk that cannot be written, a crash; one sentence names the path."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_modules import files, folder
from lightning_modules.ablation.results import write_csv
from lightning_modules.training.callbacks.notes import note
from lightning_modules.training.callbacks.rows import GrowingRows
from lightning_modules.training.checkpoint_file import CheckpointFile

ROOM = 4096  # bytes in a file on the full disk
MUCH = "x" * 2 * ROOM


def save_model(path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with files.replacing(path) as temporary:
        LlamaForCausalLM(LlamaConfig(vocab_size=99, **sizes)).save_pretrained(temporary)


def save_picture(path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().plot(range(9))
    with files.replacing(path) as temporary:
        figure.savefig(temporary)


CHECKPOINT = {"state_dict": {"weight": torch.ones(ROOM)}, "global_step": 0, "loops": {}}
WRITERS: dict[str, Callable[[Path], Any]] = {
    "metrics.json": lambda path: folder.write_json(path, {"x": MUCH}),
    "evaluation.jsonl": lambda path: folder.write_evaluation(path, {"after": {"forget": [{"answer": MUCH}]}}),
    "config.yaml": lambda path: folder.write_config(path.parent, "unlearn", {"x": MUCH}),
    "report.md": lambda path: files.write_text(path, MUCH),
    "last.ckpt": lambda path: CheckpointFile().save_checkpoint(CHECKPOINT, path),
    "model": save_model,
    "curves.png": save_picture,
    "results.csv": lambda path: write_csv([{"method": MUCH}], path),
}


@contextmanager
def full_disk() -> Generator[None]:
    """No file may become larger: a real write fails in its middle."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
        signal.signal(signal.SIGXFSZ, handler)


def everything(path: Path) -> dict[str, bytes]:
    return {str(each.relative_to(path)): each.read_bytes() for each in sorted(path.rglob("*")) if each.is_file()}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_former_file_whole_and_is_one_sentence(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    before = everything(tmp_path)
    with full_disk(), pytest.raises(OSError, match=r"found: .*(too large|code 27)") as failure:
        WRITERS[name](tmp_path / name)
    assert str(failure.value).startswith(f"{tmp_path / name}: expected room and permission to write it")
    assert "\n" not in str(failure.value)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", WRITERS)
def test_a_second_write_replaces_the_first(name: str, tmp_path: Path) -> None:
    for _ in range(2):
        WRITERS[name](tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("step", ["mkdir", "fsync", "replace"])
@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_whatever_step_fails_nothing_has_changed(
    step: str, reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise OSError(reason, os.strerror(reason))

    folder.write_json(tmp_path / "metrics.json", {"x": 1})
    monkeypatch.setattr(Path if step in ("mkdir", "replace") else os, step, fails)
    with pytest.raises(OSError, match=os.strerror(reason)) as failure:
        folder.write_json(tmp_path / "metrics.json", {"x": 2})
    assert isinstance(failure.value, PermissionError) == (reason == errno.EACCES)
    monkeypatch.undo()
    assert everything(tmp_path) == {"metrics.json": b'{\n  "x": 1\n}\n'}


def test_an_error_of_ones_own_leaves_nothing_and_is_not_reworded(tmp_path: Path) -> None:
    def write() -> None:
        with files.replacing(tmp_path / "file") as temporary:
            temporary.write_text("half")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    with files.replacing(tmp_path / "kept.json") as temporary:
        name = temporary.name
        temporary.write_text("{}")
    (tmp_path / name).write_text("half")
    (tmp_path / f"{files.PARTIAL}folder").mkdir()
    (tmp_path / f"{files.PARTIAL}folder" / "half").write_text("half")
    files.remove_partial(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]


def test_notes_of_a_full_disk_keep_the_former_ones(tmp_path: Path) -> None:
    note(tmp_path / "probes.json", "relearn", {"x": 1})
    with full_disk(), pytest.raises(OSError, match=r"probes\.json: expected room"):
        note(tmp_path / "probes.json", "quantization", {"x": MUCH})
    assert json.loads((tmp_path / "probes.json").read_text()) == {"relearn": {"x": 1}}


def test_rows_grow_by_whole_lines_and_start_anew_when_told(tmp_path: Path) -> None:
    path = tmp_path / "curve.csv"
    path.write_text("of another run\n")
    rows = GrowingRows(path)
    rows.write(["step", "x"], [{"step": 0, "x": 0.5}])
    rows.write(["step", "x"], [{"step": 1, "x": 0.25}, {"step": 2, "x": 0.125}])
    whole = b"step,x\r\n0,0.5\r\n1,0.25\r\n2,0.125\r\n"
    assert path.read_bytes() == whole
    with full_disk(), pytest.raises(OSError, match=r"curve\.csv: expected room"):
        rows.write(["step", "x"], [{"step": 3, "x": MUCH}])
    assert path.read_bytes() == whole
    rows.write(["step", "x"], [{"step": 3, "x": 1.0}])
    assert path.read_bytes() == whole + b"3,1.0\r\n"
    rows.restart()
    rows.write(["step", "x"], [{"step": 0, "x": 0.5}])
    assert path.read_bytes() == b"step,x\r\n0,0.5\r\n"


# Two runs in one folder -----------------------------------------------------------------------------------------------


def test_a_folder_has_one_run_at_a_time(tmp_path: Path) -> None:
    with folder.locked(tmp_path):
        with (
            pytest.raises(FileExistsError, match=rf"found process {os.getpid()} on .* at work in {tmp_path}"),
            folder.locked(tmp_path),
        ):
            pytest.fail("two runs in one folder")
        folder.claim(tmp_path)  # a lock is no run
    assert list(tmp_path.iterdir()) == []
    with folder.locked(tmp_path):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        with folder.locked(tmp_path):
            os.write(told, b"!")
            signal.pause()
    os.read(ready, 1)
    with pytest.raises(FileExistsError, match=f"process {child} "), folder.locked(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with folder.locked(tmp_path):
        pass
    os.close(ready)
    os.close(told)
