"""What `UnlearningModule` asks of its arguments and of every batch, before a tensor is computed."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_TENSORS = ("input_ids", "attention_mask", "labels")


def check_model(model: object) -> None:
    """Refuse what gives no logits.

    Raises:
        TypeError: If it is no module, or a Hugging Face model without a head that predicts tokens.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module, found {type(model).__name__}; AutoModelForCausalLM.from_pretrained loads one by its name"
        )
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]
    if hasattr(inner, "can_generate") and not inner.can_generate():
        raise TypeError(
            f"model: expected a causal language model with its head, found {type(inner).__name__}, which gives no logits; load it with "
            "AutoModelForCausalLM"
        )


def check_numbers(**numbers: float | None) -> None:
    """Refuse a number below 0, or one that is not finite; None is no number.

    Raises:
        ValueError: If there is one.
    """
    for name, number in numbers.items():
        if number is not None and not 0 <= number < math.inf:
            raise ValueError(f"{name}: expected a number >= 0, found {number}")


def check_alone(**options: object) -> None:
    """Refuse options of a retain loss where there is none.

    Raises:
        ValueError: If one is given.
    """
    for name, value in options.items():
        if value:
            raise ValueError(f"{name}: expected a retain_loss, on which it acts, found retain_loss=None; leave it out")


def check_retained(**options: object) -> None:
    """Refuse `retain_loss=None` among a module's options where further rows stand beside the retain loss.

    Raises:
        ValueError: If it is among them.
    """
    if options.get("retain_loss", True) is None:
        raise ValueError("retain_loss: expected a loss beside further protected rows, found None; leave it out")


def check_batches(batches: object, names: Iterable[str]) -> None:
    """Refuse a batch that is not one of pairs.

    Cost: no tensor is read.

    Args:
        batches: What the loader gave.
        names: Of the objectives, each with a batch of its own.

    Raises:
        ValueError: If one is missing, lacks a tensor, or its tensors differ in shape.
    """
    advice = "ForgetRetainDataModule makes such batches"
    for name in names:
        batch = batches[name] if isinstance(batches, Mapping) and name in batches else None
        if not isinstance(batch, Mapping):
            found = type(batches).__name__
            if isinstance(batches, Mapping):
                found = ", ".join(f"{key}: None" if each is None else str(key) for key, each in batches.items())
            raise ValueError(
                f'batch: expected {{"forget": ..., "retain": ...}}, each with {", ".join(_TENSORS)}, found {found}; {advice}'
            )
        lacking = [key for key in _TENSORS if not isinstance(batch.get(key), Tensor)]
        if lacking:
            raise ValueError(
                f"batch, {name}: expected the tensors {', '.join(_TENSORS)}, found no {', '.join(lacking)}; {advice}"
            )
        shapes = [list(batch[key].shape) for key in _TENSORS]
        if len(shapes[0]) != 2 or any(shape != shapes[0] for shape in shapes) or batch["input_ids"].is_floating_point():
            said = ", ".join(f"{key} {list(batch[key].shape)} {batch[key].dtype}" for key in _TENSORS)
            raise ValueError(f"batch, {name}: expected integers of one shape [B, T], found {said}; {advice}")


@contextmanager
def naming_the_batch(indices: Mapping[str, Tensor | None], epoch: int, number: int) -> Generator[None]:
    """Let a FloatingPointError say in which batch it was; the examples are read from the device only then.

    Args:
        indices: Objective -> places of the last batch's examples in their set, where they are known.
        epoch: Counted from 0, as Lightning does.
        number: Of the batch in its epoch, counted from 0.
    """
    try:
        yield
    except FloatingPointError as error:
        places = {name: index.tolist() for name, index in indices.items() if index is not None}
        examples = "".join(f", {name} examples {numbers}" for name, numbers in places.items())
        raise FloatingPointError(f"{error} (epoch {epoch}, batch {number}{examples}, all counted from 0)") from error
