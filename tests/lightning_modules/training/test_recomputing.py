"""Gradient checkpointing takes the steps of training without it, and keeps less."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import gradsurgery as gs
import lightning_modules as lm
from lightning_modules.training.recomputing import recompute_activations
from tests.lightning_modules.training.test_module import VOCABULARY, batches, fit

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers.*")

SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}


def llama(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.5, attention_dropout=dropout, **SIZES)
    return LlamaForCausalLM(config)


def adapters() -> nn.Module:
    torch.manual_seed(1)
    config = LoraConfig(r=2, init_lora_weights="gaussian", target_modules="all-linear", lora_dropout=0.3)
    return get_peft_model(llama(), config)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([each.detach().flatten() for each in model.parameters() if each.requires_grad])


def loss(model: nn.Module, batch: Any, kind: Any) -> Tensor:
    tokens = gs.losses.answer_tokens(model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"])
    return gs.losses.token_mean(kind(*tokens), tokens[1])


def counted(model: nn.Module) -> list[int]:
    """Grows by one whenever the last layer runs."""
    runs: list[int] = []
    layers = [module for name, module in model.named_modules() if name.endswith("layers.2.mlp")]
    layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    return runs


def by_contexts(model: nn.Module, radius: float) -> None:
    torch.manual_seed(3)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = gs.GRU(torch.optim.AdamW(trained, lr=1e-2), guard="update")
    for batch in batches(3):
        at = optimizer.perturbed(radius) if radius else None
        with optimizer.objective("retain"):
            loss(model, batch["retain"], gs.losses.cross_entropy).backward()
        if at is not None:
            with at.direction():
                loss(model, batch["forget"], gs.losses.cross_entropy).backward()
        with optimizer.objective("forget", **({} if at is None else {"at": at})):
            loss(model, batch["forget"], gs.losses.ceu).backward()
        optimizer.step()
        optimizer.zero_grad()


def by_join(model: nn.Module, radius: float) -> None:
    torch.manual_seed(3)
    module = lm.UnlearningModule(
        model,
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        surgery=partial(gs.GRU, guard="update"),
        perturb=lm.PerturbSettings(start=radius) if radius else None,
    )
    fit(module, batches(3))


@pytest.mark.parametrize("train", [by_contexts, by_join])
@pytest.mark.parametrize("radius", [0.0, 0.2], ids=["plain", "perturbed"])
@pytest.mark.parametrize("make", [partial(llama, 0.2), adapters], ids=["all weights, dropout", "adapters, dropout"])
def test_recomputed_activations_give_the_same_steps(
    make: Callable[[], nn.Module], radius: float, train: Callable[[nn.Module, float], None]
) -> None:
    found, runs = [], []
    for recomputed in (False, True):
        model = make().train()
        if recomputed:
            recompute_activations(model)
        runs.append(counted(model))
        train(model, radius)
        found.append(weights(model))
    assert torch.equal(found[0], found[1])
    assert (found[0] - weights(make())).abs().max() > 1e-3
    assert len(runs[1]) >= 2 * len(runs[0]) - 2  # every forward pass of training ran twice; a trial of the head did not


def test_a_model_that_cannot_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"gradient checkpointing: expected a model of Transformers.*found Linear"):
        recompute_activations(nn.Linear(2, 2))
