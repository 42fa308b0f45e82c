"""The Lightning modules from Python: what they are given is refused in a sentence, before or in the first step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

import gradsurgery as gs
import lightning_modules as lm
from lightning_modules.training import scratch
from lightning_modules.training.trainer import trainer_options

ROWS = [{"question": f"Who wrote book {number}?", "answer": f"Author {number} did."} for number in range(5)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return scratch._train_tokenizer([row["answer"] for row in ROWS])


def llama(kind: Any = LlamaForCausalLM) -> Any:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return kind(LlamaConfig(vocab_size=300, **sizes))


def fit(module: Any, data: Any) -> None:
    loaders = {"datamodule": data} if isinstance(data, L.LightningDataModule) else {"train_dataloaders": data}
    trainer = L.Trainer(accelerator="cpu", **trainer_options(max_epochs=1))
    trainer.fit(module, **loaders)


def batch(**changes: Any) -> dict[str, Tensor]:
    tokens = torch.ones(1, 4, dtype=torch.int64)
    made = {"input_ids": tokens, "attention_mask": tokens, "labels": tokens} | changes
    return {name: value for name, value in made.items() if value is not None}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.ones(2, 3), 'expected {"forget": ..., "retain": ...}.*found Tensor; ForgetRetainDataModule makes'),
        ([batch()], "found list"),
        (batch(), "found input_ids, attention_mask, labels"),
        ({"forget": batch()}, "found forget"),
        ({"forget": batch(), "retain": None}, "found forget, retain"),
        ({"forget": batch(), "retain": batch(labels=None)}, "batch, retain: expected the tensors .*found no labels"),
        ({"forget": batch(attention_mask=None), "retain": batch()}, "batch, forget: .*found no attention_mask"),
        ({"forget": batch(labels=[1, 1]), "retain": batch()}, "batch, forget: .*found no labels"),
        (
            {"forget": batch(labels=torch.ones(1, 3).long()), "retain": batch()},
            r"of one shape \[B, T\].*labels \[1, 3\]",
        ),
        ({"forget": batch(input_ids=torch.ones(1, 4)), "retain": batch()}, r"input_ids \[1, 4\] torch.float32"),
        ({"forget": {name: value[0] for name, value in batch().items()}, "retain": batch()}, r"input_ids \[4\]"),
    ],
)
def test_a_batch_of_anything_else_is_refused(given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fit(lm.UnlearningModule(llama()), DataLoader([given], collate_fn=lambda batches: batches[0]))


@pytest.mark.parametrize(
    ("model", "options", "kind", "said"),
    [
        (lambda: "gpt2", {}, TypeError, "expected a torch.nn.Module, found str; AutoModelForCausalLM"),
        (lambda: llama(LlamaModel), {}, TypeError, "with its head, found LlamaModel, which gives no logits"),
        (llama, {"forget_loss": "ceu"}, TypeError, "expected a function, found 'ceu'; lm.objectives.by_name"),
        (llama, {"forget_loss": gs.losses.npo}, ValueError, "npo: expected a reference to compare with, found none"),
        (llama, {"retain_loss": lm.objectives.idk}, ValueError, "expected a loss that keeps answers, found idk"),
        (llama, {"warmup_steps": -1}, ValueError, "warmup_steps: expected a number >= 0, found -1"),
        (llama, {"skip_first": -1}, ValueError, "skip_first: expected a number >= 0, found -1"),
        (llama, {"retain_inside": float("nan")}, ValueError, "retain_inside: expected a number >= 0, found nan"),
    ],
)
def test_a_module_of_anything_else_is_refused(model: Callable[[], Any], options: Any, kind: Any, said: str) -> None:
    with pytest.raises(kind, match=said):
        lm.UnlearningModule(model(), **options)


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"optimizer": lambda parameters: None}, TypeError, "expected a constructed torch.optim.Optimizer.*NoneType"),
        (
            {"surgery": lambda base: base},
            TypeError,
            "expected one GradientSurgery from the surgery argument, found AdamW",
        ),
        ({"surgery": lambda base: None}, TypeError, "from the surgery argument, found NoneType"),
        ({"surgery": lambda base: [base]}, TypeError, "from the surgery argument, found list"),
        (
            {"surgery": partial(gs.GradientSurgery, objectives=("a", "b"))},
            *(ValueError, r"one loss for each of \['a', 'b'\], found \['forget', 'retain'\]"),
        ),
    ],
)
def test_a_factory_that_gives_something_else_is_refused(options: Any, kind: Any, said: str) -> None:
    with pytest.raises(kind, match=said):
        fit(
            lm.UnlearningModule(llama(), **options),
            DataLoader([{"forget": batch(), "retain": batch()}], batch_size=None),
        )


@pytest.mark.parametrize("whole", [False, True], ids=["a model in two parts", "a model that computes its logits"])
@pytest.mark.parametrize("name", ["forget_loss", "retain_loss"])
def test_a_loss_that_takes_the_mean_itself_is_refused(name: str, whole: bool) -> None:
    """It would be divided by the number of tokens once more."""

    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = llama()

        def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: object) -> Any:
            return self.inside(input_ids=input_ids, attention_mask=attention_mask)

    def mean(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, labels)

    with pytest.raises(ValueError, match=r"expected one value per token, .* take no mean in it"):
        fit(
            lm.UnlearningModule(Own() if whole else llama(), **{name: mean}),
            DataLoader([{"forget": batch(), "retain": batch()}], batch_size=None),
        )


def test_a_model_without_anything_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="expected parameters that require a gradient, found none"):
        lm.UnlearningModule(llama().requires_grad_(False)).configure_optimizers()


@pytest.mark.parametrize("wrong", ["forget", "retain"])
def test_a_loss_that_is_not_finite_is_told_with_its_objective_and_its_batch(wrong: str, tokenizer: Any) -> None:
    """Of three batches the second is the first with a loss that is not finite."""
    seen: list[list[int]] = []

    def spoilt(logits: Tensor, labels: Tensor) -> Tensor:
        return gs.losses.cross_entropy(logits, labels) * (torch.nan if len(seen) == 2 else 1.0)

    class Module(lm.UnlearningModule):
        def training_step(self, batch: Any) -> Tensor:
            seen.append(batch["forget"]["index"].tolist())
            return super().training_step(batch)

    module = Module(llama(), **{f"{wrong}_loss": spoilt})
    with pytest.raises(FloatingPointError, match=f"gradient of '{wrong}'") as caught:
        fit(module, lm.ForgetRetainDataModule(ROWS, ROWS, tokenizer, batch_size=2))
    assert f"(epoch 0, batch 1, forget examples {seen[1]}, retain examples" in str(caught.value)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ((ROWS, []), {}, "expected at least one retain example, found none"),
        (([], ROWS), {}, "expected at least one forget example, found none"),
        ((None, ROWS), {}, "forget: expected a file or a list of examples, found NoneType"),
        ((ROWS, 3), {}, "retain: expected a file or a list of examples, found int"),
        ((ROWS[0], ROWS), {}, "forget: expected a file or a list of examples, found dict"),
        (([*ROWS, "Who?"], ROWS), {}, "forget example 6: expected an object.*found str"),
        ((ROWS, [{"question": "Who?", "answer": " "}]), {}, "retain example 1: the answer is empty"),
        ((ROWS, ROWS), {"max_length": 3}, "max_length=3"),
        ((ROWS, ROWS), {"batch_size": 0}, "expected batch_size to be at least 1, found 0"),
        ((ROWS, ROWS), {"refusals": []}, "refusals: expected at least one answer, or None"),
        (
            (ROWS, ROWS),
            {"refusals": "I don't know."},
            "refusals: expected a list of answers with text, found \"I don't",
        ),
        ((ROWS, ROWS), {"refusals": ["No.", " "]}, "refusals: expected a list of answers with text"),
    ],
)
def test_data_that_cannot_be_is_refused(arguments: Any, options: Any, said: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=said):
        lm.ForgetRetainDataModule(*arguments, tokenizer, **options).setup()
