"""Merged adapters: the same logits, how much rounding costs, and what cannot be merged without another result."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import lightning as L
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lightning_modules as lm
from lightning_modules.data.tokenization import Encoded, collate
from lightning_modules.training.merging import check_mergeable, merged
from tests.tolerances import Tolerance, close

pytestmark = pytest.mark.refuses(
    "Merging adapters on tied or quantised weights", "the merged model would be another one: keep the adapter"
)

LOGITS: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-6, "Llama's norms are float32 whatever the weights are"),
    torch.float32: Tolerance(2e-6, "W + sigma B A, added up before the product instead of after it"),
    torch.bfloat16: Tolerance(2e-2, "each weight is rounded once more to 8 bits, and so is every activation"),
}
SHARE = Tolerance(6e-2, "said with two digits")
TOKENS = torch.tensor([[1, 5, 9, 3, 7]])
SIZES = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}


def llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_attention_heads=2, max_position_embeddings=16, tie_word_embeddings=tied)
    return LlamaForCausalLM(config)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=12, n_embd=16, n_layer=1, n_head=2, n_positions=16))


def moved(model: Any, dtype: torch.dtype, size: float = 0.1) -> Any:
    generator = torch.Generator().manual_seed(1)
    model = model.to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(size * torch.randn(weight.shape, generator=generator).to(weight))
    return model.eval()


def adapted(kind: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options: dict[str, Any] = {
            "dora": {"use_dora": True},
            "rslora": {"use_rslora": True, "lora_alpha": 3},
            "dropout": {"lora_dropout": 0.5},
            "embeddings": {"target_modules": ["embed_tokens", "lm_head"]},
            "tied embeddings saved": {"modules_to_save": ["embed_tokens"]},
        }.get(kind, {})
        base = gpt2() if kind == "GPT-2" else llama(tied=kind == "tied embeddings saved")
        model: Any = get_peft_model(base, LoraConfig(**{"r": 2, "target_modules": "all-linear"} | options))
        if kind == "two":
            model.add_adapter("second", LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"]))
            model.base_model.set_adapter(["default", "second"])
        return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits.double()


@pytest.mark.parametrize("dtype", LOGITS)
@pytest.mark.parametrize(
    "kind", ["lora", "dora", "rslora", "dropout", "two", "embeddings", "tied embeddings saved", "GPT-2"]
)
@pytest.mark.filterwarnings("ignore")
def test_the_merged_model_computes_what_the_adapted_one_did(kind: str, dtype: torch.dtype) -> None:
    model = moved(adapted(kind), dtype)
    wanted, off = logits(model), logits(copy.deepcopy(model).unload())
    whole = merged(model)
    assert not [name for name, _ in whole.named_parameters() if "lora" in name]
    close(logits(whole), wanted, LOGITS[dtype], scale=wanted.abs().max())
    if "saved" not in kind:
        assert float((wanted - off).abs().max()) > 4 * LOGITS[dtype].relative * float(wanted.abs().max())


@pytest.mark.parametrize("size", [1e-1, 1e-5])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
@pytest.mark.filterwarnings("ignore:.*is_gradient")
def test_what_rounding_costs_is_said(kind: str, size: float) -> None:
    """The share of the change that is lost, against dense float64 matrices."""
    model = moved(adapted(kind), torch.bfloat16, size)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    before, after = {}, {}
    for name, layer in layers.items():
        weight = layer.get_base_layer().weight.double()
        a, b = (matrices["default"].weight.double() for matrices in (layer.lora_A, layer.lora_B))
        whole = weight + layer.scaling["default"] * b @ a
        if kind == "dora":
            length = layer.lora_magnitude_vector["default"].weight.double()
            whole = whole * (length / whole.norm(dim=1))[:, None]
        before[name], after[name] = weight.clone(), whole
    with pytest.warns(UserWarning, match="half precision") as caught:
        found = dict(merged(model).named_modules())
    (said,) = [str(warning.message) for warning in caught if "half precision" in str(warning.message)]
    wrong = sum(
        (found[name.removeprefix("base_model.model.")].weight.double() - whole).square().sum()
        for name, whole in after.items()
    )
    change = sum((whole - before[name]).square().sum() for name, whole in after.items())
    share = float(torch.as_tensor(wrong / change).sqrt())
    close(torch.tensor(float(said.split("half precision: ")[1].split()[0])), torch.tensor(share), SHARE, scale=share)
    assert (share > 0.5) == (size == 1e-5)  # a change far below the last place is gone


def test_in_float32_nothing_is_lost_and_nothing_is_said() -> None:
    model = moved(adapted("lora"), torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged(model)
    plain = llama()
    assert merged(plain) is plain


def quantised() -> Any:
    model = adapted("lora")
    layer = model.get_base_model().model.layers[1].mlp.down_proj.base_layer
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    return model


def tied_head() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(llama(tied=True), LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (quantised, "down_proj: expected a plain floating-point weight to merge into, found Parameter of torch.int8"),
        (tied_head, "lm_head: expected a weight of one module to merge into, found it tied as model.embed_tokens"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_probes_say_so_before_training(build: Any, said: str) -> None:
    model = build()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for refuse in (merged, check_mergeable, lm.callbacks.probe.plain_copy):
        with pytest.raises(ValueError, match=said):
            refuse(model)
    rows = [Encoded([1, 3, 4, 5], [-100, 3, 4, 5])]
    batch = {"forget": collate(rows, 0), "retain": collate(rows, 0)}
    probe = lm.callbacks.QuantizationProbe({"forget": rows}, pad_token_id=0)
    trainer = L.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, callbacks=[probe], accelerator="cpu")
    with pytest.raises(ValueError, match=said):
        trainer.fit(lm.UnlearningModule(model), DataLoader([batch], batch_size=None))
    torch.testing.assert_close(
        {name: weight.detach() for name, weight in model.named_parameters()}, before, rtol=0, atol=0
    )
