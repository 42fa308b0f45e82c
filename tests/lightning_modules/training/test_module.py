"""UnlearningModule under Lightning: the same step as a plain loop, whatever the batch is divided into."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import gradsurgery as gs
import lightning_modules as lm
from lightning_modules.data.tokenization import Encoded
from tests.tolerances import STEPPED_FLOAT32, close

VOCABULARY = 11


class Bigram(nn.Module):
    """The smallest causal language model: logits of the next token from this one."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=self.table[input_ids] * attention_mask[..., None])


def batches(number: int, size: int = 4, seed: int = 0, masked: int | None = None) -> list[dict[str, dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)

    def batch(index: int) -> dict[str, Tensor]:
        tokens = torch.randint(VOCABULARY, (size, 7), generator=generator)
        prompt = torch.randint(1, 6, (size, 1), generator=generator)
        labels = tokens.masked_fill(torch.arange(7) < prompt, -100)
        return {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "labels": torch.full_like(labels, -100) if index == masked else labels,
        }

    return [{"forget": batch(index), "retain": batch(-1)} for index in range(number)]


def fit(module: L.LightningModule, data: list[Any], **options: Any) -> L.Trainer:
    defaults = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False}
    trainer = L.Trainer(**defaults | quiet | options)
    trainer.fit(module, DataLoader(data, batch_size=None))
    return trainer


def plain_loop(data: list[Any], forget_loss: Any, skip: int) -> Tensor:
    model = Bigram()
    optimizer = gs.GRU(torch.optim.AdamW(model.parameters(), lr=1e-2))
    for batch in data:
        for name, function, first in (("retain", gs.losses.cross_entropy, 0), ("forget", forget_loss, skip)):
            with optimizer.objective(name):
                logits = model(batch[name]["input_ids"], batch[name]["attention_mask"]).logits
                tokens = gs.losses.answer_tokens(logits, batch[name]["labels"], skip_first=first)
                gs.losses.token_mean(function(*tokens), tokens[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.table.detach()


@pytest.mark.parametrize(("loss", "skip"), [(gs.losses.ceu, 1), (gs.losses.gradient_ascent, 0)])
def test_it_takes_the_steps_of_a_plain_loop(loss: Any, skip: int) -> None:
    data = batches(6)
    module = lm.UnlearningModule(Bigram(), forget_loss=loss, optimizer=partial(torch.optim.AdamW, lr=1e-2))
    trainer = fit(module, data)
    assert trainer.global_step == 6
    close(module.model.table.detach(), plain_loop(data, loss, skip), STEPPED_FLOAT32)


def test_an_all_masked_forget_batch_changes_nothing_but_by_retention() -> None:
    module = lm.UnlearningModule(Bigram(), optimizer=partial(torch.optim.SGD, lr=1e-2))
    fit(module, batches(1, masked=0))
    assert torch.equal(module.model.table.detach(), Bigram().table.detach())  # GRU adds nothing where nothing conflicts


def test_any_model_any_losses_and_any_surgery() -> None:
    def confidence(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.softmax(logits, -1).gather(1, labels[:, None]).squeeze(1)

    surgery = partial(gs.GradientSurgery, rule="cagrad", guard="update", max_norm=0.5)
    module = lm.UnlearningModule(Bigram(), forget_loss=confidence, retain_loss=gs.losses.ceu, surgery=surgery)
    fit(module, batches(2))
    assert module.surgery.record.applied


def test_warm_up_rises_to_the_learning_rate_and_stays() -> None:
    rates: list[float] = []

    class Rates(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = lm.UnlearningModule(Bigram(), optimizer=partial(torch.optim.SGD, lr=1.0), warmup_steps=4)
    fit(module, batches(6), callbacks=[Rates()])
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_one_step_of_warm_up_is_none() -> None:
    module = lm.UnlearningModule(Bigram(), optimizer=partial(torch.optim.SGD, lr=1.0), warmup_steps=1)
    trainer = fit(module, batches(2))
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1.0


def test_a_plain_optimizer_is_refused() -> None:
    module = lm.UnlearningModule(Bigram(), surgery=lambda base: base)
    with pytest.raises(TypeError, match="GradientSurgery"):
        fit(module, batches(1))


def test_the_logger_writes_one_row_a_step_with_accumulation(tmp_path: Path) -> None:
    surgery = partial(gs.GRU, accumulate=True)
    log = lm.callbacks.SurgeryLogger(tmp_path / "surgery.csv")
    module = lm.UnlearningModule(Bigram(), surgery=surgery)
    trainer = fit(module, batches(5), accumulate_grad_batches=2, callbacks=[log])
    assert trainer.global_step == 3
    assert [row["step"] for row in log.rows] == [1, 2, 3]
    assert len((tmp_path / "surgery.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize(("threshold", "steps"), [(2.0, 0), (-1.0, 5)])
def test_the_curve_stops_training_once_enough_is_forgotten(threshold: float, steps: int) -> None:
    encoded = [Encoded([1, 2, 3], [-100, 2, 3])]
    curve = lm.callbacks.TradeoffCurve({"forget": encoded}, pad_token_id=0, every_n_steps=1, stop_below=threshold)

    class Model(Bigram):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            return super().forward(input_ids, mask)

    trainer = fit(lm.UnlearningModule(Model()), batches(5), callbacks=[curve])
    assert trainer.global_step == steps  # a probability is below 2 from the start, and never below -1
    assert [point["step"] for point in curve.points] == list(range(steps + 1))
