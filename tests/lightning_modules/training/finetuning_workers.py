"""A model that is taught, and what two processes do with it; apart, so that processes can import it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_modules.data.tokenization import Encoded
from lightning_modules.training.finetuning import (
    FinetuningDataModule,
    FinetuningModule,
    FinetuningSettings,
    taught_alone,
)
from lightning_modules.training.trainer import trainer_options
from tests.tolerances import STEPPED_FLOAT32, close

VOCABULARY = 32
SETTINGS = FinetuningSettings(epochs=2, batch_size=3, lr=1e-2, seed=5)


def model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).train()


def examples(number: int = 10) -> list[Encoded]:
    generator = torch.Generator().manual_seed(2)
    found = []
    for row in range(number):
        tokens = torch.randint(VOCABULARY, (4 + row,), generator=generator).tolist()
        found.append(Encoded(tokens, [-100, -100, *tokens[2:]]))
    return found


def fit(net: nn.Module, encoded: list[Encoded], settings: FinetuningSettings = SETTINGS, **options: Any) -> L.Trainer:
    trainer = L.Trainer(
        **trainer_options(
            max_epochs=settings.epochs, **{"accelerator": "cpu", "devices": 1, "gradient_clip_val": 1.0} | options
        )
    )
    data = FinetuningDataModule(encoded, 0, settings)
    trainer.fit(FinetuningModule(net, settings), data)
    return trainer


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def two_do_what_one_does(rank: int) -> None:
    """The answers of both halves of a batch differ in length."""
    both, alone, few = model(), model(), examples(12)
    fit(both, few, replace(SETTINGS, batch_size=2), devices=2, strategy="ddp")
    # In the group, and yet alone, as the small Llama is taught in a run with several processes.
    settings = replace(SETTINGS, batch_size=4)
    taught_alone(alone, FinetuningDataModule(few, 0, settings), settings, device=torch.device("cpu"))
    close(weights(both), weights(alone), STEPPED_FLOAT32)
