"""The optimizer under Hugging Face's Trainer and Accelerate, against the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradsurgery as gs
from tests.problems import TWO, assert_same, snapshot, values
from tests.reference import training
from tests.tolerances import STEPPED_FLOAT32, close

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

CLIP, DECAY = 0.5, 0.7
BATCHES = 5  # batches in an epoch; odd, so that the last window of an epoch is a short one


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=17,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def tokens(objective: str, index: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * TWO.index(objective) + index)
    ids = torch.randint(0, 17, (2, 6), generator=generator)
    return {"input_ids": ids, "labels": ids}


def collate(items: Sequence[int]) -> dict[str, Any]:
    return {name: tokens(name, items[0]) for name in TWO}


def losses_of(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    return {"forget": -model(**inputs["forget"]).loss, "retain": model(**inputs["retain"]).loss}


def surgeon(model: nn.Module, **options: Any) -> gs.GradientSurgery:
    # Momentum and not Adam, which would hide a gradient of the wrong length.
    base = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    return gs.GradientSurgery(base, **{"ema_decay": DECAY, **options})


def oracle(windows: Sequence[Sequence[int]]) -> Tensor:
    """The parameters after one step for each window of batches."""
    model = llama()
    base = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    reference = training.Surgery(model, base, TWO, ema_decay={"retain": DECAY}, max_norm=CLIP)
    steps = [reference.step([losses_of(model, collate([index])) for index in window]) for window in windows]
    assert any(step.conflict for step in steps)
    return values(model)


def windows(accumulate: int, epochs: int) -> list[list[int]]:
    """Trainer starts a new window with every epoch."""
    return [
        list(range(start, min(start + accumulate, BATCHES)))
        for _ in range(epochs)
        for start in range(0, BATCHES, accumulate)
    ]


class UnlearnTrainer(transformers.Trainer):
    """Batches in order."""

    def _get_train_sampler(self, *arguments: Any) -> Any:
        return torch.utils.data.SequentialSampler(range(BATCHES))


class ByJoin(UnlearnTrainer):
    """Overrides the loss: one scalar, whose backward pass Trainer runs, divides, clips and steps as any other."""

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # AcceleratedOptimizer hides our methods
        return optimizer.join(**losses_of(model, inputs))


class ByContexts(UnlearnTrainer):
    """Overrides the training step: one graph alive at a time."""

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        inputs, optimizer = self._prepare_inputs(inputs), getattr(self.optimizer, "optimizer", self.optimizer)
        total = torch.zeros(())
        for name, sign in (("retain", 1.0), ("forget", -1.0)):
            with self.compute_loss_context_manager():
                loss = sign * model(**inputs[name]).loss / self.current_gradient_accumulation_steps
            with optimizer.objective(name):
                self.accelerator.backward(loss)
            total += loss.detach()
        if self.accelerator.sync_gradients:
            optimizer.combine()
        return total


def make(
    kind: type[UnlearnTrainer], folder: Path, *, accumulate: int, **arguments: Any
) -> tuple[Any, gs.GradientSurgery, Any]:
    model = llama()
    optimizer = surgeon(model, accumulate=kind is ByJoin and accumulate > 1)
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": accumulate,
        "num_train_epochs": 2,
        "max_grad_norm": CLIP,
        "lr_scheduler_type": "constant",
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        **arguments,
    }
    trainer = kind(
        model=model,
        args=transformers.TrainingArguments(**options),
        train_dataset=list(range(BATCHES)),
        data_collator=collate,
        optimizers=(optimizer, None),
    )
    trainer.model_accepts_loss_kwargs = False  # otherwise Trainer takes the loss for one that is already divided
    return model, optimizer, trainer


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", [ByJoin, ByContexts])
def test_trainer_is_the_oracles_run(kind: type[UnlearnTrainer], accumulate: int, tmp_path: Path) -> None:
    model, _, trainer = make(kind, tmp_path, accumulate=accumulate)
    trainer.train()
    close(values(model).double(), oracle(windows(accumulate, 2)).double(), STEPPED_FLOAT32)
    assert trainer.state.global_step == len(windows(accumulate, 2))


@pytest.mark.parametrize("kind", [ByJoin, ByContexts])
def test_a_resumed_trainer_is_the_uninterrupted_one_bit_for_bit(kind: type[UnlearnTrainer], tmp_path: Path) -> None:
    model, optimizer, trainer = make(kind, tmp_path, accumulate=2, save_strategy="steps", save_steps=3)
    trainer.train()
    resumed, again, trainer = make(kind, tmp_path / "again", accumulate=2)
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.zero_()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for each in (optimizer, again):
        each.zero_grad()
    assert_same(snapshot(resumed, again), snapshot(model, optimizer))


@pytest.mark.parametrize("front_end", ["contexts", "join"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerates_own_loop_is_the_oracles_run(accumulate: int, front_end: str) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = llama()
    optimizer = surgeon(model, accumulate=front_end == "join" and accumulate > 1)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    number = 6
    for index in range(number):
        with accelerator.accumulate(wrapped):
            losses = losses_of(wrapped, collate([index]))
            if front_end == "join":
                accelerator.backward(optimizer.join(**losses))
            else:
                for name, loss in losses.items():
                    with optimizer.objective(name):
                        accelerator.backward(loss)
            if accelerator.sync_gradients:
                optimizer.combine()
                accelerator.clip_grad_norm_(wrapped.parameters(), CLIP)
            prepared.step()
            prepared.zero_grad()
    expected = oracle([list(range(start, start + accumulate)) for start in range(0, number, accumulate)])
    close(values(model).double(), expected.double(), STEPPED_FLOAT32)
