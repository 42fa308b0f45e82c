"""Earlier requests as protected rows: which gradient each is, that no step raises them, and whose turn it is."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
import pytest
import torch

import gradsurgery as gs
from lightning_modules.data.earlier import EarlierData
from lightning_modules.data.pairs import ForgetRetainDataModule, encoded_rows
from lightning_modules.ledger.sketch import dense, request_gradient, share_kept, sketched
from lightning_modules.training.protecting import ProtectingModule
from lightning_modules.training.trainer import trainer_options
from tests import tolerances
from tests.lightning_modules.evaluation.evaluation_workers import SPLITS, model_and_tokenizer
from tests.lightning_modules.ledger.requests import rows


def by_hand(model: Any, encoded: Any) -> dict[str, torch.Tensor]:
    """The gradient of the mean of -log(1 - p) over all answer tokens but the first of each, row by row in float64."""
    model = model.double()
    values = []
    for example in encoded:
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0]
        said = [place for place, label in enumerate(example.labels) if label != -100][1:]
        values += [-torch.log1p(-logits[place - 1].softmax(-1)[example.labels[place]]) for place in said]
    found = torch.autograd.grad(torch.stack(values).mean(), list(model.parameters()))
    return dict(zip((name for name, _ in model.named_parameters()), found, strict=True))


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    length = sum(float(value.double().square().sum()) for value in other.values()) ** 0.5
    apart = sum(float((one[name].double() - other[name].double()).square().sum()) for name in other) ** 0.5
    return apart <= 1e-4 * length  # float32 against float64


def test_the_gradient_of_a_request_is_that_by_hand_whatever_the_batches() -> None:
    model, tokenizer = model_and_tokenizer()
    encoded = encoded_rows(tokenizer, "forget", SPLITS["forget"], None)
    found = [request_gradient(model, encoded, pad_token_id=0, batch_size=size) for size in (2, 8)]
    assert not any(weight.grad is not None for weight in model.parameters())
    expected = by_hand(model, encoded)
    assert close(found[0], expected)
    assert close(found[1], expected)


def test_a_sketch_is_the_nearest_gradient_of_its_rank_and_says_how_much_it_has() -> None:
    gradient = {"matrix": torch.randn(20, 12), "long": torch.randn(4, 40), "norm": torch.randn(7)}
    for rank in (1, 2, 3, 12):
        kept = sketched(gradient, rank)
        found = dense(kept)
        whole = sum(float(value.square().sum()) for value in gradient.values())
        lost = 0.0
        for name, value in gradient.items():
            if value.dim() == 2 and rank * sum(value.shape) < value.numel():
                # Eckart and Young: no matrix of this rank is nearer.
                lost += float(torch.linalg.svdvals(value)[rank:].square().sum())
            else:
                torch.testing.assert_close(found[name], value)
        apart = sum(float((found[name] - value).square().sum()) for name, value in gradient.items())
        assert apart == pytest.approx(lost, rel=1e-3, abs=1e-6)
        assert share_kept(gradient, kept) == pytest.approx(1 - lost / whole, rel=1e-4)
    small = sum(value.numel() for value in sketched(gradient, 1).values())
    assert small == 20 + 12 + 4 + 40 + 7


class Steps(L.Callback):
    """What each step knew: the rows' products with the update, and the loss of each objective."""

    def __init__(self) -> None:
        self.changes: list[torch.Tensor] = []
        self.batches: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.changes.append(pl_module.surgery.record.predicted_change)
        self.batches.append({name: part["index"].tolist() for name, part in batch.items()})


def train(sketches: Any, texts: Any, epochs: int = 2, **options: Any) -> tuple[ProtectingModule, Steps]:
    model, tokenizer = model_and_tokenizer()
    data = ForgetRetainDataModule(SPLITS["forget"], SPLITS["retain"], tokenizer, batch_size=2)
    found = {name: [encoded_rows(tokenizer, name, entry, None) for entry in entries] for name, entries in texts.items()}
    surgery = partial(gs.GradientSurgery, rule=gs.rules.gru)
    module = ProtectingModule(model, texts=list(found), sketches=sketches, surgery=surgery, **options)
    steps = Steps()
    trainer = L.Trainer(**trainer_options(max_epochs=epochs, callbacks=[steps], accelerator="cpu"))
    trainer.fit(module, EarlierData(data, found))
    return module, steps


def test_no_step_raises_an_earlier_request_to_first_order_and_the_rows_are_what_they_stand_for() -> None:
    model, _ = model_and_tokenizer()
    sketch = {name: torch.randn_like(weight) for name, weight in model.named_parameters()}
    module, steps = train({"earlier_1": [sketch]}, {"earlier_0": [rows(1)]})
    assert module.surgery.objectives == ("forget", "retain", "earlier_0", "earlier_1")
    for change in steps.changes:
        assert (change[1:] <= 1e-6).all(), change
    record = module.surgery.record
    assert record is not None
    length = sum(float(value.double().square().sum()) for value in sketch.values())
    assert float(record.gram[3, 3]) == pytest.approx(length, rel=tolerances.GRAM[torch.float32].relative)


def test_requests_take_turns_and_every_row_of_each_comes_before_any_comes_twice() -> None:
    _, steps = train(None, {"earlier_0": [rows(1, 3), rows(2, 4)]}, epochs=4)
    places = [batch["earlier_0"] for batch in steps.batches]
    assert len(places) == 12
    assert all(len(one) == 2 for one in places)
    first, second = ([place for batch in places[turn::2] for place in batch] for turn in (0, 1))
    assert sorted(first[:3]) == [0, 1, 2]
    assert sorted(first[3:6]) == [0, 1, 2]
    assert sorted(second[:4]) == [0, 1, 2, 3]
    assert sorted(second[4:8]) == [0, 1, 2, 3]


def test_a_sketch_of_another_model_is_refused() -> None:
    with pytest.raises(
        ValueError, match="earlier_0: expected a sketch of the weights that are trained, found another at"
    ):
        train({"earlier_0": [{"weight": torch.ones(2)}]}, {})


def test_the_sketches_of_a_request_take_turns() -> None:
    model, _ = model_and_tokenizer()
    sketches = [{name: torch.full_like(weight, size) for name, weight in model.named_parameters()} for size in (1, 2)]
    number = sum(weight.numel() for weight in model.parameters())
    module, steps = train({"earlier": sketches}, {})
    record = module.surgery.record
    assert record is not None
    size = 1 + (len(steps.changes) - 1) % 2
    assert size == 2, "an even number of steps, or this test means nothing"
    assert float(record.gram[2, 2]) == pytest.approx(size**2 * number, rel=1e-4)
