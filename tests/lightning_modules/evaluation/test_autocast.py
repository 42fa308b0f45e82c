"""Scores under autocast to bfloat16: those of plain passes under autocast, and everything else as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2ForCausalLM

import gradsurgery as gs
from lightning_modules.data.tokenization import IGNORED, Encoded
from lightning_modules.evaluation.likelihood import answer_nll, autocasting
from lightning_modules.evaluation.memorization import token_statistics
from lightning_modules.evaluation.shared import SharedTexts
from tests.lightning_modules.evaluation.test_shared import ALONE, encoded, model_of, slow_nll
from tests.tolerances import AUTOCAST, close


def without_its_first_layer() -> nn.Module:
    base: Any = model_of("llama")
    return gs.logit_difference.LogitDifferenceModel(
        base, gs.logit_difference.assistant(base, num_layers=1, lora_rank=2)
    )


KINDS: dict[str, Callable[[], nn.Module]] = {
    **{
        name: lambda name=name: model_of(name)
        for name in ("llama", "llama, eager", "gpt2", "gemma2", "window", "bloom")
    },
    "llama, bfloat16": lambda: model_of("llama, bfloat16"),
    "uld": without_its_first_layer,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_nll_is_that_of_one_text_at_a_time_under_autocast_and_not_that_of_float32(kind: str) -> None:
    model, (texts, groups) = KINDS[kind](), encoded()
    wanted = [weight.requires_grad for weight in model.parameters()]
    exact = torch.tensor([slow_nll(model, text) for text in texts])
    with torch.autocast("cpu", torch.bfloat16):
        slow = torch.tensor([slow_nll(model, text) for text in texts])
    with autocasting(model):
        shared = SharedTexts(model, texts, groups, pad_token_id=0, batch_size=4)
        rows = shared.over(shared.batches, token_statistics(torch.zeros(len(texts), dtype=torch.bool)), lambda _: None)
        alone = answer_nll(model, texts, pad_token_id=0, batch_size=3)
    found = {place: -float(columns[0].double().mean()) for row in rows for place, columns in row.items()}
    together = torch.tensor([found[place] for place in range(len(texts))])
    close(together, slow, AUTOCAST, scale=slow)
    close(alone.float(), slow, AUTOCAST, scale=slow)
    if kind == "llama, bfloat16":  # where it is nothing new
        close(together, exact, AUTOCAST, scale=exact)
    else:
        assert (together != exact).any()
    assert shared._as_trees == (kind not in ALONE)
    assert not torch.is_autocast_enabled("cpu")
    assert [weight.requires_grad for weight in model.parameters()] == wanted


class Casts(TorchDispatchMode):
    """Counts what is turned into bfloat16 of tensors of one size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and found.dtype == torch.bfloat16:
            self.count += found.numel() == self.size
        return found


@pytest.mark.parametrize("trained", [True, False])
def test_weights_are_rounded_once_whether_or_not_they_are_trained(trained: bool) -> None:
    """The weights below adapters are frozen, and autocast by itself keeps no copies of such."""
    model: Any = model_of("llama").requires_grad_(trained)
    texts, _ = encoded()
    with autocasting(model), Casts(model.lm_head.weight.numel()) as casts:
        answer_nll(model, texts, pad_token_id=0, batch_size=2)
    assert casts.count == 1
    assert {weight.requires_grad for weight in model.parameters()} == {trained}
    with pytest.raises(RuntimeError, match="no memory"), autocasting(model):
        raise RuntimeError("no memory")
    assert {weight.requires_grad for weight in model.parameters()} == {trained}


def test_switched_off_it_changes_nothing() -> None:
    model, (texts, _) = model_of("llama"), encoded()
    with autocasting(model, enabled=False):
        assert not torch.is_autocast_enabled("cpu")
        found = answer_nll(model, texts, pad_token_id=0)
    assert torch.equal(found, answer_nll(model, texts, pad_token_id=0))


def test_what_a_model_allows_is_tried_out_without_autocast() -> None:
    """A cap on the logits below what rounding to bfloat16 hides: the head by itself would leave it out."""
    model: Any = model_of("gemma2")
    texts, _ = encoded()
    inputs = {"input_ids": torch.tensor([texts[0].input_ids])}
    model.config.final_logit_softcapping = None
    with torch.no_grad():
        plain = model(**inputs).logits
        model.config.final_logit_softcapping = 2.0 * float(plain.max() - plain.min())
        capped = model(**inputs).logits
    assert isinstance(model, Gemma2ForCausalLM)
    assert 1e-4 < float((plain - capped).abs().max() / (plain.max() - plain.min())) < 1.5e-2
    whole: list[object] = []
    model.register_forward_hook(lambda *call: whole.append(call))
    with autocasting(model):
        answer_nll(model, texts, pad_token_id=0)
    assert len(whole) > 1  # the trial, and every batch


def test_a_common_beginning_is_kept_as_a_pass_under_autocast_gives_it_and_not_as_the_trial_did() -> None:
    model, (texts, groups) = model_of("llama"), encoded()
    head = [7, 300, 9, 11, 5, 301, 302, 13, 4, 6, 8]
    texts = [Encoded([*head, *text.input_ids], [*[IGNORED] * len(head), *text.labels]) for text in texts]
    with autocasting(model):
        cache = model(torch.tensor([head]), use_cache=True).past_key_values
        shared = SharedTexts(model, texts, groups, pad_token_id=0)
        shared.over(shared.batches, token_statistics(torch.zeros(len(texts), dtype=torch.bool)), lambda _: None)
        kept = [values for _, values in shared._prefix_states]
    assert shared._as_trees
    assert shared.prefix >= len(head)
    for layer, values in zip(cache.layers, kept, strict=True):
        close(values[:, :, : len(head)].float(), layer.values.float(), AUTOCAST, scale=layer.values.float())
        for rounded in (layer.values, values):  # products under autocast are numbers of bfloat16
            assert torch.equal(rounded, rounded.bfloat16().to(rounded.dtype))
