"""Adapters on an 8- or 4-bit base: trained like any other; the base stays, and nothing is merged into it.

Needs bitsandbytes, whose CPU kernels came with 0.46; it is no dependency of ours.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import gradsurgery as gs
import lightning_modules as lm
from gradsurgery import lora
from lightning_modules.data.tokenization import Encoded, collate
from lightning_modules.training.merging import merged
from lightning_modules.training.packing import keep_differentiable
from tests.reference.training import Surgery
from tests.tolerances import STEPPED_FLOAT32, close

pytestmark = pytest.mark.supports("PEFT", "8- and 4-bit bases, where bitsandbytes is")

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes for 8- and 4-bit weights: pip install bitsandbytes")

FORGET = [Encoded([1, 3, 4, 5, 6, 2], [-100, -100, 4, 5, 6, 2]), Encoded([1, 7, 5, 4, 2], [-100, -100, 5, 4, 2])]
RETAIN = [Encoded([1, 8, 9, 10, 11, 2], [-100, -100, 9, 10, 11, 2]), Encoded([1, 9, 8, 6, 2], [-100, -100, 8, 6, 2])]
DATA = {"forget": collate(FORGET, 0), "retain": collate(RETAIN, 0)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=16)
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def quantised(folder: Path, bits: int, **options: Any) -> Any:
    chosen = {8: {"load_in_8bit": True}, 4: {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}}[bits]
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**chosen), device_map="cpu", dtype=torch.float32
    )
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": "all-linear"} | options))


def frozen(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if not weight.requires_grad}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def losses(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, batch in DATA.items():
        logits, labels = gs.losses.answer_tokens(
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"]
        )
        found[name] = (gs.losses.ceu if name == "forget" else gs.losses.cross_entropy)(logits, labels).mean()
    return found


@pytest.mark.parametrize("bits", [8, 4])
def test_adapters_on_rounded_weights_move_as_the_oracle_moves_them(bits: int, saved: Path) -> None:
    model, reference = quantised(saved, bits).train(), quantised(saved, bits).train()
    before, base = frozen(model), partial(torch.optim.SGD, lr=0.5, momentum=0.9)
    assert any(not weight.is_floating_point() for weight in before.values())
    optimizer = gs.GRU(base(list(trained(model).items())), guard="update")
    oracle = Surgery(
        reference, base(trained(reference).values()), ("forget", "retain"), ema_decay={"retain": 0.2}, guard=True
    )
    for _ in range(3):
        oracle.step([losses(reference)])
        optimizer.join(**losses(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(frozen(model), before, rtol=0.0, atol=0.0)
    for name, weight in trained(model).items():
        close(weight.detach(), trained(reference)[name].detach(), STEPPED_FLOAT32)


# DoRA on 8 bits: peft 0.21 with bitsandbytes 0.50 raises an AttributeError in a plain forward pass on a CPU.
@pytest.mark.parametrize(("bits", "kind"), [(8, "lora"), (4, "lora"), (4, "dora")])
def test_under_lightning_the_base_stays_and_is_the_start_model(
    bits: int, kind: str, saved: Path, tmp_path: Path
) -> None:
    model = quantised(saved, bits, use_dora=kind == "dora")
    before, batch = frozen(model), DATA["forget"]["input_ids"]
    module = lm.UnlearningModule(
        model,
        retain_loss=gs.losses.kl_divergence,
        reference=lm.references.AdapterOff(),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
    ).train()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = L.Trainer(max_epochs=2, accelerator="cpu", enable_checkpointing=False, **quiet)
    trainer.fit(module, DataLoader([DATA] * 2, batch_size=None))
    torch.testing.assert_close(frozen(model), before, rtol=0.0, atol=0.0)
    with torch.no_grad(), model.disable_adapter():
        start = model.eval()(batch).logits
    module.head.states(DATA["forget"])
    found = lm.references.AdapterOff()
    with pytest.warns(UserWarning, match="whose effect is not nothing already"):
        found.prepare(model)
    assert torch.equal(found.states(module.head, DATA["forget"], split=False).values[:1], start[:1])
    with torch.no_grad():
        assert float((model.eval()(batch).logits - start).abs().max()) > 1e-3

    model.save_pretrained(tmp_path)
    again: Any = quantised(saved, bits).unload()
    keep_differentiable(again)  # the kernels for packed weights compute in bfloat16
    from peft import PeftModel

    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(again, tmp_path).eval()(batch).logits, model(batch).logits)


def test_gradients_pass_4_bit_weights_after_an_evaluation(saved: Path) -> None:
    """Against the same numbers as plain float32 weights; bitsandbytes alone loses them on a CPU with AVX512-BF16."""
    from peft.utils.integrations import dequantize_module_weight

    model = quantised(saved, 4)
    plain = get_peft_model(LlamaForCausalLM.from_pretrained(saved), LoraConfig(r=2, target_modules="all-linear"))
    plain.load_state_dict({name: weight for name, weight in model.state_dict().items() if "lora" in name}, strict=False)
    layers = dict(model.named_modules())
    with torch.no_grad():
        for name, module in plain.named_modules():
            if name.endswith("base_layer"):
                module.weight.copy_(dequantize_module_weight(layers[name]))
        for name, weight in [*trained(model).items(), *trained(plain).items()]:
            if "lora_B" in name:
                weight.copy_(0.1 * torch.ones_like(weight).cumsum(0).sin())
    wrapped = lm.UnlearningModule(model)
    wrapped.eval()
    with torch.no_grad():
        model(DATA["forget"]["input_ids"])
    wrapped.train()
    found, wanted = (torch.autograd.grad(losses(one)["retain"], list(trained(one).values())) for one in (model, plain))
    for one, other in zip(found, wanted, strict=True):
        close(one, other, STEPPED_FLOAT32, scale=other.abs().max())


def test_packed_4_bit_weights_are_refused(saved: Path) -> None:
    model = quantised(saved, 4).eval()
    with torch.no_grad():
        model(DATA["forget"]["input_ids"])
    if not any(
        getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False) for weight in model.parameters()
    ):
        pytest.skip("this CPU has no AVX512-BF16, and bitsandbytes packs nothing")
    with pytest.raises(ValueError, match="packed for inference on this CPU"):
        lm.UnlearningModule(model)


@pytest.mark.parametrize("bits", [8, 4])
def test_merging_fila_and_importance_are_refused(bits: int, saved: Path) -> None:
    model = quantised(saved, bits)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for refuse in (
        merged,
        lm.callbacks.probe.plain_copy,
        partial(lora.fila_, importance={}),
        lambda wrong: lora.fisher_importance(wrong, [DATA["forget"]], [DATA["retain"]]),
    ):
        with pytest.raises(ValueError, match="expected a plain floating-point weight"):
            refuse(model)
    torch.testing.assert_close(
        {name: weight.detach() for name, weight in model.named_parameters()}, before, rtol=0, atol=0
    )
    assert copy.deepcopy(model) is not model
