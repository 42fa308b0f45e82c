"""What a model still knows when its weights are rounded to a few bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.data.tokenization import Encoded
from lightning_modules.progress import Stage
from lightning_modules.training.callbacks.probe import Probe, check_whole, plain_copy
from lightning_modules.training.probability import mean_probabilities


def round_to_nearest(weight: Tensor, bits: int, *, dim: int = -1) -> Tensor:
    r"""The weight rounded to symmetric integers of so many bits, with one scale a row.

    $$\hat w_{ij} = s_i \operatorname{round}(w_{ij} / s_i), \quad s_i = \max_j |w_{ij}| / (2^{b-1} - 1)$$

    This is "RTN", the baseline of the quantization papers (GPTQ, 2210.17323; AWQ, 2306.00978). It is simulated:
    computed in float32 and returned in the weight's dtype. A row of zeros stays. A row with NaN or infinity becomes
    NaN.

    Args:
        weight: Floating point, any shape.
        bits: b, from 2 to 16.
        dim: The dimension that shares a scale: the inputs of a neuron.

    Raises:
        ValueError: If the bits are outside their range.

    Example:
        >>> round_to_nearest(torch.tensor([[1.0, 0.6, -0.2]]), 2)
        tensor([[1., 1., -0.]])
    """
    if not 2 <= bits <= 16:
        raise ValueError(f"round_to_nearest: expected 2 to 16 bits, found {bits}")
    wide = weight.float()
    scale = wide.abs().amax(dim, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.where(scale == 0.0, wide, (wide / scale).round() * scale).to(weight.dtype)


def quantize_(model: nn.Module, bits: int) -> nn.Module:
    """Round every linear weight but the head's in place, with a scale for each neuron.

    The layers are `torch.nn.Linear` and GPT-2's `Conv1D`, whose weight is transposed. Biases, norms, embeddings and the
    head stay, as in weight-only inference libraries. (Rounding a head that is tied to the embeddings would round those
    as well.) The experts of a mixture are refused where they are one tensor of three dimensions, as in Transformers:
    families lay it out differently, and without the experts most of the model would not be rounded.

    Args:
        model: Changed in place, and returned.
        bits: From 2 to 16.

    Raises:
        ValueError: If the bits are outside their range, or the model has no such weight, or experts in one tensor.
    """
    if experts := list(_experts(model)):
        raise ValueError(
            f"quantize_: expected every matrix in a layer of its own, found {len(experts)} tensors that hold those of several experts, "
            f"such as {experts[0]}; rounding the others alone would say little"
        )
    layers = list(_linear(model))
    if not layers:
        raise ValueError(
            f"quantize_: expected a model with linear layers besides its head, found none in {type(model).__name__}"
        )
    with torch.no_grad():
        for weight, dim in layers:
            weight.copy_(round_to_nearest(weight, bits, dim=dim))
    return model


def _linear(model: Any) -> Iterator[tuple[Tensor, int]]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for module in model.modules():
        if module is head:
            continue
        if isinstance(module, nn.Linear):
            yield module.weight, 1
        elif (
            type(module).__name__ == "Conv1D"
            and getattr(module, "weight", None) is not None
            and module.weight.ndim == 2
        ):
            yield module.weight, 0


def _experts(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if not type(module).__module__.startswith("torch."):  # of torch's own, convolutions have three
            for own, parameter in module.named_parameters(name, recurse=False):
                if parameter.ndim == 3:
                    yield own


def quantization_probe(
    model: nn.Module,
    splits: Mapping[str, Sequence[Encoded]],
    *,
    pad_token_id: int,
    bits: Sequence[int] = (8, 4, 3),
    batch_size: int = 32,
) -> dict[str, Any]:
    """Scores copies of a model whose weights are rounded to 8, 4 and 3 bits.

    Rounding undoes a change of the weights that is smaller than a rounding step. Zhang et al., "Catastrophic failure of
    LLM unlearning via quantization" (2410.16454), found that 4 bits undo just the methods that keep utility well.
    Rounding is simulated (`round_to_nearest`), so it runs anywhere and says nothing about speed. The model stays as it
    is.

    Args:
        model: A causal language model; adapters are merged into the copies.
        splits: Name -> examples to score, usually "forget" and "retain".
        pad_token_id: Of the tokenizer.
        bits: Of the copies, of which one exists at a time.
        batch_size: Examples a forward pass.

    Returns:
        `{"points": [{"bits": None, split: mean probability, ...}, {"bits": 8, ...}, ...]}`, with None for the model as
        it is.

    Raises:
        ValueError: If bits are outside 2 to 16, or the model has no linear layer.
        RuntimeError: If the weights are sharded.
    """
    check_whole(model)  # before anything is computed, which would wait for the other processes
    points: list[dict[str, Any]] = [
        {"bits": None, **mean_probabilities(model, splits, pad_token_id=pad_token_id, batch_size=batch_size)}
    ]
    stage = Stage("Rounding copies to fewer bits", len(bits))
    for number in bits:
        rounded = quantize_(plain_copy(model), number)
        scores = mean_probabilities(rounded, splits, pad_token_id=pad_token_id, batch_size=batch_size)
        points.append({"bits": number, **scores})
        stage.advance()
    return {"points": points}


class QuantizationProbe(Probe):
    """Runs `quantization_probe` on the trained model at the end of training.

    One process does it; the trained model is never touched. Put it after `BestTradeoff`, so that it probes the model
    that is kept.

    Args:
        splits: Name -> examples to score.
        pad_token_id: Of the tokenizer.
        folder: The run's folder, to write the result as "quantization" of `probes.json` for the report; None writes
            nothing.
        settings: Further arguments of `quantization_probe`.

    Attributes:
        result: As `quantization_probe` returns it; None before the end.
    """

    name = "quantization"

    def __init__(
        self,
        splits: Mapping[str, Sequence[Encoded]],
        *,
        pad_token_id: int,
        folder: str | Path | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(folder)
        self.splits = dict(splits)
        self.settings: dict[str, Any] = {"pad_token_id": pad_token_id, **settings}

    def measure(self, model: nn.Module) -> dict[str, Any]:
        """The result of `quantization_probe`."""
        return quantization_probe(model, self.splits, **self.settings)
