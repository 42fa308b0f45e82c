"""Any flipped bit, in whatever an entry names, is found at its entry; scores are computed again without training code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_modules import cli
from lightning_modules.ledger.chain import append, read_chain
from lightning_modules.ledger.hashes import other_files, tensors_hash
from lightning_modules.ledger.verify import _model, verify
from tests.lightning_modules.ledger.requests import rows
from tests.test_rooms import FILES, imported


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << (place % 8)
    path.write_bytes(data)


def found(folder: Path, head: str | None = None) -> list[int]:
    return [finding.entry for finding in verify(folder / "ledger", head)[1]]


def test_what_is_as_it_was_written_passes_by_command_with_its_scores(
    two_requests: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = read_chain(two_requests / "ledger" / "ledger.jsonl")[-1]["hash"]
    assert cli.main(["ledger", "verify", str(two_requests / "ledger"), "--rescore", "--head", last]) == 0
    assert (
        f"2 entries: chain, criteria, runs and models, and the scores, are as they were written; the last hash is {last}"
        in (capsys.readouterr().out)
    )


@pytest.mark.supports(
    "The command", "`--ledger`: whatever was changed in record, model or criteria is found at its entry"
)
@pytest.mark.parametrize("entry", [1, 2])
def test_a_flipped_bit_is_found_at_its_entry(ledger: Path, entry: int) -> None:
    said = read_chain(ledger / "ledger" / "ledger.jsonl")[entry - 1]
    run = ledger / f"run_{entry}"
    kept = [ledger / "ledger" / one["file"] for one in said["kept"].values()]
    files = [
        *kept,
        *(run / name for name in said["evidence"]),
        *(run / "model" / name for name in said["model"]["files"]),
    ]
    assert len(files) > 8
    for path in files:
        whole = path.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            flip(path, place)
            assert found(ledger) == [entry], (path, place)
            path.write_bytes(whole)
    assert found(ledger) == []


def test_a_flipped_bit_of_any_tensor_is_found_at_its_entry(ledger: Path) -> None:
    path = ledger / "run_1" / "model" / "model.safetensors"
    whole = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        count = len(file.keys())
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    places = [8 + length + entry["data_offsets"][1] - 3 for name, entry in header.items() if name != "__metadata__"]
    assert len(places) == count > 5
    for place in places:
        flip(path, place)
        assert found(ledger) == [1]
        path.write_bytes(whole)
    path.write_bytes(whole[:-1])
    assert found(ledger) == [1]


def test_criteria_that_were_changed_are_found_at_every_entry_that_they_were_given_for(ledger: Path) -> None:
    (path,) = (ledger / "ledger" / "criteria").iterdir()
    flip(path, 20)
    assert found(ledger) == [1, 2]


def test_a_broken_chain_another_head_and_what_is_gone_are_named(
    ledger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(ledger / "ledger")
    assert found(ledger, head="0123456789ab") == [0]
    shutil.rmtree(ledger / "run_1" / "model")
    assert cli.main(["ledger", "verify", place]) == 1
    said = capsys.readouterr()
    assert "(gone)" in said.out
    assert "--allow-missing lets pass what is gone" in said.err
    assert cli.main(["ledger", "verify", place, "--allow-missing"]) == 0
    (ledger / "run_2" / "model" / "further.bin").write_bytes(b"")
    assert cli.main(["ledger", "verify", place, "--allow-missing"]) == 1
    assert "further.bin was not there" in capsys.readouterr().out
    path = ledger / "ledger" / "ledger.jsonl"
    flip(path, len(path.read_bytes()) - 40)
    assert cli.main(["ledger", "verify", place]) == 1
    assert "Entry 2: expected the entry as it was written" in capsys.readouterr().out
    assert cli.main(["ledger", "show", place]) == 1
    assert "ledger.jsonl, entry 2: expected the entry as it was written" in capsys.readouterr().err


def test_scores_that_another_model_has_are_found_by_scoring_again(ledger: Path) -> None:
    """A forger who writes all hashes anew is found by the scores; where the text is gone, by those of what is kept."""
    from lightning_modules.ledger.rescore import rescore

    entries = read_chain(ledger / "ledger" / "ledger.jsonl")
    assert list(rescore(ledger / "ledger", entries[1])) == []
    wrong = json.loads(json.dumps(entries[1]))
    wrong["metrics"]["after"]["retain"]["nll"] -= 0.1
    assert [finding.entry for finding in rescore(ledger / "ledger", wrong)] == [2]
    (retain := ledger / "retain.json").rename(ledger / "away")
    lost = list(rescore(_moved(ledger), wrong))
    assert [(finding.entry, finding.gone) for finding in lost] == [(2, True)]
    assert "the data of retain is gone" in lost[0].said
    (ledger / "away").rename(retain)
    (ledger / "forget_2.json").write_text(json.dumps(rows(9)))
    gone = list(rescore(_moved(ledger), entries[1]))
    assert [(finding.entry, finding.gone) for finding in gone] == [(2, True)]
    assert "the text of the request is gone" in gone[0].said


def _moved(folder: Path) -> Path:
    """The ledger, whose runs read the data of this folder."""
    for config in folder.glob("run_*/config.yaml"):
        lines = config.read_text().splitlines()
        changed = [
            f"{line.partition(':')[0]}: {folder / Path(line.partition(': ')[2]).name}"
            if line.startswith(("forget: ", "retain: "))
            else line
            for line in lines
        ]
        config.write_text("\n".join(changed))
    return folder / "ledger"


def test_scoring_again_imports_nothing_that_trains() -> None:
    seen, todo = set[str](), ["lightning_modules.ledger.rescore"]
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo += [
                name for name in imported(FILES[module].read_text()) if name not in ("gradsurgery", "lightning_modules")
            ]
    assert "lightning_modules.evaluation.evaluate" in seen
    trains = ("lightning_modules.training", "lightning_modules.run", "gradsurgery.optimizer")
    assert [module for module in seen if module.startswith(trains)] == []


def test_the_report_says_it_in_words_and_a_picture(ledger: Path) -> None:
    assert cli.main(["ledger", "report", str(ledger / "ledger")]) == 0
    page = (ledger / "ledger" / "report.html").read_text()
    for text in (
        "2 requests",
        "the second: forgotten",
        "Everything that this record names is as it was written.",
        "<svg",
    ):
        assert text in page
    assert "by the canal" not in page
    assert (ledger / "ledger" / "requests.png").read_bytes().startswith(b"\x89PNG")
    flip(ledger / "run_2" / "metrics.json", 9)
    assert cli.main(["ledger", "report", str(ledger / "ledger")]) == 0
    assert "Not everything that this record names" in (ledger / "ledger" / "report.html").read_text()


def test_a_request_that_does_not_begin_where_the_one_before_ended_is_found(ledger: Path) -> None:
    path = ledger / "ledger" / "ledger.jsonl"
    first, second = read_chain(path)
    second["model"]["before"] = "0" * 64
    path.unlink()
    for entry in (first, second):
        append(path, {key: value for key, value in entry.items() if key not in ("number", "previous", "hash")})
    findings = verify(ledger / "ledger")[1]
    assert [(finding.entry, finding.gone) for finding in findings] == [(2, False)]
    assert "begin with the model that the entry before left" in findings[0].said


def test_a_file_beside_the_tensors_that_is_gone_new_or_another_is_found(tmp_path: Path) -> None:
    def said() -> list[str]:
        return [finding.said.rpartition(".json ")[2] for finding in _model(3, tmp_path, {"model": model})]

    save_file({"weight": torch.arange(3.0)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    model = {"after": tensors_hash(tmp_path), "files": other_files(tmp_path)}
    assert said() == []
    (tmp_path / "config.json").write_text("{ }")
    assert said() == ["is another"]
    (tmp_path / "config.json").unlink()
    assert said() == ["is not there"]
    (tmp_path / "tokenizer.json").write_text("{}")
    assert said() == ["is not there", "was not there"]
