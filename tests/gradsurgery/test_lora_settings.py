"""FILA and the importance with every setting of adapters: the residual is exact, names are the plain model's, or it is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradsurgery import lora
from tests.tolerances import LINEAR, Tolerance, close

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SPLIT = Tolerance(1e-6, "W is split in two float32 parts of its own size and added up again")
TOKENS = torch.tensor([[1, 5, 9, 3, 7], [2, 4, 6, 8, 10]])
BATCHES = [{"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "labels": TOKENS}]
OTHERS = [{**BATCHES[0], "input_ids": TOKENS.flip(0), "labels": TOKENS.flip(1)}]


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config, num_attention_heads=2))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def shake(model: nn.Module, adapter: str) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if f".{adapter}" in name:
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))


SETTINGS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 3},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dropout": {"lora_dropout": 0.4},
    "some targets": {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 7},
    "head saved": {"modules_to_save": ["lm_head"], "use_rslora": True},
}


@pytest.mark.parametrize("before", ["alone", "beside a trained one"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_base_and_what_the_adapter_holds_add_up_to_the_weights(setting: str, before: str) -> None:
    originals = {name: weight.detach().clone() for name, weight in llama().named_parameters()}
    config = peft.LoraConfig(**{"r": 3, "target_modules": "all-linear"} | SETTINGS[setting])
    if before == "alone":
        model: Any = peft.get_peft_model(llama(), config, adapter_name="ours")
    else:
        model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]), "theirs")
        shake(model, "theirs")
        model.add_adapter("ours", config)
        model.base_model.set_adapter(["theirs", "ours"])
    others = {name: weight.detach().clone() for name, weight in model.named_parameters() if ".theirs." in name}
    wanted = logits(model)
    importance = lora.fisher_importance(model, BATCHES, OTHERS)
    chosen = {name for name in importance if any(part in name for part in config.target_modules)}
    lora.fila_(model, importance, adapter_name="ours")
    close(logits(model), wanted, SPLIT, scale=wanted.abs().max())
    plain = dict(model.get_base_model().named_parameters())
    for name, original in originals.items():
        stem = name.removesuffix(".weight")
        layer = model.get_base_model().get_submodule(stem)
        if name in chosen:
            a, b = (matrices["ours"].weight for matrices in (layer.lora_A, layer.lora_B))
            assert bool(b.any())
            scaling = config.lora_alpha / (3**0.5 if config.use_rslora else 3)
            whole = plain[f"{stem}.base_layer.weight"] + scaling * b @ a
            close(whole, original, SPLIT, scale=original.abs().max())
        else:
            inner = next(
                key for key in (name, f"{stem}.base_layer.weight", f"{stem}.original_module.weight") if key in plain
            )
            assert torch.equal(plain[inner], original), name
    torch.testing.assert_close(
        {name: weight.detach() for name, weight in model.named_parameters() if ".theirs." in name},
        others,
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("active", [True, False])
def test_beside_dora_the_base_must_stay(active: bool) -> None:
    """DoRA scales rows of the base and its own product together: what is taken from the base would change it."""
    model: Any = peft.get_peft_model(llama(), peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]), "theirs")
    shake(model, "theirs")
    model.add_adapter("ours", peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    model.base_model.set_adapter(["theirs", "ours"] if active else "ours")
    importance = lora.fisher_importance(model, BATCHES, OTHERS)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="'theirs' on the same weight is a variant"):
        lora.fila_(model, importance, adapter_name="ours")
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True, "lora_dropout": 0.5},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["layers.1.mlp"]},
    ],
)
def test_importance_has_the_plain_names_and_numbers_under_any_adapter_without_effect(options: Any) -> None:
    plain = lora.fisher_importance(llama(), BATCHES, OTHERS, modules=lambda name: True)
    assert "lm_head.weight" in plain
    wrapped: Any = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules="all-linear", **options), "ours")
    found = lora.fisher_importance(wrapped.train(), BATCHES, OTHERS, modules=lambda name: True)
    assert found.keys() == plain.keys()
    for name, values in found.items():
        close(values, plain[name], Tolerance(5e-5, "float32 gradients, squared and divided"), scale=plain[name].max())
    through_adapters = lora.fisher_importance(wrapped, BATCHES, OTHERS)
    saved = options.get("modules_to_save", ["lm_head"])[0]
    assert set(through_adapters) == {name for name in plain if saved not in name and "lm_head" not in name}


def test_importance_is_of_the_copy_that_is_in_use() -> None:
    def head(name: str) -> bool:
        return name == "lm_head"

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    wrapped: Any = peft.get_peft_model(llama(), config, "used")
    wrapped.add_adapter("idle", config)
    found = lora.fisher_importance(wrapped, BATCHES, OTHERS, modules=head)["lm_head.weight"]
    plain = lora.fisher_importance(llama(), BATCHES, OTHERS, modules=head)["lm_head.weight"]
    close(found, plain, LINEAR[torch.float32], scale=plain.max())
