"""JensUn: the target's tokens in the place of each answer's labels, and the divergence from them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import gradsurgery as gs
from lightning_modules.data.pairs import TARGET, ForgetRetainDataModule
from lightning_modules.training import objectives
from lightning_modules.training.heads import AnswerHead
from tests.lightning_modules.evaluation.evaluation_workers import SPLITS, model_and_tokenizer
from tests.reference import losses as label_reference


def labels_of_target(labels: Tensor, tokens: list[int]) -> Tensor:
    found = labels.clone()
    for row in found:
        place = 0
        for position, label in enumerate(row.tolist()):
            if label != -100:
                row[position] = tokens[place % len(tokens)]
                place += 1
    return found


def test_the_objective_teaches_the_target_in_every_place_and_reads_the_answer() -> None:
    model, tokenizer = model_and_tokenizer()
    data = ForgetRetainDataModule(SPLITS["forget"], SPLITS["retain"], tokenizer, batch_size=3, target=TARGET)
    data.setup()
    batch: Any = next(iter(data.train_dataloader()))
    forget, tokens = batch["forget"], tokenizer(TARGET, add_special_tokens=False)["input_ids"]
    assert torch.equal(batch["refusal"]["input_ids"], forget["input_ids"])
    wanted = labels_of_target(forget["labels"], tokens)
    assert torch.equal(batch["refusal"]["labels"], wanted)
    context: Any = SimpleNamespace(
        head=AnswerHead(model), reference=None, mean_count=lambda count: torch.tensor(float(count))
    )
    found = objectives.objective(objectives.by_name("jensun"))(context, batch, "forget")
    logits = model(input_ids=forget["input_ids"], attention_mask=forget["attention_mask"]).logits.double()
    rows, labels = gs.losses.answer_tokens(logits, wanted)
    values = [label_reference.jensen_shannon_label(row, int(label)) for row, label in zip(rows, labels, strict=True)]
    torch.testing.assert_close(found.double(), torch.stack(values).mean(), rtol=1e-5, atol=0)


def test_a_target_is_no_refusal() -> None:
    _, tokenizer = model_and_tokenizer()
    for given in ({"target": " "}, {"target": "No", "refusals": ["Never."]}):
        with pytest.raises(ValueError, match="target: expected a text, and no refusals"):
            ForgetRetainDataModule(SPLITS["forget"], SPLITS["retain"], tokenizer, **given)


def test_as_a_retain_loss_it_asks_for_the_start_model_and_its_logits() -> None:
    assert objectives.needs_logits(objectives.by_name("jensen_shannon"))
    assert objectives.needs_target(objectives.by_name("jensun"))
    assert not objectives.needs_target(gs.losses.jensen_shannon_label)
