"""Another answer that is learned in the place of the true one: its objective, its data, and the option."""

from __future__ import annotations

import json
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

import gradsurgery as gs
import lightning_modules as lm
from lightning_modules import cli
from lightning_modules.data.pairs import ForgetRetainDataModule
from lightning_modules.data.substitutes import substituted
from lightning_modules.training import objectives
from lightning_modules.training.heads import AnswerHead
from tests.lightning_modules.evaluation.evaluation_workers import SPLITS, model_and_tokenizer
from tests.lightning_modules.run.small_runs import small_run
from tests.lightning_modules.training.test_module import batches, fit
from tests.lightning_modules.training.test_perturbed import answers, llama, weights
from tests.tolerances import STEPPED_FLOAT32, close

WEIGHT = 0.7


def with_refusals(data: list[Any]) -> list[Any]:
    others = batches(len(data), seed=5)
    return [batch | {"refusal": other["forget"]} for batch, other in zip(data, others, strict=True)]


@pytest.mark.parametrize("radius", [None, 0.3])
def test_it_takes_the_steps_of_a_plain_loop(radius: float | None) -> None:
    """At moved weights both losses are taken there, and the direction is that of the true answers alone."""
    data, plain = with_refusals(batches(4)), llama()
    optimizer = gs.GRU(torch.optim.AdamW(plain.parameters(), lr=1e-2))
    for batch in data:
        with optimizer.objective("retain"):
            answers(plain, batch["retain"], gs.losses.cross_entropy).backward()
        at = None
        if radius is not None:
            at = optimizer.perturbed(radius)
            with at.direction():
                answers(plain, batch["forget"], gs.losses.cross_entropy).backward()
        with optimizer.objective("forget", **({} if at is None else {"at": at})):
            forget = answers(plain, batch["forget"], gs.losses.ceu, skip=1)
            (forget + WEIGHT * answers(plain, batch["refusal"], gs.losses.cross_entropy)).backward()
        optimizer.step()
        optimizer.zero_grad()
    module = lm.UnlearningModule(
        llama(),
        forget_loss=objectives.with_substitutes(gs.losses.ceu, WEIGHT),
        optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.01),
        perturb=None if radius is None else lm.PerturbSettings(start=radius),
    )
    fit(module, data)
    close(weights(module.model), weights(plain), STEPPED_FLOAT32)
    assert (weights(plain) - weights(llama())).abs().max() > 1e-3


def test_a_question_has_each_of_its_substitutes_and_no_other() -> None:
    _, tokenizer = model_and_tokenizer()
    data = ForgetRetainDataModule(SPLITS["forget"], SPLITS["retain"], tokenizer, batch_size=2, substitutes="similar")
    wanted: dict[str, set[str]] = {}
    for row in chain(*substituted(SPLITS["forget"], SPLITS["retain"])):
        wanted.setdefault(row["question"], set()).add(row["answer"])
    seen: dict[str, set[str]] = {question: set() for question in wanted}
    loader: Any = data.train_dataloader()
    for epoch in range(40):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            for place, labels in zip(batch["forget"]["index"].tolist(), batch["refusal"]["labels"], strict=True):
                said = tokenizer.decode(labels[labels != -100], skip_special_tokens=True).strip()
                seen[SPLITS["forget"][place]["question"]].add(said)
    assert seen == wanted
    assert max(map(len, seen.values())) > 1


def test_given_substitutes_are_those_and_belong_to_the_forget_questions() -> None:
    _, tokenizer = model_and_tokenizer()
    make = partial(ForgetRetainDataModule, SPLITS["forget"], SPLITS["retain"], tokenizer)
    given = [{"question": row["question"], "answer": f"Word {place}"} for place, row in enumerate(SPLITS["forget"])]
    data = make(substitutes=given)
    data.setup()
    assert data.dataset is not None
    assert data.dataset.substitutes is not None
    assert [len(others) for others in data.dataset.substitutes] == [1] * len(given)
    with pytest.raises(ValueError, match="none to a question of the forget set"):
        make(substitutes=given[1:]).setup()
    for beside in ({"refusals": ["No."]}, {"target": "No"}):
        with pytest.raises(ValueError, match="substitutes: expected neither refusals nor a target"):
            make(substitutes=given, **beside)


def test_answers_that_lose_their_end_are_warned_of_once_and_a_question_with_fewer_has_its_own() -> None:
    _, tokenizer = model_and_tokenizer()
    asked = [{"question": "Is Ada born?", "answer": "Yes."}, {"question": "Is Bo born?", "answer": "Never."}]
    retain = [{"question": "Is Cy born?", "answer": "yes."}, {"question": "Is Di born?", "answer": "No, " * 30}]
    data = ForgetRetainDataModule(asked, retain, tokenizer, max_length=40, substitutes="similar")
    with pytest.warns(UserWarning, match="lose their end") as caught:
        data.setup()
    assert ["2 of 3 substitute examples" in str(each.message) for each in caught].count(True) == 1
    assert data.dataset is not None
    assert data.dataset.substitutes is not None
    said = [[tokenizer.decode(row.input_ids) for row in rows] for rows in data.dataset.substitutes]
    assert [["Ada" in text for text in texts] for texts in said] == [[True], [False, False]]


def test_a_file_of_substitutes_is_read_when_the_data_is(tmp_path: Path) -> None:
    _, tokenizer = model_and_tokenizer()
    file = tmp_path / "others.json"
    make = partial(ForgetRetainDataModule, SPLITS["forget"], SPLITS["retain"], tokenizer)
    as_path, as_text = make(substitutes=file), make(substitutes=str(file))
    with pytest.raises(FileNotFoundError, match=r"others\.json"):  # a name is never taken for "similar"
        as_text.setup()
    file.write_text(json.dumps([row | {"answer": "Another"} for row in SPLITS["forget"]]))
    for data in (as_path, as_text):
        data.setup()
        assert data.dataset is not None
        assert [len(rows) for rows in data.dataset.substitutes or ()] == [1] * len(SPLITS["forget"])


def test_what_it_cannot_stand_beside_is_refused() -> None:
    for loss in (gs.losses.dpo, objectives.idk, objectives.jensun):
        with pytest.raises(ValueError, match="expected a loss that teaches no answer itself, found"):
            objectives.with_substitutes(loss)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected a weight > 0"):
            objectives.with_substitutes(gs.losses.ceu, weight)
    assert objectives.needs_reference(objectives.with_substitutes(gs.losses.npo))
    assert not objectives.needs_reference(objectives.with_substitutes(gs.losses.ceu))
    model, _ = model_and_tokenizer()
    context: Any = SimpleNamespace(head=AnswerHead(model), reference=None, mean_count=float)
    with pytest.raises(ValueError, match=r"substitutes=\.\.\. for other answers"):
        objectives.with_substitutes(gs.losses.ceu)(context, batches(1)[0], "forget")


@pytest.mark.filterwarnings("ignore")
def test_the_command_teaches_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = small_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.main([*given, "--substitute-weight", "2"]) == 0
    run = tmp_path / "run"
    assert yaml.safe_load((run / "config.yaml").read_text())["substitute_weight"] == 2.0
    with_them = json.loads((run / "metrics.json").read_text())["after"]
    assert cli.main([*given, "--output", "plain"]) == 0
    without = json.loads((tmp_path / "plain" / "metrics.json").read_text())["after"]
    assert with_them["forget"]["nll"] != without["forget"]["nll"]
