"""The logit lens: how probable a forgotten answer is inside the model, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.data.tokenization import IGNORED, Encoded, collate
from lightning_modules.evaluation.heads import backbone_and_head
from lightning_modules.evaluation.intervals import mean_interval
from lightning_modules.evaluation.likelihood import device_of, evaluation_mode
from lightning_modules.progress import Stage
from lightning_modules.training.heads import AnswerHead, logits_of

_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm")


def logit_lens(
    model: nn.Module, encoded: Sequence[Encoded], *, pad_token_id: int, batch_size: int = 8
) -> dict[str, Any]:
    r"""Scores every layer's hidden states as if they were the last: final norm, then head.

    What the last layers only cover up is still likely further down. With h the hidden states after a layer, the
    answer's probability there is $\exp(-\mathrm{nll})$ under $\operatorname{softmax}(W \operatorname{norm}(h))$
    (nostalgebraist, "interpreting GPT: the logit lens", 2020). After the last layer that is what the model says. Most
    models predict little before their last layers, those that know included: compare with a reference, and with the
    model before.

    Args:
        model: A causal language model; its train or eval mode is restored.
        encoded: n >= 1 examples.
        pad_token_id: Of the tokenizer.
        batch_size: Examples a forward pass.

    Returns:
        `{"n", "layers": [{"layer", "probability", "interval"}, ...]}`: a mean probability for the embeddings, which are
        layer 0, and after each layer, with its interval (`evaluation.intervals.mean_interval`).

    Raises:
        ValueError: If there are no examples, or the model's final norm or head cannot be told apart from the rest.

    Cost: a forward pass, and the answers' logits once for every layer.
    """
    if not encoded:
        raise ValueError("logit_lens: expected examples, found none")
    head, device = AnswerHead(model), device_of(model)
    values: list[list[float]] = []
    stage = Stage("Looking into the layers, examples", len(encoded))
    with evaluation_mode(model):
        for start in range(0, len(encoded), batch_size):
            part = encoded[start : start + batch_size]
            batch = {name: tensor.to(device) for name, tensor in collate(part, pad_token_id).items()}
            states = head.states(batch)
            norm = _final_norm(model)
            if states.head is None or norm is None:
                raise ValueError(
                    f"logit_lens: expected a model whose logits are its head of its last hidden states after a final norm, found "
                    f"{type(model).__name__}, of which that cannot be told"
                )
            layers = _hidden(model, norm, batch)
            for layer, hidden in enumerate(layers):
                if layer == len(values):
                    values.append([])
                normed = hidden if layer == len(layers) - 1 else norm(hidden)
                keep = batch["labels"][:, 1:] != IGNORED
                logits = logits_of(normed[:, :-1][keep], states.head).float()
                losses = nn.functional.cross_entropy(logits, batch["labels"][:, 1:][keep], reduction="none").double()
                means = [float(tokens.mean()) for tokens in losses.split(keep.sum(dim=1).tolist())]
                values[layer] += torch.tensor(means, dtype=torch.float64).neg().exp().tolist()
            stage.advance(len(part))
    rows: list[dict[str, Any]] = []
    for layer, numbers in enumerate(values):
        interval = mean_interval(numbers)
        between = None if interval is None else [interval.low, interval.high]
        rows.append({"layer": layer, "probability": sum(numbers) / len(numbers), "interval": between})
    return {"n": len(encoded), "layers": rows}


def _final_norm(model: nn.Module) -> nn.Module | None:
    parts = backbone_and_head(model)
    for place in (parts[0], getattr(parts[0], "decoder", None)) if parts else ():
        for name in _NORMS:
            if isinstance(found := getattr(place, name, None), nn.Module):
                return found
    return None


def _hidden(model: nn.Module, norm: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The hidden states of the embeddings and after every layer; the last have been through the norm.

    Raises:
        ValueError: If the norm is not what the last hidden states come from.
    """
    parts = backbone_and_head(model)
    if parts is None:
        raise RuntimeError("the model lost its head while it was looked into")
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Any) -> None:
        outputs.append(output)

    handle = norm.register_forward_hook(keep)
    try:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        layers = parts[0](**inputs, use_cache=False, output_hidden_states=True).hidden_states
    finally:
        handle.remove()
    # A model that diverged has NaN in both.
    if not outputs or not torch.allclose(outputs[-1], layers[-1], rtol=0.0, atol=0.0, equal_nan=True):
        raise ValueError(
            f"logit_lens: expected a final norm whose output is the last hidden states, found {type(norm).__name__} of "
            f"{type(model).__name__}, whose output is not"
        )
    return layers
