"""Adapters for the command: what is adapted, what is refused, and LoKU trained under Lightning from start to saved model."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

import gradsurgery as gs
import lightning_modules as lm
from lightning_modules.data.tokenization import Encoded, collate
from lightning_modules.evaluation.likelihood import answer_nll
from lightning_modules.training.adapter_settings import AdapterSettings
from lightning_modules.training.adapters import adapt

pytestmark = pytest.mark.supports("PEFT", "LoRA with PEFT's own start or FILA's, under Lightning")

FORGET = [Encoded([1, 3, 4, 5, 6, 2], [-100, -100, 4, 5, 6, 2]), Encoded([1, 7, 5, 4, 2], [-100, -100, 5, 4, 2])]
RETAIN = [Encoded([1, 8, 9, 10, 11, 2], [-100, -100, 9, 10, 11, 2]), Encoded([1, 9, 8, 6, 2], [-100, -100, 8, 6, 2])]
BATCHES = {"forget_batches": [collate(FORGET, 0)], "retain_batches": [collate(RETAIN, 0)]}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(
        LlamaConfig(**config, num_attention_heads=2, max_position_embeddings=16, tie_word_embeddings=True)
    )


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(collate(FORGET, 0)["input_ids"]).logits


def probability(model: nn.Module, encoded: list[Encoded]) -> float:
    return float(torch.exp(-answer_nll(model, encoded, pad_token_id=0)).mean())


@pytest.fixture(scope="module")
def memorised() -> LlamaForCausalLM:
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = collate(FORGET + RETAIN, 0)
    for _ in range(60):
        tokens = gs.losses.answer_tokens(model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"])
        gs.losses.cross_entropy(*tokens).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_rank_0_is_the_model_itself() -> None:
    model = llama()
    assert adapt(model, AdapterSettings(rank=0)) is model
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("init", ["default", "fila"])
def test_every_linear_weight_but_the_head_is_adapted_and_nothing_changes(init: Any) -> None:
    model = llama()
    before, state = logits(model), torch.get_rng_state()
    adapted = adapt(model, AdapterSettings(rank=2, init=init), **BATCHES)
    assert isinstance(adapted, PeftModel)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(logits(adapted), before, rtol=0.0, atol=1e-6)
    trainable = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * 7 * 2
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable)
    layer = adapted.get_base_model().model.layers[0].mlp.up_proj
    assert layer.scaling["default"] == 2.0
    assert bool(layer.lora_B["default"].weight.any()) == (init == "fila")


def test_linear_modules_that_no_adapter_fits_are_left_out() -> None:
    """PEFT refuses Mamba's out_proj, and Llama 4's router is a linear layer that returns two tensors."""
    sizes: dict[str, Any] = {"vocab_size": 12, "hidden_size": 16, "num_hidden_layers": 2}
    mamba = MambaForCausalLM(MambaConfig(**sizes, state_size=4))
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    experts = {"intermediate_size": 16, "intermediate_size_mlp": 16, "num_local_experts": 2}
    mixture = Llama4ForCausalLM(
        Llama4TextConfig(**sizes, **heads, **experts, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    )
    for model, left_out in ((mamba, "out_proj"), (mixture, "router")):
        adapted = adapt(model, AdapterSettings(rank=2))
        names = {
            name.split(".lora_")[0].rpartition(".")[2] for name, _ in adapted.named_parameters() if ".lora_" in name
        }
        assert left_out in {name.rpartition(".")[2] for name, _ in adapted.named_modules()}
        assert left_out not in names
        assert len(names) > 2
        adapted(collate(FORGET, 0)["input_ids"]).logits.sum().backward()


@pytest.mark.parametrize("init", ["default", "fila"])
def test_the_seed_decides(init: Any) -> None:
    def weights(seed: int, draws: int) -> Tensor:
        torch.rand(draws)
        adapted = adapt(llama(), AdapterSettings(rank=2, init=init, seed=seed), **BATCHES)
        return adapted.get_base_model().model.layers[0].mlp.up_proj.lora_A["default"].weight.detach()

    assert torch.equal(weights(1, 0), weights(1, 5))
    assert init == "fila" or not torch.equal(weights(1, 0), weights(2, 0))


@pytest.mark.parametrize(
    ("settings", "batches", "message"),
    [
        ({"rank": -1}, {}, "rank: expected a number >= 0, found -1"),
        ({"init": "pissa"}, {}, "init: expected 'default' or 'fila', found 'pissa'"),
        ({"init": "fila", "rank": 0}, {}, "a rank of 0"),
        ({"init": "fila"}, {"forget_batches": None}, "one is None"),
        ({"init": "fila"}, {"retain_batches": None}, "one is None"),
        ({"init": "fila"}, {"retain_batches": []}, "retain_batches: expected at least one batch"),
    ],
)
def test_what_is_refused_leaves_the_model_alone(
    settings: dict[str, Any], batches: dict[str, Any], message: str
) -> None:
    model = llama()
    names, state = [name for name, _ in model.named_modules()], torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        adapt(model, AdapterSettings(**{"rank": 2} | settings), **BATCHES | batches)
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(torch.get_rng_state(), state)


def test_a_weight_that_fila_refuses_leaves_no_adapters_behind() -> None:
    model = llama()
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[0].mlp.gate_proj.weight
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="tied"):
        adapt(model, AdapterSettings(rank=2, init="fila"), **BATCHES)
    assert [name for name, _ in model.named_modules()] == names
    adapt(model, AdapterSettings(rank=2))


@pytest.mark.parametrize("surgery", [gs.GRU, partial(gs.GradientSurgery, rule="sum")])
def test_loku_unlearns_under_lightning(surgery: Any, memorised: LlamaForCausalLM, tmp_path: Any) -> None:
    """The inverted hinge and cross-entropy on adapters started by FILA: forgets, retains, and is loaded by PEFT alone."""
    model = adapt(copy.deepcopy(memorised), AdapterSettings(rank=4, init="fila"), **BATCHES)
    assert min(probability(model, FORGET), probability(model, RETAIN)) > 0.9
    optimizer = partial(torch.optim.AdamW, lr=2e-3)
    module = lm.UnlearningModule(model, forget_loss=gs.losses.inverted_hinge, optimizer=optimizer, surgery=surgery)
    pairs = [{"forget": collate(FORGET, 0), "retain": collate(RETAIN, 0)}] * 30
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False}
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, **quiet)
    first = float(module.objectives["forget"](module, pairs[0], "forget").detach())
    trainer.fit(module, DataLoader(pairs, batch_size=None))
    assert float(module.losses["forget"]) < 0.8 * first
    assert probability(model, FORGET) < 0.6
    assert probability(model, RETAIN) > 0.8

    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(copy.deepcopy(memorised), str(tmp_path))
    wanted = logits(model)
    torch.testing.assert_close(logits(loaded), wanted, rtol=0.0, atol=1e-6 * float(wanted.abs().max()))
    torch.testing.assert_close(
        logits(model.merge_and_unload()), wanted, rtol=0.0, atol=1e-6 * float(wanted.abs().max())
    )
