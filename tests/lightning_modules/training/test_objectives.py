"""Every kind of loss through `UnlearningModule`: the same number and gradient as from all logits, whatever the model and the reference."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

import gradsurgery as gs
import lightning_modules as lm
from lightning_modules.data.order import PairDataset
from lightning_modules.data.tokenization import Encoded, collate
from lightning_modules.training import objectives
from tests.tolerances import LINEAR, close

SIZES: dict[str, Any] = {
    "vocab_size": 29, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def llama(**options: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **options))


def biased(model: Any) -> Any:
    nn.init.normal_(model.lm_head.bias)
    return model


FAMILIES = {
    "Llama, tied": lambda: llama(tie_word_embeddings=True),
    "Llama": lambda: llama(tie_word_embeddings=False),
    "Gemma 2, capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0)),
    "Cohere, scaled": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3)),
    "Granite, scaled": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0)),
    "Phi, a bias in the head": lambda: biased(PhiForCausalLM(PhiConfig(**SIZES))),
    "GPT-2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=29, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    ),
    "Llama with adapters": lambda: get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear")),
}  # fmt: skip


def make(family: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    if "adapters" in family:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # as if trained: a fresh one changes nothing
                nn.init.normal_(parameter, std=0.3)
    return model.double()


def encoded(seed: int, count: int = 4) -> list[Encoded]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        tokens = torch.randint(3, 29, (6 + number,), generator=generator).tolist()
        rows.append(Encoded(tokens, [-100, -100, *tokens[2:]]))
    return rows


def batches() -> dict[str, dict[str, Tensor]]:
    sets = {name: encoded(seed) for seed, name in enumerate(("forget", "retain", "refusal"))}
    return {name: collate(rows, 0) | {"index": torch.arange(4)} for name, rows in sets.items()}


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def nlls(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Sums over each answer, one sequence at a time."""
    logits, sums = logits_of(model, batch), []
    for row, labels in zip(logits, batch["labels"], strict=True):
        steps = [t for t in range(1, len(labels)) if labels[t] != -100]
        sums.append(sum(-torch.log_softmax(row[t - 1], -1)[labels[t]] for t in steps))
    return torch.stack(sums)


def expected(name: str, model: nn.Module, before: nn.Module, data: dict[str, dict[str, Tensor]]) -> Tensor:
    forget = data["forget"]
    lengths = (forget["labels"][:, 1:] != -100).sum(1)
    with torch.no_grad():
        old = {key: nlls(before, data[key]) for key in ("forget", "refusal")}
    if name == "npo":
        return -(20 * torch.nn.functional.logsigmoid(0.1 * (nlls(model, forget) - old["forget"]))).mean()
    if name == "simnpo":
        return -(2 / 4.5 * torch.nn.functional.logsigmoid(4.5 * nlls(model, forget) / lengths)).mean()
    if name == "dpo":
        chosen, rejected = nlls(model, data["refusal"]) - old["refusal"], nlls(model, forget) - old["forget"]
        return -(20 * torch.nn.functional.logsigmoid(0.1 * (rejected - chosen))).mean()
    if name == "idk":
        return nlls(model, data["refusal"]).sum() / (data["refusal"]["labels"][:, 1:] != -100).sum()
    if name == "jensun":
        refusal = data["refusal"]
        return gs.losses.jensen_shannon_label(
            *gs.losses.answer_tokens(logits_of(model, refusal), refusal["labels"])
        ).mean()
    logits, tokens = gs.losses.answer_tokens(logits_of(model, forget), forget["labels"], skip_first=int(name == "ceu"))
    if name in ("undial", "kl_divergence", "jensen_shannon"):
        with torch.no_grad():
            target, _ = gs.losses.answer_tokens(logits_of(before, forget), forget["labels"])
        return gs.losses.as_row_loss(objectives.by_name(name))(logits, tokens, target).mean()
    return gs.losses.as_row_loss(objectives.by_name(name))(logits, tokens).mean()


def gradients(loss: Tensor, model: nn.Module) -> Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, grads, strict=True)]
    )


@pytest.mark.parametrize("name", objectives.NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_loss_of_every_family_is_that_of_all_logits(family: str, name: str) -> None:
    model, before, data = make(family), make(family, seed=1), batches()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no family here may fall back
        module = lm.UnlearningModule(
            model, forget_loss=objectives.by_name(name), reference=lm.references.SecondModel(copy.deepcopy(before))
        )
        found = module.objectives["forget"](module, data, "forget")
    wanted = expected(name, model, before, data)
    assert module.head.splits()
    close(found.detach(), wanted.detach(), LINEAR[torch.float32], scale=1.0 + float(wanted.abs()))
    one, other = gradients(found, model), gradients(wanted, model)
    close(one, other, LINEAR[torch.float32], scale=float(other.norm()))
    assert other.norm() > 0


class Plain(nn.Module):
    """A model without parts."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


class Ruling(LlamaForCausalLM):
    """A family that rules two tokens out in its logits, as some do with those of images."""

    def forward(self, **inputs: Any) -> Any:
        out = super().forward(**inputs)
        out.logits = out.logits.index_fill(-1, torch.tensor([3, 4]), -1e4)
        return out


@pytest.mark.parametrize("name", ["ceu", "npo", "undial", "kl_divergence"])
@pytest.mark.parametrize("kind", ["no parts", "other logits", "adapters in the head"])
def test_other_models_compute_their_logits_and_say_so_once(kind: str, name: str) -> None:
    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        if kind == "no parts":
            return Plain(llama().double())
        if kind == "other logits":
            return Ruling(LlamaConfig(**SIZES)).double()
        return get_peft_model(llama().double(), LoraConfig(r=2, target_modules=["lm_head"]))  # pyright: ignore

    model, before, data = build(0), build(1), batches()
    module = lm.UnlearningModule(
        model, forget_loss=objectives.by_name(name), reference=lm.references.SecondModel(before)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = module.objectives["forget"](module, data, "forget")
        module.objectives["retain"](module, data, "retain")
    messages = [str(w.message) for w in caught if "all its logits" in str(w.message)]
    assert len(messages) == (1 if name == "ceu" else 2)  # the model's, and its reference's
    assert not module.head.splits()
    one, other = gradients(found, model), gradients(expected(name, model, before, data), model)
    close(one, other, LINEAR[torch.float32], scale=float(other.norm()))


class Offset(LlamaForCausalLM):
    """Adds a trained number to each logit; it starts at 0."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.offset = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, **inputs: Any) -> Any:
        out = super().forward(**inputs)
        out.logits = out.logits + self.offset
        return out


class Dropping(LlamaForCausalLM):
    """Drops numbers between backbone and head."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.dropped = nn.Dropout(0.5)


def hooked(kind: str) -> nn.Module:
    model: Any = llama()
    beside = nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
    nn.init.zeros_(beside.weight)
    if kind == "a hook on the head":
        model.lm_head.register_forward_hook(lambda head, inputs, logits: logits + beside(inputs[0]))
    else:
        model.register_forward_pre_hook(lambda model, inputs: None)
    return model


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("a weight beside", "its weight offset is in neither backbone nor head"),
        ("dropout between", "dropped drops numbers outside of backbone and head"),
        ("a hook on the head", "it or its head has forward hooks"),
        ("a hook on the model", "it or its head has forward hooks"),
    ],
)
def test_what_stands_beside_the_parts_counts_though_it_changes_no_logit_yet(kind: str, reason: str) -> None:
    config = LlamaConfig(**SIZES)
    model = {"a weight beside": Offset, "dropout between": Dropping}.get(kind, lambda _: hooked(kind))(config)
    module = lm.UnlearningModule(model)
    with pytest.warns(UserWarning, match=reason):
        loss = module.objectives["forget"](module, batches(), "forget")
    assert not module.head.splits()
    if kind == "a weight beside":
        (gradient,) = torch.autograd.grad(loss, [model.offset])
        assert gradient.abs().max() > 1e-3


def test_a_weight_that_no_logit_reads_does_not_keep_a_model_whole() -> None:
    model: Any = llama()
    model.value_head = nn.Linear(model.config.hidden_size, 1)
    module = lm.UnlearningModule(model)
    module.objectives["forget"](module, batches(), "forget")
    assert module.head.splits()


def test_only_one_of_model_and_reference_splits() -> None:
    model, before, data = make("Llama"), Plain(make("Llama", 1)), batches()
    module = lm.UnlearningModule(model, forget_loss=gs.losses.undial, reference=lm.references.SecondModel(before))
    with pytest.warns(UserWarning, match="all its logits"):
        found = module.objectives["forget"](module, data, "forget")
    close(found.detach(), expected("undial", model, before, data).detach(), LINEAR[torch.float32])


@pytest.mark.parametrize("name", ["npo", "dpo", "undial", "kl_divergence"])
def test_the_adapters_switched_off_are_a_reference(name: str) -> None:
    model, data = make("Llama with adapters"), batches()
    base = copy.deepcopy(model).unload()
    module = lm.UnlearningModule(
        model, forget_loss=objectives.by_name(name), reference=lm.references.AdapterOff()
    ).train()
    found = module.objectives["forget"](module, data, "forget")
    wanted = expected(name, model, base, data)
    close(found.detach(), wanted.detach(), LINEAR[torch.float32], scale=1 + float(wanted.abs()))
    assert model.training
    with pytest.raises(TypeError, match="AdapterOff"):
        lm.UnlearningModule(make("Llama"), reference=lm.references.AdapterOff())


@pytest.mark.parametrize("name", ["npo", "dpo"])
def test_numbers_on_a_disk_are_a_reference(name: str, tmp_path: Path) -> None:
    model, before, data = make("Llama"), make("Llama", 1), batches()
    sets = PairDataset(encoded(0), encoded(1), encoded(2))
    lm.references.precompute(before, sets, tmp_path / "deep" / "nll.safetensors", pad_token_id=0)
    module = lm.UnlearningModule(
        model,
        forget_loss=objectives.by_name(name),
        reference=lm.references.Precomputed(tmp_path / "deep" / "nll.safetensors"),
    )
    found = module.objectives["forget"](module, data, "forget")
    close(found.detach(), expected(name, model, before, data).detach(), LINEAR[torch.float32], scale=20.0)
    shuffled = {key: {k: v.flip(0) for k, v in batch.items()} for key, batch in data.items()}
    close(
        module.objectives["forget"](module, shuffled, "forget").detach(),
        found.detach(),
        LINEAR[torch.float32],
        scale=20.0,
    )

    data["forget"]["index"] = data["forget"]["index"].flip(0)
    with pytest.raises(ValueError, match="others"):
        module.objectives["forget"](module, data, "forget")
    del data["forget"]["index"]
    with pytest.raises(ValueError, match="index"):
        module.objectives["forget"](module, data, "forget")
    with pytest.raises(FileNotFoundError, match="precompute"):
        lm.references.Precomputed(tmp_path / "none.safetensors")
    logits = lm.UnlearningModule(model, forget_loss=gs.losses.undial, reference=module.reference)
    with pytest.raises(TypeError, match="SecondModel"):
        logits.objectives["forget"](logits, batches(), "forget")


def test_what_is_missing_is_said() -> None:
    with pytest.raises(ValueError, match=r"npo: expected a reference"):
        lm.UnlearningModule(make("Llama"), forget_loss=partial(gs.losses.npo, beta=0.5))
    module = lm.UnlearningModule(make("Llama"), forget_loss=gs.losses.dpo, reference=lm.references.SecondModel())
    data = batches()
    del data["refusal"]
    with pytest.raises(ValueError, match="refusals"):
        module.objectives["forget"](module, data, "forget")
    with pytest.raises(ValueError, match="retain_loss"):
        lm.UnlearningModule(make("Llama"), retain_loss=gs.losses.dpo, reference=lm.references.SecondModel())
    with pytest.raises(ValueError, match="reference"):
        lm.UnlearningModule(make("Llama"), retain_loss=objectives.rmu(1))
    with pytest.raises(ValueError, match="skip_first"):
        lm.UnlearningModule(make("Llama"), forget_loss=objectives.idk, skip_first=1)
    with pytest.raises(TypeError, match="by_name"):
        lm.UnlearningModule(make("Llama"), forget_loss="ceu")
    model = make("Llama")
    with pytest.raises(ValueError, match="another model"):
        lm.UnlearningModule(model, reference=lm.references.SecondModel(model))
    used = lm.references.SecondModel()
    lm.UnlearningModule(model, reference=used)
    with pytest.raises(ValueError, match="a new SecondModel"):
        lm.UnlearningModule(make("Llama"), reference=used)
    with pytest.raises(ValueError, match="npoo"):
        objectives.by_name("npoo")


def test_options_reach_the_losses() -> None:
    model, data = make("Llama"), batches()
    found = []
    for beta in (0.1, 2.0):
        torch.manual_seed(1)
        module = lm.UnlearningModule(
            model, forget_loss=partial(gs.losses.npo, beta=beta), reference=lm.references.SecondModel(make("Llama", 1))
        )
        found.append(float(module.objectives["forget"](module, data, "forget").detach()))
    distance = nlls(model, data["forget"]) - nlls(make("Llama", 1), data["forget"])
    for beta, value in zip((0.1, 2.0), found, strict=True):
        assert value == pytest.approx(
            float(-(2 / beta * torch.nn.functional.logsigmoid(beta * distance)).mean()), rel=1e-5
        )


def test_rmu_steers_a_layer_and_holds_it() -> None:
    model, before, data = make("Llama"), make("Llama", 1), batches()
    direction = gs.losses.rmu_direction(16, 2.0, generator=torch.Generator().manual_seed(0))
    module = lm.UnlearningModule(
        model,
        forget_loss=objectives.rmu(1, direction),
        retain_loss=objectives.rmu(1),
        reference=lm.references.SecondModel(before),
    )
    for name in ("forget", "retain"):
        inputs = {key: data[name][key] for key in ("input_ids", "attention_mask")}
        hidden = model(**inputs, output_hidden_states=True).hidden_states[1]
        target = (
            direction.double() if name == "forget" else before(**inputs, output_hidden_states=True).hidden_states[1]
        )
        wanted = gs.losses.rmu(hidden, target, data[name]["labels"] != -100).mean()
        assert float(module.objectives[name](module, data, name)) == pytest.approx(float(wanted), rel=1e-12)


@pytest.mark.parametrize("name", ["ceu", "npo"])
def test_logits_of_all_tokens_are_never_held(name: str) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": 8000}))
    module = lm.UnlearningModule(model, forget_loss=objectives.by_name(name), reference=lm.references.SecondModel())
    model.lm_head.weight.requires_grad_(False)
    data = {"forget": {key: value.repeat(1, 40) for key, value in batches()["forget"].items() if value.dim() == 2}}
    data["forget"]["attention_mask"].fill_(1)
    tokens = int((data["forget"]["labels"] != -100).sum())
    module.objectives["forget"](module, data, "forget")  # compares both ways on a few tokens
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        module.objectives["forget"](module, data, "forget").backward()
    largest = max(event.nbytes() for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]")
    assert tokens > 300
    assert largest < tokens * 8000 * 4 / 3


def test_under_autocast_and_gradient_checkpointing() -> None:
    model = make("Llama").float()
    model.gradient_checkpointing_enable()
    module = lm.UnlearningModule(model).train()
    data = batches()
    with torch.autocast("cpu", torch.bfloat16):
        found = module.objectives["forget"](module, data, "forget")
    wanted = expected("ceu", model, model, data)
    assert float(found) == pytest.approx(float(wanted), rel=0.05)
    assert gradients(found, model).isfinite().all()
