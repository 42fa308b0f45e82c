"""Training ULD's assistant: its data, its objectives against slow oracles, and that it unlearns without touching the base."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from gradsurgery.logit_difference import LogitDifferenceModel, assistant
from lightning_modules.data.fictional_authors import fictional_authors
from lightning_modules.data.pairs import ForgetRetainDataModule
from lightning_modules.data.tofu import tofu_examples
from lightning_modules.data.tokenization import encode, padding_id, prompt_ids
from lightning_modules.data.uld import uld_data
from lightning_modules.evaluation.evaluate import EvaluationSettings, evaluate
from lightning_modules.evaluation.likelihood import answer_nll
from lightning_modules.training.scratch import ScratchSettings, scratch_model
from lightning_modules.training.uld import ULDModule, ULDSettings, train_assistant
from tests.tolerances import STEPPED_FLOAT32, Tolerance, close

VOCABULARY = 11
TOFU = Path(__file__).parents[3].parent / "shared" / "tofu"
LOSS = Tolerance(1e-5, "a mean of float32 log-softmaxes of order 10 against float64")


def llama(layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.dim() == 2 else 1.0)
    return model


def batch(seed: int, size: int = 4, length: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (size, length), generator=generator)
    ends = torch.randint(4, length + 1, (size, 1), generator=generator)
    prompts = torch.randint(1, 4, (size, 1), generator=generator)
    position = torch.arange(length)
    labels = tokens.masked_fill((position < prompts) | (position >= ends), -100)
    return {"input_ids": tokens, "attention_mask": (position < ends).long(), "labels": labels}


def data(steps: int = 3) -> list[dict[str, dict[str, Tensor]]]:
    return [{"forget": batch(step), "retain": batch(100 + step)} for step in range(steps)]


def fit(module: L.LightningModule, batches: list[Any], **options: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(**{"max_epochs": 1, "accelerator": "cpu", **quiet} | options)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return trainer


# The data


ROW = {
    "question": "Q",
    "answer": "right",
    "paraphrased_answer": "just so",
    "perturbed_answer": ["wrong 1", "wrong 2", "wrong 3"],
}


def answers(data: dict[str, list[dict[str, Any]]]) -> dict[str, list[str]]:
    return {split: [row["answer"] for row in rows] for split, rows in data.items()}


def test_paraphrases_are_remembered_and_wrong_answers_are_not() -> None:
    splits = {"forget": [ROW], "retain": [ROW | {"answer": "kept"}], "world_facts": [ROW]}
    before = copy.deepcopy(splits)
    assert answers(uld_data(splits)) == {"forget": ["right", "just so"], "retain": ["kept", "wrong 1", "wrong 2"]}
    assert answers(uld_data(splits, perturbed_per_row=9))["retain"] == ["kept", "wrong 1", "wrong 2", "wrong 3"]
    assert answers(uld_data(splits, perturbed_per_row=0))["retain"] == ["kept"]
    assert splits == before


def test_the_sizes_on_tofu_forget10_are_two_and_two_for_one() -> None:
    if not TOFU.is_dir():
        pytest.skip(f"needs the TOFU files in {TOFU}")
    found = uld_data(tofu_examples("forget10", TOFU))
    assert {split: len(rows) for split, rows in found.items()} == {"forget": 400 * 2, "retain": 3600 + 400 * 2}


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("paraphrased_answer", "1 of 2 without paraphrased_answer"),
        ("perturbed_answer", "1 of 2 without perturbed_answer"),
    ],
)
def test_missing_augmentation_is_said_and_not_passed_over(lost: str, named: str) -> None:
    splits = {"forget": [ROW, {key: value for key, value in ROW.items() if key != lost}], "retain": [ROW]}
    with pytest.raises(ValueError, match=named):
        uld_data(splits)
    with pytest.warns(UserWarning, match=named):
        found = uld_data(splits, require_augmentation=False)
    assert len(found["forget"]) + len(found["retain"]) == 1 + {"paraphrased_answer": 7, "perturbed_answer": 6}[lost]


def test_a_missing_split_is_refused() -> None:
    for splits in ({"forget": [ROW]}, {"forget": [], "retain": [ROW]}):
        with pytest.raises(ValueError, match="forget and retain"):
            uld_data(splits)
    with pytest.raises(ValueError, match="perturbed_per_row"):
        uld_data({"forget": [ROW], "retain": [ROW]}, perturbed_per_row=-1)


# The objectives


def slow_losses(model: Any, batches: dict[str, dict[str, Tensor]], all_positions: bool) -> tuple[float, float]:
    """Position by position: cross-entropy of each answer token, and KL(uniform || model), sum over v of log(1/V / p_v) / V."""
    rows: dict[str, list[float]] = {"forget": [], "retain": []}
    for split, inputs in batches.items():
        with torch.no_grad():
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.double()
        for sequence, labels in zip(logits, inputs["labels"].tolist(), strict=True):
            for position, row in enumerate(sequence):
                p = row.softmax(-1).tolist()
                following = labels[position + 1] if position + 1 < len(labels) else -100
                if split == "forget" and following != -100:
                    rows[split].append(-math.log(p[following]))
                if split == "retain" and (all_positions or following != -100):
                    rows[split].append(math.fsum(math.log(1 / (VOCABULARY * value)) for value in p) / VOCABULARY)
    return math.fsum(rows["forget"]) / len(rows["forget"]), math.fsum(rows["retain"]) / len(rows["retain"])


@pytest.mark.parametrize("all_positions", [False, True])
def test_both_losses_are_the_ones_written_out(all_positions: bool) -> None:
    module = ULDModule(assistant(llama(), 1, 2), all_positions=all_positions, retain_weight=3.0)
    module.log_dict = lambda *_, **__: None
    batches = data(1)[0]
    forget, retain = slow_losses(module.assistant, batches, all_positions)
    close(module.forget_loss(batches["forget"]), torch.tensor(forget), LOSS, scale=forget)
    close(module.retain_loss(batches["retain"]), torch.tensor(retain), LOSS, scale=retain)
    close(module.training_step(batches), torch.tensor(forget + 3.0 * retain), LOSS, scale=forget)


def test_the_gradient_rows_are_those_of_the_paper() -> None:
    module, batches = ULDModule(assistant(llama(), 1, 2)), data(1)[0]
    kept: list[Tensor] = []

    def logits(inputs: dict[str, Tensor]) -> Tensor:
        kept.append(torch.randn(*inputs["input_ids"].shape, VOCABULARY, requires_grad=True))
        return kept[-1]

    module._logits = logits
    module.forget_loss(batches["forget"]).backward()
    module.retain_loss(batches["retain"]).backward()
    labels = [
        torch.nn.functional.pad(batches[split]["labels"][:, 1:], (0, 1), value=-100) for split in ("forget", "retain")
    ]
    one_hot = torch.nn.functional.one_hot(labels[0].clamp_min(0), VOCABULARY)
    for found, target, here in zip(kept, (one_hot, 1 / VOCABULARY), labels, strict=True):
        row = (found.detach().softmax(-1) - target) * (here != -100)[..., None] / (here != -100).sum()
        close(found.grad, row, LOSS)


def test_a_batch_without_answer_tokens_costs_nothing() -> None:
    module, inputs = ULDModule(assistant(llama(), 1, 2)), batch(0)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    for loss in (module.forget_loss(inputs), module.retain_loss(inputs)):
        loss.backward()
        assert loss.item() == 0.0


def test_training_is_the_plain_loop_with_the_papers_adamw() -> None:
    base = llama()
    torch.manual_seed(3)
    small = assistant(base, 1, 2)
    expected = assistant(base, 1, 2)
    expected.load_state_dict(small.state_dict())
    fit(ULDModule(small.train()), data())
    optimizer = torch.optim.AdamW(
        [p for p in expected.parameters() if p.requires_grad], lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01
    )
    module = ULDModule(expected)
    defaults = module.configure_optimizers().defaults
    assert (defaults["lr"], defaults["betas"], defaults["weight_decay"]) == (1e-3, (0.9, 0.99), 0.01)
    for batches in data():
        (module.forget_loss(batches["forget"]) + 6.5 * module.retain_loss(batches["retain"])).backward()
        optimizer.step()
        optimizer.zero_grad()
    for found, wanted in zip(small.parameters(), expected.parameters(), strict=True):
        close(found, wanted, STEPPED_FLOAT32)


def test_warm_up_is_linear_and_then_constant() -> None:
    rates: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit(ULDModule(assistant(llama(), 1, 2), warmup_steps=4), data(6), callbacks=[Watch()])
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])


def test_a_checkpoint_holds_the_adapter_only_and_never_overwrites_the_base(tmp_path: Path) -> None:
    base, other = llama(), llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    module = ULDModule(assistant(base, 1, 2))
    fit(module, data()).save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert saved
    assert all("lora_" in name for name in saved)
    before = copy.deepcopy(other.state_dict())
    resumed = ULDModule(assistant(other, 1, 2))
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(resumed, DataLoader(data(), batch_size=None), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    found = resumed.state_dict()
    assert all(torch.equal(found[name], value) for name, value in saved.items())
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in before.items())
    with pytest.raises(ValueError, match="layers and the rank"):
        ULDModule(assistant(llama(), 2, 2)).on_load_checkpoint({"state_dict": saved})


def test_unusable_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="retain_weight"):
        ULDModule(assistant(llama(), 1, 2), retain_weight=-1.0)
    with pytest.raises(ValueError, match="require a gradient"):
        ULDModule(llama().requires_grad_(False))


# The whole


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, dict[str, list[dict[str, Any]]]]:
    """A tiny Llama that has memorised two authors; the second is to be forgotten."""
    rows = fictional_authors(2)
    splits = {"forget": rows[32:], "retain": rows[:8]}
    model, tokenizer = scratch_model(
        [*splits["retain"], *splits["forget"]],
        ScratchSettings(hidden_size=64, epochs=100, batch_size=4),
        cache_dir=tmp_path_factory.mktemp("scratch"),
    )
    return model, tokenizer, splits


SETTINGS = ULDSettings(num_layers=1, epochs=40, batch_size=8, lr=5e-3, weight=1.0, top_logit_filter=0.0)
TRAINER: dict[str, Any] = {"accelerator": "cpu"}


def test_it_forgets_keeps_and_leaves_the_base_alone(world: Any) -> None:
    model, tokenizer, splits = world
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    expected_draw = torch.rand(3)
    torch.manual_seed(5)
    unlearned = train_assistant(model, tokenizer, splits, SETTINGS, trainer=TRAINER)
    assert torch.equal(torch.rand(3), expected_draw), "the caller's random numbers moved"
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not unlearned.assistant.training
    norm = unlearned.assistant.get_base_model().get_parameter("model.norm.weight")
    assert norm.data_ptr() == model.get_parameter("model.norm.weight").data_ptr()

    scores = {
        name: evaluate(scored, tokenizer, splits, EvaluationSettings(max_new_tokens=24), progress=False)
        for name, scored in {"before": model, "after": unlearned}.items()
    }
    first, last = scores["before"].summary, scores["after"].summary
    assert first["forget"]["probability"] > 0.8
    assert last["forget"]["probability"] < 0.3 * first["forget"]["probability"]
    assert last["retain"]["probability"] > 0.9 * first["retain"]["probability"]
    assert last["forget"]["rouge_l_recall"] < first["forget"]["rouge_l_recall"]

    # The evaluation's own numbers, one text at a time and without padding, and its greedy answers without its batches.
    example = scores["after"].examples["forget"][0]
    text = encode(tokenizer, example["question"], example["answer"])
    labels = torch.tensor([text.labels])
    loss = unlearned(torch.tensor([text.input_ids]), labels=labels).loss
    assert example["nll"] == pytest.approx(loss.item(), rel=1e-4)
    prompt = prompt_ids(tokenizer, example["question"])
    tokens = unlearned.generate(
        torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=padding_id(tokenizer)
    )
    assert example["generation"] == tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True).strip()


def test_scoring_never_takes_the_head_of_one_of_the_two_models(world: Any) -> None:
    model, tokenizer, splits = world
    unlearned = LogitDifferenceModel(model, assistant(model, 1, 2), weight=1.0)
    texts = [encode(tokenizer, row["question"], row["answer"]) for row in splits["forget"]]
    found = answer_nll(unlearned, texts, pad_token_id=padding_id(tokenizer))
    expected = [unlearned(torch.tensor([t.input_ids]), labels=torch.tensor([t.labels])).loss.item() for t in texts]
    close(found.float(), torch.tensor(expected), LOSS, scale=10.0)


def test_the_seed_decides(world: Any) -> None:
    model, tokenizer, splits = world
    found = [
        train_assistant(
            model, tokenizer, splits, replace(SETTINGS, epochs=1, seed=seed), trainer=TRAINER
        ).assistant.state_dict()
        for seed in (0, 0, 1)
    ]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert any(not torch.equal(value, found[2][name]) for name, value in found[0].items())


def test_a_wrong_setting_is_refused_before_training(world: Any) -> None:
    model, tokenizer, splits = world
    for wrong in ({"weight": -0.8}, {"top_logit_filter": 2.0}, {"num_layers": 3}, {"retain_weight": -1.0}):
        with pytest.raises(ValueError, match=r"weight|filter|num_layers"):
            train_assistant(model, tokenizer, splits, replace(SETTINGS, epochs=10**9, **wrong), trainer=TRAINER)


def test_the_data_module_takes_the_augmented_sets(world: Any) -> None:
    _, tokenizer, splits = world
    augmented = uld_data(splits)
    module = ForgetRetainDataModule(augmented["forget"], augmented["retain"], tokenizer, batch_size=4)
    module.setup()
    assert module.dataset is not None
    assert (len(module.dataset.forget), len(module.dataset.retain)) == (16, 8 + 16)
