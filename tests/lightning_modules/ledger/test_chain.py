"""The chain: any flipped bit is found at its entry, a killed process leaves it whole, and one process writes at a time."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_modules.ledger.chain import append, read_chain, walked
from lightning_modules.ledger.place import LEDGER, held
from tests.reference import ledger as slow

CONTENTS = ({"request": {"id": "ä"}, "n": 1}, {"n": 0.5, "text": 'a "quoted" line\n'}, {"n": None, "list": [1, [2]]})


def written(folder: Path) -> Path:
    path = folder / LEDGER
    for contents in CONTENTS:
        append(path, contents)
    return path


def test_it_holds_what_was_appended_as_an_independent_reader_checks_it(tmp_path: Path) -> None:
    path = written(tmp_path)
    entries = read_chain(path)
    assert slow.chain_holds(path.read_bytes())
    for number, (entry, contents) in enumerate(zip(entries, CONTENTS, strict=True), start=1):
        assert {name: entry[name] for name in contents} == contents
        assert entry["number"] == number


def test_a_flipped_bit_in_any_byte_is_found_at_its_entry(tmp_path: Path) -> None:
    path = written(tmp_path)
    data = path.read_bytes()
    for place in range(len(data)):
        entry = data[:place].count(b"\n") + 1
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place * 5 % 8]) + data[place + 1 :])
        before, broken = walked(path)
        assert broken is not None
        assert (broken.entry, len(before)) == (entry, entry - 1), place


@pytest.mark.parametrize("change", ["swapped", "first gone", "middle gone", "twice", "torn"])
def test_entries_that_are_moved_removed_or_torn_are_found(tmp_path: Path, change: str) -> None:
    path = written(tmp_path)
    one, two, three = path.read_bytes().splitlines(keepends=True)
    changed, entry = {
        "swapped": (one + three + two, 2),
        "first gone": (two + three, 1),
        "middle gone": (one + three, 2),
        "twice": (one + two + two + three, 3),
        "torn": (one + two + three[:-9], 3),
    }[change]
    path.write_bytes(changed)
    said = f"entry {entry}: expected the entry as it was written"
    with pytest.raises(ValueError, match=said):
        read_chain(path)
    with pytest.raises(ValueError, match=said):
        append(path, {})
    assert path.read_bytes() == changed


def test_killed_at_any_moment_the_ledger_is_the_last_whole_one(tmp_path: Path) -> None:
    """A process dies before its n-th event on the disk, for every n."""
    outcomes, status = set[int](), -1
    for event in range(40):
        folder = tmp_path / str(event)
        path = written(folder)
        before = path.read_bytes()
        status = _killed(folder, path, event)
        after = path.read_bytes()
        assert slow.chain_holds(after)
        assert after.startswith(before)
        outcomes.add(len(read_chain(path)))
        with held(folder):  # the lock died with it, and what it left unfinished is removed
            assert [other.name for other in folder.iterdir() if other.is_file()] in (
                [LEDGER, ".lock"],
                [".lock", LEDGER],
            )
        if status == 0:
            assert len(read_chain(path)) == 4
            break
    assert status == 0
    assert outcomes == {3, 4}


def _killed(folder: Path, path: Path, event: int) -> int:
    child = os.fork()
    if not child:
        count = 0

        def happened(name: str, values: tuple[Any, ...]) -> None:
            nonlocal count
            if name in ("open", "os.rename", "os.remove", "os.mkdir") and "/dev/" not in str(values[0]):
                if count == event:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        fsync = os.fsync

        def counted(file: int) -> None:
            sys.audit("os.remove", "fsync", -1)
            fsync(file)

        code = 9
        try:
            os.fsync = counted
            sys.addaudithook(happened)
            with held(folder):
                append(path, {"n": 4})
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_two_processes_cannot_write_at_once(tmp_path: Path) -> None:
    child_holds, parent_is_done = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        with held(tmp_path):
            os.write(child_holds[1], b"1")
            os.read(parent_is_done[0], 1)
        os._exit(0)
    os.read(child_holds[0], 1)
    with (
        pytest.raises(FileExistsError, match="--ledger: expected a ledger that no other run works with"),
        held(tmp_path),
    ):
        pass
    os.write(parent_is_done[1], b"1")
    os.waitpid(child, 0)
    with held(tmp_path):
        pass


def test_an_error_inside_the_block_is_not_said_to_be_the_lock(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="mine"), held(tmp_path):
        raise FileExistsError("mine")
