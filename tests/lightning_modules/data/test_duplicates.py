"""Rows that occur more than once: said, and each with what is its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_modules.data.pairs import ForgetRetainDataModule
from lightning_modules.data.tofu import tofu_examples
from tests.lightning_modules.data.chat_templates import byte_level

ROWS = [{"question": "Who?", "answer": answer} for answer in ("Ada.", "Bo.", "Cy.")]


def written(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows))


def test_rows_that_repeat_are_warned_about_with_their_number() -> None:
    data = ForgetRetainDataModule([*ROWS, ROWS[1], {"question": "When?", "answer": "Ada."}], ROWS, byte_level(None))
    with pytest.warns(UserWarning, match=r"1 of 5 forget examples repeat .*such as 'Who\?'") as caught:
        data.setup()
    data.setup()
    assert len(caught) == 1


def test_rows_that_repeat_a_question_and_answer_keep_their_own_wrong_answers(tmp_path: Path) -> None:
    same = {"question": "Who?", "answer": "Ada."}
    perturbed = [{**same, "paraphrased_answer": "It is Ada.", "perturbed_answer": [wrong]} for wrong in ("Bo.", "Cy.")]
    for name, rows in (("forget01", [same, same]), ("retain99", [same, same, same]), ("forget01_perturbed", perturbed)):
        written(tmp_path / f"{name}.json", rows)
    written(tmp_path / "retain_perturbed.json", perturbed)
    splits = tofu_examples("forget01", tmp_path)
    assert [row["perturbed_answer"] for row in splits["forget"]] == [["Bo."], ["Cy."]]
    assert [row.get("perturbed_answer") for row in splits["retain"]] == [["Bo."], ["Cy."], None]
