"""UnlearningModule with a perturbed forget loss and with a schedule: the steps of a plain loop of contexts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import gradsurgery as gs
import lightning_modules as lm
from lightning_modules.training.references import AdapterOff, SecondModel
from lightning_modules.training.warmup import falling_late
from tests.lightning_modules.training.test_module import VOCABULARY, Bigram, batches, fit
from tests.tolerances import STEPPED_FLOAT32, close

pytestmark = pytest.mark.filterwarnings("ignore:.*computes all its logits.*", "ignore:.*does not have many workers.*")

SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.5, **SIZES))


def adapters() -> nn.Module:
    torch.manual_seed(1)
    return get_peft_model(llama(), LoraConfig(r=2, init_lora_weights="gaussian", target_modules="all-linear"))


def weights(model: nn.Module) -> Tensor:
    return torch.cat([each.detach().flatten() for each in model.parameters() if each.requires_grad])


def answers(model: nn.Module, batch: Any, loss: Any, skip: int = 0) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    tokens = gs.losses.answer_tokens(logits, batch["labels"], skip_first=skip)
    return gs.losses.token_mean(loss(*tokens), tokens[1])


def plain_loop(
    model: nn.Module, data: list[Any], radii: list[float], *, accumulate: int = 1, autocast: bool = False
) -> list[float]:
    """Trains by contexts and a perturbation for each step. Returns the forget losses at the moved weights."""
    optimizer = gs.GRU(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    losses: list[float] = []
    cast = partial(torch.autocast, "cpu", torch.bfloat16) if autocast else nullcontext
    for step, radius in enumerate(radii):
        at = optimizer.perturbed(radius)
        for batch in data[step * accumulate : (step + 1) * accumulate]:
            with optimizer.objective("retain"):
                with cast():
                    loss = answers(model, batch["retain"], gs.losses.cross_entropy)
                (loss / accumulate).backward()
            with at.direction():
                with cast():
                    loss = answers(model, batch["forget"], gs.losses.cross_entropy)
                loss.backward()
            with optimizer.objective("forget", at=at):
                with cast():
                    loss = answers(model, batch["forget"], gs.losses.ceu, skip=1)
                (loss / accumulate).backward()
                losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


class Logged(L.Callback):
    """What the loggers would be told."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["loss/forget"]))


@pytest.mark.parametrize(
    ("make", "accumulate", "precision"),
    [(llama, 1, "32-true"), (llama, 3, "32-true"), (llama, 1, "bf16-mixed"), (adapters, 2, "32-true")],
)
def test_it_takes_the_steps_of_a_plain_loop(
    make: Callable[[], nn.Module], accumulate: int, precision: Any, tmp_path: Path
) -> None:
    """With a growing radius; the logged losses are those at the moved weights."""
    data, plain = batches(4 * accumulate), make()
    expected = plain_loop(plain, data, [0.1, 0.2, 0.3, 0.4], accumulate=accumulate, autocast=precision == "bf16-mixed")
    module = lm.UnlearningModule(
        make(),
        optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.01),
        surgery=partial(gs.GRU, accumulate=accumulate > 1),
        perturb=lm.PerturbSettings(start=0.1, end=0.4),
    )
    logged, table = Logged(), lm.callbacks.SurgeryLogger(tmp_path / "surgery.csv")
    trainer = fit(module, data, accumulate_grad_batches=accumulate, precision=precision, callbacks=[logged, table])
    assert trainer.global_step == 4
    close(weights(module.model), weights(plain), STEPPED_FLOAT32)
    assert (weights(plain) - weights(make())).abs().max() > 1e-3
    assert logged.losses == pytest.approx(expected, rel=1e-4)
    assert [row["loss_forget"] for row in table.rows] == pytest.approx(expected[accumulate - 1 :: accumulate], rel=1e-4)


def test_the_direction_and_the_unit_are_what_the_settings_say() -> None:
    def away(logits: Tensor, labels: Tensor) -> Tensor:
        return -gs.losses.cross_entropy(logits, labels)

    data, ends = batches(1), []
    for perturb in (
        lm.PerturbSettings(start=0.5),
        lm.PerturbSettings(start=0.5, direction=away),
        lm.PerturbSettings(start=0.5, scale="tensor"),
    ):
        module = lm.UnlearningModule(Bigram(), perturb=perturb, optimizer=partial(torch.optim.SGD, lr=1.0))
        radii: list[float] = []
        loss = module.objectives["forget"]
        before, own = Bigram().table.detach(), module.model.table

        def moved(*given: Any, loss: Any = loss, own: Any = own, before: Any = before, to: Any = radii) -> Tensor:
            to.append(float((own.detach() - before).norm()))
            return loss(*given)

        module.objectives["forget"] = moved
        fit(module, data)
        unit = float(before.norm()) if perturb.scale == "tensor" else 1.0
        assert radii == pytest.approx([0.5 * unit], rel=1e-5)
        ends.append(weights(module.model))
    assert not torch.equal(ends[0], ends[1])


@pytest.mark.parametrize(("make", "reference"), [(llama, SecondModel), (adapters, SecondModel), (adapters, AdapterOff)])
def test_a_loss_that_compares_with_the_start_model_sees_it_unmoved(
    make: Callable[[], nn.Module], reference: Callable[[], Any]
) -> None:
    model, data = make(), batches(1)
    with torch.no_grad():
        expected = answers(model, data[0]["forget"], gs.losses.cross_entropy)
    given: Any = reference()
    module = lm.UnlearningModule(
        model, forget_loss=gs.losses.npo, perturb=lm.PerturbSettings(start=1.0), reference=given
    )
    seen: list[Tensor] = []
    compute = given.nll
    given.nll = lambda *arguments: seen.append(compute(*arguments)) or seen[-1]
    fit(module, data)
    number = int((data[0]["forget"]["labels"][:, 1:] != -100).sum())
    close(seen[0].sum() / number, expected, STEPPED_FLOAT32)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_schedule_gives_every_step_its_share(accumulate: int) -> None:
    rates: list[float] = []

    class Rates(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = lm.UnlearningModule(
        Bigram(),
        optimizer=partial(torch.optim.SGD, lr=2.0),
        surgery=partial(gs.GRU, accumulate=accumulate > 1),
        schedule=partial(falling_late, warmup_steps=5),
    )
    fit(module, batches(10 * accumulate), accumulate_grad_batches=accumulate, callbacks=[Rates()], max_epochs=2)
    steps = 20
    expected = [2.0 * min(1, t / 5) * max(0.05, min(1, 1.5 * (steps - t) / steps)) for t in range(1, steps + 1)]
    assert rates == pytest.approx([rate for rate in expected for _ in range(accumulate)])


def test_the_first_step_of_a_short_training_has_its_share_too() -> None:
    rates: list[float] = []

    class Rates(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    schedule = partial(falling_late, warmup_steps=0)
    fit(lm.UnlearningModule(Bigram(), schedule=schedule), batches(2), callbacks=[Rates()])
    assert rates == pytest.approx([0.75e-5, 0.05e-5])


def test_what_does_not_fit_is_refused() -> None:
    perturb = lm.PerturbSettings(start=0.1, end=0.2)
    with pytest.raises(ValueError, match=r"retain_inside: expected 0 with perturb, found 0\.5"):
        lm.UnlearningModule(Bigram(), perturb=perturb, retain_inside=0.5)
    with pytest.raises(ValueError, match=r"warmup_steps: expected 0 with a schedule.*found 3"):
        lm.UnlearningModule(Bigram(), schedule=falling_late, warmup_steps=3)
    with pytest.raises(ValueError, match="npo: expected a reference to compare with, found none"):
        lm.UnlearningModule(Bigram(), perturb=lm.PerturbSettings(start=0.1, direction=gs.losses.npo))
    for wrong in ({"start": 0.0}, {"start": 0.1, "end": -1.0}, {"start": float("nan")}):
        with pytest.raises(ValueError, match=r"perturb, (start|end): expected a radius > 0, found"):
            lm.PerturbSettings(**wrong)
    with pytest.raises(ValueError, match="perturb, scale: expected one of global, tensor, found 'layer'"):
        lm.PerturbSettings(start=0.1, scale="layer")
    for endless, named in (({"perturb": perturb}, "perturb, end"), ({"schedule": falling_late}, "schedule")):
        with pytest.raises(
            ValueError, match=f"{named}: expected a Trainer with max_steps or max_epochs, found neither"
        ):
            fit(lm.UnlearningModule(Bigram(), **endless), batches(1), max_epochs=-1)
