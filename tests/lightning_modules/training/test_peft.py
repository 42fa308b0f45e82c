"""Adapters of every kind under the optimizer: only they move, as a slow oracle moves them, and switched off they are gone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import gradsurgery as gs
import lightning_modules as lm
from lightning_modules.data.tokenization import Encoded, collate
from lightning_modules.training.adapters import AdapterSettings, adapt
from lightning_modules.training.references import AdapterOff
from tests.reference.training import Surgery
from tests.tolerances import STEPPED, close

pytestmark = pytest.mark.supports(
    "PEFT", "LoRA, DoRA, rsLoRA, several adapters, `modules_to_save`, the start model with adapters switched off"
)

FORGET = [Encoded([1, 3, 4, 5, 6, 2], [-100, -100, 4, 5, 6, 2]), Encoded([1, 7, 5, 4, 2], [-100, -100, 5, 4, 2])]
RETAIN = [Encoded([1, 8, 9, 10, 11, 2], [-100, -100, 9, 10, 11, 2]), Encoded([1, 9, 8, 6, 2], [-100, -100, 8, 6, 2])]
DATA = {"forget": collate(FORGET, 0), "retain": collate(RETAIN, 0)}
ALL = {"r": 2, "target_modules": "all-linear"}


def llama(tied: bool = True, dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=16, tie_word_embeddings=tied)
    return LlamaForCausalLM(config).to(dtype)


def shaken(model: Any, adapter: str, seed: int = 1) -> Any:
    """Every weight of an adapter moved, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if f".{adapter}" in name:
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator).to(weight))
    return model


def plain(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    return get_peft_model(llama(dtype=dtype), LoraConfig(**ALL | options)).to(dtype)


def second(frozen_on: bool) -> Any:
    """An adapter "facts" that was trained before, and a second one that is trained now."""
    model = get_peft_model(llama(), LoraConfig(**ALL), adapter_name="facts").double()
    shaken(model, "facts")
    model.add_adapter("unlearn", LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"]))
    model.double()
    model.base_model.set_adapter(["facts", "unlearn"] if frozen_on else "unlearn")
    for name, weight in model.named_parameters():
        weight.requires_grad_(".unlearn." in name)
    return model


def half_frozen() -> Any:
    """LoRA-FA: A stays as it was drawn."""
    model = plain()
    for name, weight in model.named_parameters():
        if "lora_A" in name:
            weight.requires_grad_(False)
    return model


KINDS: dict[str, Callable[[], Any]] = {
    "lora": plain,
    "dora": partial(plain, use_dora=True),
    "rslora": partial(plain, use_rslora=True, lora_alpha=3),
    "dropout": partial(plain, lora_dropout=0.3),
    "another name": lambda: get_peft_model(llama(), LoraConfig(**ALL), adapter_name="theirs").double(),
    "A frozen": half_frozen,
    "head saved": partial(plain, modules_to_save=["lm_head"]),
    "tied embeddings saved": partial(plain, modules_to_save=["embed_tokens"]),
    "embeddings adapted": partial(plain, target_modules=["embed_tokens", "v_proj"]),
    "another one off": partial(second, False),
    "another one on": partial(second, True),
}


def make(kind: str) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        return KINDS[kind]()


def losses(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, batch in DATA.items():
        logits, labels = gs.losses.answer_tokens(
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"]
        )
        loss = gs.losses.ceu if name == "forget" else gs.losses.cross_entropy
        found[name] = loss(logits, labels).mean()
    return found


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(**{name: DATA["forget"][name] for name in ("input_ids", "attention_mask")}).logits


def frozen(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if not weight.requires_grad}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("front", ["contexts", "join"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_move_as_the_oracle_moves_them_and_nothing_else_does(kind: str, front: str) -> None:
    """Three steps of GRU with guard against `autograd.grad`; what is frozen stays to the last bit, and has no gradient."""
    model: Any = make(kind).train()
    reference = copy.deepcopy(model)
    before, start = frozen(model), {name: weight.detach().clone() for name, weight in trained(model).items()}
    # Not Adam: where B = 0 the gradient of A is rounding, which Adam would blow up to steps of full length.
    base = partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=0.1)
    optimizer = gs.GRU(base(list(trained(model).items())), guard="update")
    oracle = Surgery(
        reference, base(trained(reference).values()), ("forget", "retain"), ema_decay={"retain": 0.2}, guard=True
    )
    for step in range(3):
        torch.manual_seed(step)  # both draw the same dropout
        oracle.step([losses(reference)])
        torch.manual_seed(step)
        found = losses(model)
        if front == "join":
            optimizer.join(**found).backward()
        else:
            for name in ("retain", "forget"):
                with optimizer.objective(name):
                    found[name].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(weight.grad is None for weight in model.parameters())
    torch.testing.assert_close(frozen(model), before, rtol=0.0, atol=0.0)
    wanted = trained(reference)
    assert list(wanted) == list(start)
    for name, weight in trained(model).items():
        close(weight.detach(), wanted[name].detach(), STEPPED)
        assert not torch.equal(weight, start[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_switched_off_the_model_is_the_start_model_to_the_last_bit(kind: str) -> None:
    """In training mode and with dropout too; and flags, active adapters, modes and random state are left as they were."""
    model: Any = make(kind).train()
    name = next(iter(set(model.peft_config) - {"facts"}))
    others = model.base_model.active_adapters if kind == "another one on" else []
    start = copy.deepcopy(model)
    if others:
        start.base_model.set_adapter([other for other in others if other != name])
    else:
        start = start.unload() if "saved" not in kind else llama()
    wanted = logits(start)
    reference, head = AdapterOff(), lm.UnlearningModule(model).head
    reference.prepare(model)
    shaken(model, name)
    assert float((logits(copy.deepcopy(model)) - wanted).abs().max()) > 1e-2
    flags = {key: weight.requires_grad for key, weight in model.named_parameters()}
    state, active = torch.get_rng_state(), list(model.base_model.active_adapters)
    for split in (False, True):
        states = reference.states(head, DATA["forget"], split=split)
        found = states.values if states.head is None else states.values @ states.head.weight.T
        if states.head is None:
            assert torch.equal(found, wanted)
        else:
            close(found, wanted, STEPPED)
    assert flags == {key: weight.requires_grad for key, weight in model.named_parameters()}
    assert torch.equal(torch.get_rng_state(), state)
    assert list(model.base_model.active_adapters) == active
    assert model.training
    assert not [key for key, module in model.named_modules() if not module.training]


@pytest.mark.parametrize("kind", ["dora", "dropout", "head saved", "another one on"])
def test_under_lightning_it_is_the_copy_and_the_base_stays_also_after_a_resume(kind: str, tmp_path: Any) -> None:
    """KL divergence to the start model: the adapters switched off against a frozen copy, six steps in one go and in two."""

    def module(reference: Any) -> lm.UnlearningModule:
        model, options = make(kind), {"optimizer": partial(torch.optim.AdamW, lr=1e-2)}
        return lm.UnlearningModule(
            model, forget_loss=gs.losses.ceu, retain_loss=gs.losses.kl_divergence, reference=reference, **options
        ).train()

    def fit(chosen: lm.UnlearningModule, epochs: int, resume: str | None = None) -> L.Trainer:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False}
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            gradient_clip_val=1.0,
            **quiet,
        )
        torch.manual_seed(1)  # the masks of dropout
        trainer.fit(chosen, DataLoader([DATA] * 3, batch_size=None), ckpt_path=resume)
        return trainer

    off, copied = module(AdapterOff()), module(lm.references.SecondModel())
    before = frozen(off.model)
    fit(off, 2)
    fit(copied, 2)
    torch.testing.assert_close(frozen(off.model), before, rtol=0.0, atol=0.0)
    for name, weight in trained(off.model).items():
        close(weight.detach(), trained(copied.model)[name].detach(), STEPPED)
    if kind == "dropout":
        return  # masks after a resume are the data module's business
    half = module(AdapterOff())
    fit(half, 1).save_checkpoint(tmp_path / "half.ckpt")
    again = module(AdapterOff())
    fit(again, 2, str(tmp_path / "half.ckpt"))
    for name, weight in again.model.named_parameters():
        assert torch.equal(weight, dict(off.model.named_parameters())[name]), name


def fila() -> Any:
    batches = {f"{name}_batches": [batch] for name, batch in DATA.items()}
    return adapt(llama(dtype=torch.float32), AdapterSettings(2, init="fila"), **batches)


def unfrozen() -> Any:
    model = plain()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    return model


def all_frozen() -> Any:
    return plain().requires_grad_(False)


def merged() -> Any:
    model = plain()
    model.merge_adapter()
    return model


def biased() -> Any:
    config = GPT2Config(vocab_size=12, n_embd=16, n_layer=1, n_head=2)
    return get_peft_model(GPT2LMHeadModel(config), LoraConfig(r=2, target_modules=["c_fc"], bias="lora_only"))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (fila, "started by FILA"),
        (partial(plain, torch.float32, init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (partial(plain, torch.float32, init_lora_weights="olora"), "init_lora_weights='olora'"),
        (unfrozen, "model.norm.weight the first"),
        (all_frozen, "all frozen"),
        (merged, r"unmerge_adapter\(\)"),
        (biased, "expected bias='none', found 'lora_only'"),
    ],
)
def test_what_would_not_be_the_start_model_is_refused(build: Any, said: str) -> None:
    model = build()
    flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
    with pytest.raises(ValueError, match=said):
        lm.UnlearningModule(model, retain_loss=gs.losses.kl_divergence, reference=AdapterOff())
    assert flags == {name: weight.requires_grad for name, weight in model.named_parameters()}


def test_adapters_that_do_something_already_are_said() -> None:
    with pytest.warns(UserWarning, match="the start model is the one without default"):
        lm.UnlearningModule(shaken(plain(), "default"), reference=AdapterOff())
    model = plain()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lm.UnlearningModule(model, reference=AdapterOff())


def test_a_learned_prompt_is_switched_off_too() -> None:
    model: Any = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).double()
    reference, head = AdapterOff(), lm.UnlearningModule(model).head
    reference.prepare(model)
    assert isinstance(model, PeftModel)
    assert torch.equal(reference.states(head, DATA["forget"], split=False).values, logits(llama()))
