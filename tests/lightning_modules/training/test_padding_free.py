"""Batches without padding: the states and gradients of one text at a time, of fewer tokens, where attention allows it."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import gradsurgery as gs
import lightning_modules as lm
from lightning_modules import cli
from lightning_modules.run.options import FinetuneOptions, UnlearnOptions
from lightning_modules.training import padding_free
from lightning_modules.training.finetuning import FinetuningModule
from lightning_modules.training.heads import AnswerHead
from lightning_modules.training.padding_free import rows_without_padding
from lightning_modules.training.recomputing import recompute_activations
from lightning_modules.training.references import SecondModel
from tests.lightning_modules.evaluation.test_shared import ALONE, ATTENTION, MAKERS, SIZES, VOCABULARY, model_of
from tests.lightning_modules.run.small_runs import small_run
from tests.lightning_modules.training.test_module import Bigram
from tests.lightning_modules.training.test_recomputing import adapters, llama
from tests.tolerances import LINEAR, close

START = 12  # tokens that all texts begin with, as in a chat template


def batch_of(lengths: tuple[int, ...], *, left: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Texts of these lengths, whose last half is the answer; one of them differs from the first in its last token."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(3, VOCABULARY, (START,), generator=generator)
    texts = [torch.cat([start, torch.randint(3, VOCABULARY, (n - START,), generator=generator)]) for n in lengths]
    texts[1] = torch.cat([texts[0][: lengths[1] - 1], texts[1][-1:]])
    width = max(lengths)
    batch = {name: torch.zeros(len(texts), width, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full((len(texts), width), -100)
    for row, text in enumerate(texts):
        places = slice(width - len(text), width) if left else slice(0, len(text))
        batch["input_ids"][row, places], batch["attention_mask"][row, places] = text, 1
        said = text.clone()
        said[: len(text) // 2] = -100
        batch["labels"][row, places] = said
    return batch


def slow_gradients(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Of the summed cross-entropy of the answers, a text at a time, from the model's own logits."""
    model.zero_grad()
    for row in range(len(batch["input_ids"])):
        kept = batch["attention_mask"][row].bool()
        ids, labels = batch["input_ids"][row, kept][None], batch["labels"][row, kept]
        said = labels[1:] != -100
        logits = model(input_ids=ids).logits[0, :-1][said]
        torch.nn.functional.cross_entropy(logits.float(), labels[1:][said], reduction="sum").backward()
    return gradients(model)


def packed_gradients(model: nn.Module, batch: dict[str, Tensor], head: AnswerHead) -> list[Tensor]:
    model.zero_grad()
    states = head.states(batch)
    hidden, labels = gs.losses.answer_tokens(states.values, batch["labels"])
    assert states.head is not None
    gs.losses.linear(hidden, states.head, labels, gs.losses.Loss.of(gs.losses.cross_entropy)).sum().backward()
    return gradients(model)


def gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(each) if each.grad is None else each.grad.clone() for each in model.parameters()]


def read(model: nn.Module) -> list[int]:
    """Grows by the number of tokens of every pass."""
    found: list[int] = []
    embeddings: Any = model
    embeddings.get_input_embeddings().register_forward_hook(lambda *call: found.append(call[1][0].numel()))
    return found


@pytest.mark.parametrize("kind", ["adapters", "recomputed", "bfloat16"])
def test_gradients_of_adapters_of_recomputed_layers_and_of_bfloat16_weights_too(kind: str) -> None:
    model = model_of("llama").train()
    if kind == "adapters":
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=2, init_lora_weights="gaussian", target_modules="all-linear"))
    if kind == "recomputed":
        recompute_activations(model)
    if kind == "bfloat16":
        model = model.bfloat16()
    batch = batch_of((40, 30, 25, 20))
    head = AnswerHead(model)
    head.pack()
    head.states(batch)
    tokens = read(model)
    found = packed_gradients(model, batch, head)
    assert tokens[0] == 62
    for mine, expected in zip(found, slow_gradients(model, batch), strict=True):
        error = (mine - expected).float().norm() / expected.float().norm().clamp_min(1e-6)
        assert error < (0.1 if kind == "bfloat16" else 1e-4), "bfloat16 has 8 bits, in every sum of two layers"


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", [name for name in MAKERS if name not in (*ALONE, "llama, bfloat16", "gpt2")])
def test_gradients_are_those_of_one_text_at_a_time_of_fewer_tokens(kind: str, left: bool) -> None:
    model = model_of(kind).train()
    batch = batch_of((40, 30, 25, 20), left=left)
    head = AnswerHead(model)
    head.pack()
    head.states(batch)  # what the model allows is known now
    tokens = read(model)
    found = packed_gradients(model, batch, head)
    assert tokens == [(40 - START) + 1 + (25 - START) + (20 - START) + START]
    for mine, expected in zip(found, slow_gradients(model, batch), strict=True):
        close(mine, expected, LINEAR[torch.float32], scale=expected.abs().max().clamp_min(1e-6))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", ALONE)
@pytest.mark.filterwarnings("ignore:.*computes all its logits.*")
def test_a_model_whose_attention_does_not_allow_it_goes_on_with_padding(kind: str, half: bool) -> None:
    model = model_of(kind).train()
    model = model.bfloat16() if half else model
    batch = batch_of((40, 30, 25, 20))
    plain, packing = AnswerHead(model), AnswerHead(model)
    packing.pack()
    expected = plain.states(batch).values
    packing.states(batch)
    tokens = read(model)
    assert torch.equal(packing.states(batch).values, expected)
    assert tokens == [4 * 40]


def test_a_window_that_only_a_later_batch_leaves_is_noticed() -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, **ATTENTION, sliding_window=24)).train()
    head = AnswerHead(model)
    head.pack()
    tokens = read(model)
    head.states(batch_of((20, 18, 16, 14, 20, 20, 20, 20, 20)))  # rows that are longer than any later one
    assert tokens[-1] < 9 * 20
    long, short = batch_of((40, 30, 25, 20), seed=1), batch_of((22, 18, 16, 14), seed=2)
    assert torch.equal(head.states(long).values, AnswerHead(model).states(long).values)
    head.states(short)
    assert tokens[-1] < 4 * 22


def test_a_row_that_is_longer_than_a_local_window_is_noticed() -> None:
    """GPT-Neo's local layers count tokens of the row: the end of a long row does not see what its texts begin with."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
    no_dropout = dict.fromkeys(("classifier_dropout", "resid_dropout", "embed_dropout", "attention_dropout"), 0.0)
    config = GPTNeoConfig(**sizes, **no_dropout, attention_types=[[["global", "local"], 1]], window_size=64)
    model = GPTNeoForCausalLM(config).train()
    model.get_input_embeddings().weight.data.mul_(50)  # so that what is not seen is missed
    head = AnswerHead(model)
    head.pack()
    tokens = read(model)
    head.states(batch_of((20, 18, 16, 14)))
    assert tokens[-1] < 4 * 20
    long = batch_of((20, 18, 16, 14, *range(15, 21), *range(15, 21)), seed=1)
    assert torch.equal(head.states(long).values, AnswerHead(model).states(long).values)


def test_one_that_computes_its_own_logits_or_draws_dropout_too() -> None:
    batch = batch_of((40, 30, 25, 20))
    own = Bigram()
    head = AnswerHead(own)
    head.pack()
    small = {name: tensor % 5 if name == "input_ids" else tensor for name, tensor in batch.items()}
    with pytest.warns(UserWarning, match="computes all its logits"):
        assert head.states(small).values.shape[:2] == (4, 40)
    for model in (llama(dropout=0.5), adapters()):
        head = AnswerHead(model.train())
        head.pack()
        tokens = read(model)
        head.states(small)
        assert tokens[-1] == 4 * 40
    head = AnswerHead(model_of("gpt2").train())  # whose dropout is a module's
    head.pack()
    tokens = read(head.model)
    head.states(batch)
    assert tokens[-1] == 4 * 40


def test_rows_are_about_as_long_as_256_tokens_or_the_longest_text() -> None:
    rows = rows_without_padding(batch_of((90, 80, 70, 60, 90, 50, 60, 64)), torch.float32)
    assert rows is not None
    assert rows.inputs["input_ids"].shape[0] == 2
    assert rows.inputs["input_ids"].shape[1] < 256 + 30
    long = rows_without_padding(batch_of((400, 13, 60, 90, 90)), torch.float32)
    assert long is not None
    assert long.inputs["input_ids"].shape[1] <= 500
    prompt = torch.arange(200).repeat(32, 1)
    ids = torch.cat([prompt, torch.randint(3, VOCABULARY, (32, 20))], dim=1)
    asked = rows_without_padding({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.float32)
    assert asked is not None
    assert asked.inputs["input_ids"].shape[1] <= 300


def test_a_mask_of_more_than_64_mib_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of((90, 80, 70, 60))
    rows = rows_without_padding(batch, torch.float32)
    assert rows is not None
    monkeypatch.setattr(padding_free, "_MASK", rows.inputs["attention_mask"].numel() - 1)
    assert rows_without_padding(batch, torch.float32) is None


def test_a_batch_without_padding_and_without_a_common_beginning_stays_as_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (4, 30), generator=generator)
    assert rows_without_padding({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.float32) is None


def test_a_text_without_a_token_is_left_out_of_the_rows() -> None:
    batch = batch_of((40, 30, 25, 20))
    batch["attention_mask"][3] = 0
    rows = rows_without_padding(batch, torch.float32)
    assert rows is not None
    assert rows.inputs["input_ids"].numel() == 62 - (20 - START)
    assert not rows.places[3].any()


def test_texts_that_are_all_the_same_say_nothing_about_the_model() -> None:
    model = model_of("window").train()
    text = batch_of((40, 30))["input_ids"][:1]
    same = {"input_ids": text.repeat(4, 1), "attention_mask": torch.ones(4, 40, dtype=torch.long)}
    head = AnswerHead(model)
    head.pack()
    expected = AnswerHead(model).states(same).values
    assert torch.equal(head.states(same).values, expected)
    mixed = batch_of((40, 30, 25, 20))
    assert torch.equal(head.states(mixed).values, AnswerHead(model).states(mixed).values)


def test_under_autocast_the_trial_is_exact_and_the_rows_are_read_under_autocast() -> None:
    model = model_of("llama").train()
    batch = batch_of((40, 30, 25, 20))
    head = AnswerHead(model)
    head.pack()
    with torch.autocast("cpu", torch.bfloat16):
        head.states(batch)
        tokens = read(model)
        found = head.states(batch).values
    exact = AnswerHead(model).states(batch).values
    assert tokens[0] == 62
    real = batch["attention_mask"].bool()
    error = float((found - exact)[real].norm() / exact[real].norm())
    assert 0.0 < error < 0.03, f"{error}: bfloat16 has 8 bits, 2^-8, over the operations of two layers"


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_unlearning_takes_the_same_steps_also_beside_a_second_model() -> None:
    start = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
                    num_attention_heads=2, initializer_range=0.3)
    )  # fmt: skip
    found: list[Tensor] = []
    for packs in (False, True):
        model = copy.deepcopy(start)
        reference = SecondModel(copy.deepcopy(start))
        module = lm.UnlearningModule(
            model,
            forget_loss=gs.losses.undial,
            retain_loss=gs.losses.kl_divergence,
            reference=reference,
            optimizer=partial(torch.optim.SGD, lr=0.5),
        )
        if packs:
            module.head.pack()
        both: Any = reference.model
        tokens = read(model), read(both)
        optimizer: Any = module.configure_optimizers()
        for seed in range(3):
            batches = {"forget": batch_of((40, 30, 25, 20), seed=seed), "retain": batch_of((30, 25, 13, 40), seed=seed)}
            losses = {name: compute(module, batches, name) for name, compute in module.objectives.items()}
            optimizer.join(**losses).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(torch.cat([each.detach().flatten() for each in model.parameters()]))
        assert (max(tokens[0][-1], tokens[1][-1]) < 4 * 40) == packs
    close(found[1], found[0], LINEAR[torch.float32])
    before = torch.cat([each.detach().flatten() for each in start.parameters()])
    assert (found[0] - before).abs().max() > 1e-3


def test_a_model_that_is_replaced_is_read_in_the_same_way() -> None:
    module = lm.UnlearningModule(model_of("llama"))
    module.head.pack()
    module.model = model_of("llama, eager")
    assert module.head.packs
    assert module.head.model is module.model


def test_teaching_takes_the_same_steps() -> None:
    losses: list[Tensor] = []
    for packs in (False, True):
        module = FinetuningModule(model_of("llama").train())
        if packs:
            module.head.pack()
        losses += [torch.stack([module.training_step(batch_of((40, 30, 25, 20), seed=seed)) for seed in range(3)])]
    close(losses[1], losses[0], LINEAR[torch.float32], scale=losses[0].abs().max())


def test_a_given_model_is_read_so_by_default_on_a_cpu_and_the_one_from_scratch_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for precision in ("32-true", "32", "bf16-mixed"):
        named = UnlearnOptions.of(model="m", forget="f", retain="r", precision=precision)
        assert named.resolved().training.padding_free is True
    assert UnlearnOptions.of(model="m", forget="f", retain="r").resolved().training.padding_free is True
    assert FinetuneOptions.of(model="m", data="d").resolved().training.padding_free is True
    assert UnlearnOptions().resolved().training.padding_free is False
    asked = UnlearnOptions.of(model="m", forget="f", retain="r", padding_free=False)
    assert asked.resolved().training.padding_free is False
    for other in ({"compile": True}, {"strategy": "fsdp2"}):
        assert UnlearnOptions.of(model="m", forget="f", retain="r", **other).resolved().training.padding_free is False
        with pytest.raises(ValueError, match="padding-free"):
            UnlearnOptions.of(model="m", forget="f", retain="r", padding_free=True, **other).check()
    assisted = UnlearnOptions.of(model="m", forget="f", retain="r", method="uld").resolved()
    assert assisted.training.padding_free is None
    assisted.check_effect()  # as a resumed run does
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert UnlearnOptions.of(model="m", forget="f", retain="r").resolved().training.padding_free is False


def test_the_command_reads_so_what_it_trains_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_by: list[int] = []
    real = AnswerHead._read
    monkeypatch.setattr(AnswerHead, "_read", lambda self, rows: (read_by.append(1), real(self, rows))[1])
    assert cli.main(small_run(tmp_path / "plain", "--padding-free", "false")) == 0
    assert read_by == []
    assert cli.main(small_run(tmp_path / "packed", "--padding-free", "true")) == 0
    assert len(read_by) > 4
