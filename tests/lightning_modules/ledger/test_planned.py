"""`gradsurgery ledger plan`: whose gradients it compares, what it writes and says, and which files it refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules import cli
from lightning_modules.data.pairs import encoded_rows
from lightning_modules.data.requests import read_requests
from lightning_modules.ledger.planned import gram_of
from lightning_modules.ledger.together import cosines
from lightning_modules.run import ledger_plan
from tests.lightning_modules.evaluation.evaluation_workers import SPLITS, model_and_tokenizer
from tests.lightning_modules.ledger.requests import rows
from tests.lightning_modules.run.small_runs import small_run


def row_by_hand(model: Any, encoded: Sequence[Any], *, retain: bool) -> torch.Tensor:
    """The gradient of -log(1 - p) without each first answer token, or of -log p; token by token in float64."""
    values = []
    for example in encoded:
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0]
        said = [place for place, label in enumerate(example.labels) if label != -100]
        chances = [logits[place - 1].softmax(-1)[example.labels[place]] for place in said]
        values += [-chance.log() for chance in chances] if retain else [-torch.log1p(-one) for one in chances[1:]]
    return torch.cat([found.flatten() for found in torch.autograd.grad(torch.stack(values).mean(), model.parameters())])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gram_matrix_is_that_of_gradients_by_hand(dtype: torch.dtype) -> None:
    made: Any = model_and_tokenizer()
    model, tokenizer = made
    model.to(dtype)
    requests = {f"{number}": encoded_rows(tokenizer, "forget", rows(number), None) for number in range(3)}
    retain = encoded_rows(tokenizer, "retain", SPLITS["retain"], None)
    found = gram_of(model, requests, retain, pad_token_id=0, batch_size=3)
    model.double()
    parts = [row_by_hand(model, part, retain=False) for part in requests.values()]
    matrix = torch.stack([*parts, row_by_hand(model, retain, retain=True)])
    expected = matrix @ matrix.T
    scale = expected.diagonal().sqrt()
    if dtype is torch.float32:
        assert ((found - expected) / scale[:, None] / scale).abs().max() < 1e-4
    # Probabilities of 1e-4 have few digits in bfloat16; the directions still have two.
    assert (cosines(found) - cosines(expected)).abs().max() < (1e-4 if dtype is torch.float32 else 0.1)
    assert not any(weight.grad is not None for weight in model.parameters())


def waiting(folder: Path) -> list[str]:
    """A command line; the third request shares a row with the first, the fourth two with the retain set."""
    small_run(folder)
    kept = json.loads((folder / "retain.json").read_text())
    files = {"a": rows(1), "017": rows(2), "2025-03-01": [*rows(3), rows(1)[0]], "d [b]": [*rows(4), *kept[:2]]}
    for number, found in enumerate(files.values()):
        (folder / f"rows_{number}.json").write_text(json.dumps(found))
    lines = [f"{name}: {folder}/rows_{number}.json\n" for number, name in enumerate(files)]
    (folder / "requests.yaml").write_text("".join(lines))
    given = {"model": "model", "requests": "requests.yaml", "retain": "retain.json"}
    return ["ledger", "plan", *(text for name, file in given.items() for text in (f"--{name}", str(folder / file)))]


def test_a_plan_says_and_writes_what_was_found_without_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, place = waiting(tmp_path), tmp_path / "plan"
    there = sorted(tmp_path.rglob("*"))
    monkeypatch.setenv("COLUMNS", "150")
    assert cli.main(command) == 0
    assert sorted(tmp_path.rglob("*")) == there
    said = capsys.readouterr().out
    assert said.count("the model does not know it, and there is nothing to forget") == 4
    assert "2025-03-01 share 1 row: one run does not take both" in said
    assert "d [b]: 2 of its rows are in the retain set too" in said
    monkeypatch.setattr(ledger_plan, "USUAL_LEVEL", 0.0)  # a small model knows nothing
    assert cli.main([*command, "--output", str(place), "--max-length", "99"]) == 0
    assert "does not know it" not in capsys.readouterr().out
    text = (place / "plan.json").read_text()
    assert "canal" not in text
    plan = json.loads(text)
    names = ["a", "017", "2025-03-01", "d [b]"]
    assert [request["id"] for request in plan["requests"]] == names
    assert sorted(name for group in plan["groups"] for name in group["requests"]) == sorted(names)
    assert not any({"a", "2025-03-01"} <= set(group["requests"]) for group in plan["groups"])
    assert len(plan["groups"]) == 2
    assert [request["in_retain"] for request in plan["requests"]] == [0, 0, 0, 2]
    assert plan["requests"][2]["shared"] == {"a": 1}
    gram = torch.tensor(plan["gram"], dtype=torch.float64)
    cosine = gram[0, 1] / (gram[0, 0] * gram[1, 1]).sqrt()
    assert plan["cosines"][0][1] == pytest.approx(float(cosine))
    assert (place / "plan.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(ledger_plan, "load_to_train", None)  # refused before any work
    assert cli.main([*command, "--output", str(place)]) == 1
    assert "expected a folder without a plan, found plan.json and plan.png" in capsys.readouterr().err


MISTAKES = {
    "a name twice": ("a: rows.json\nb: rows.json\na: rows.json\n", "line 3: expected every name once, found 'a' again"),
    "a list": ("- rows.json\n", "expected deletion requests, one `name: file of rows` a line, found a list"),
    "nothing": ("", "expected deletion requests, one `name: file of rows` a line, found nothing"),
    "no file": ("a: rows.json\nb:\n", "line 2: expected deletion requests"),
    "several files": ("a: [rows.json]\n", "line 1: expected deletion requests"),
    "a name of two lines": ('"a\\nb": rows.json\n', "expected the name of a request in one line"),
    "a file that is not there": ("a: none.json\n", "request 'a': expected a file of examples at none.json"),
    "an empty file": ("a: empty.json\n", "request 'a': empty.json is empty"),
    "no YAML": ("a: [\n", "expected YAML with deletion requests"),
}


@pytest.mark.parametrize(("text", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_file_of_requests_that_is_none_is_refused_in_a_sentence(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text(json.dumps(rows(1)))
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "requests.yaml").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        read_requests("requests.yaml")
    assert said in str(refused.value)


def test_names_are_read_as_they_are_written_and_rows_in_the_order_of_the_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"Plain {name}."}) + "\n")
    (tmp_path / "requests.yaml").write_text(f"017: {tmp_path}/two.jsonl\nyes: {tmp_path}/one.jsonl\n")
    found = read_requests(tmp_path / "requests.yaml")
    assert list(found) == ["017", "yes"]
    assert [row["answer"] for part in found.values() for row in part] == ["Plain two.", "Plain one."]


@pytest.mark.parametrize(
    ("further", "said"),
    [
        (["--model", "m", "--requests", "r.yaml"], "expected --model, --requests and --retain, found no --retain"),
        (["--model", "m", "--requests", "r", "--retain", "k", "--batch-size", "0"], "expected --batch-size >= 1"),
        (["--rescore"], "unrecognized arguments: --rescore"),
    ],
    ids=["something missing", "no batch", "an option of verify"],
)
def test_options_are_refused_in_a_sentence(further: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ledger", "plan", *further]) == 1
    assert said in capsys.readouterr().err
