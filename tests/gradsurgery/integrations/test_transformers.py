"""The mixin for Hugging Face's Trainer: every row is the mean that Trainer would minimise, and Trainer stays Trainer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gradsurgery as gs
from tests.problems import TWO, assert_same, snapshot, values
from tests.tolerances import STEPPED_FLOAT32, close

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")

from tests.gradsurgery.integrations.unlearning import (  # noqa: E402 (needs transformers)
    BATCHES,
    Unlearn,
    example,
    examples,
    llama,
    oracle,
    trainer,
    windows,
)

pytestmark = [
    pytest.mark.supports(
        "Hugging Face Trainer",
        "means over each objective's own tokens (`num_items_in_batch`), resuming, evaluation in between",
    ),
    pytest.mark.refuses("DeepSpeed", "it reduces, frees and steps gradients by itself: train with DDP or FSDP2"),
    pytest.mark.refuses("FSDP under Trainer", "untested there: train with DDP, or with FSDP2 outside it"),
    pytest.mark.refuses(
        "`torch.nn.DataParallel`", "one process for each device: start with torchrun or accelerate launch"
    ),
]


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_takes_the_mean_over_each_objectives_own_tokens(accumulate: int, by_token: bool, tmp_path: Path) -> None:
    """Trainer's trap: it does not divide by the micro-batches where a model accepts num_items_in_batch."""
    model = llama()
    model.accepts_loss_kwargs = by_token
    trainer(tmp_path, model, accumulate=accumulate).train()
    close(values(model), oracle(windows(accumulate), by_token=by_token), STEPPED_FLOAT32)


def test_the_two_means_differ_so_that_the_test_above_means_something() -> None:
    one, other = (oracle(windows(3), by_token=by_token) for by_token in (True, False))
    assert not torch.allclose(one, other, atol=1e-2)


def plus_note(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "note": "of no use to the model"}


def pairs() -> list[dict[str, Any]]:
    return [{name: plus_note(example(name, index)) for name in TWO} for index in range(BATCHES)]


def by_hand(rows: list[int]) -> dict[str, dict[str, Tensor]]:
    return {name: {key: torch.tensor([value]) for key, value in example(name, rows[0]).items()} for name in TWO}


FORMS: dict[str, Callable[[], dict[str, Any]]] = {
    "pairs": lambda: {"data": pairs()},
    "a table of pairs": lambda: {"data": datasets.Dataset.from_list(pairs())},
    "a table for each": lambda: {
        "data": datasets.DatasetDict({name: datasets.Dataset.from_list([*map(plus_note, rows)]) for name, rows in examples().items()})
    },
    "a collator that pairs": lambda: {"data": list(range(BATCHES)), "data_collator": by_hand},
    "a shorter set": lambda: {"data": {"forget": examples()["forget"], "retain": [*examples()["retain"], *examples()["retain"]]}},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_data_in_any_form_are_the_same_pairs(form: str, tmp_path: Path) -> None:
    model = llama()
    options = FORMS[form]()
    epochs = 1 if form == "a shorter set" else 2  # of the longest set, which is twice as long there
    trainer(tmp_path, model, num_train_epochs=epochs, **options).train()
    close(values(model), oracle(windows(1)), STEPPED_FLOAT32)


def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    """In the middle of an epoch, in Trainer's own random order, with Trainer's own AdamW, scheduler and scopes by layer."""
    options: dict[str, Any] = {
        "kind": Unlearn,
        "accumulate": 2,
        "optimizers": (None, None),
        "surgery": partial(gs.GRU, scope=gs.scope.by_layer, guard="update"),
        "lr_scheduler_type": "linear",
        "learning_rate": 1e-2,
    }
    model, resumed = llama(), llama()
    whole = trainer(tmp_path, model, save_strategy="steps", save_steps=2, **options)
    whole.train()
    with torch.no_grad():
        resumed.model.norm.weight.zero_()
    again = trainer(tmp_path / "again", resumed, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert whole.state.global_step == again.state.global_step == 6
    for each in (whole, again):
        assert isinstance(each.surgery, gs.GRU)
        assert each.surgery.record is not None
        assert "layer 0 mlp" in (each.surgery.record.blocks or ())
        each.surgery.zero_grad()
    assert_same(snapshot(resumed, again.surgery), snapshot(model, whole.surgery))


class Stop(transformers.TrainerCallback):
    """Stops within the second window of the first training."""

    done = False

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1 and not self.done:
            self.done = control.should_training_stop = True


def test_a_second_training_forgets_the_rows_of_a_window_that_was_cut_short(tmp_path: Path) -> None:
    model = llama()
    twice = trainer(tmp_path, model, accumulate=2, num_train_epochs=1, callbacks=[Stop()])
    twice.train()
    assert twice.state.global_step == 1
    twice.train()
    close(values(model), oracle([[0, 1], *windows(2, epochs=1)]), STEPPED_FLOAT32)


def test_evaluation_in_between_changes_nothing_and_the_log_says_what_surgery_does(tmp_path: Path) -> None:
    model = llama()
    run = trainer(
        tmp_path, model, eval_dataset=examples(2), eval_strategy="steps", eval_steps=3, logging_steps=2, logging_strategy="steps"
    )  # fmt: skip
    run.train()
    close(values(model), oracle(windows(1)), STEPPED_FLOAT32)
    lines = [line for line in run.state.log_history if "loss" in line]
    assert len(lines) == BATCHES  # two epochs, every second step
    line = lines[-1]
    record = run.surgery.record
    assert record is not None
    assert line["cosine"] == pytest.approx(float(record.cosines[0, 1]))
    assert line["coefficient_retain"] == pytest.approx(float(record.coefficients[1]))  # type: ignore[index]
    assert line["conflict"] == float(record.conflict)
    assert line["loss_forget"] == float(run.step_losses["forget"])
    assert {"eval_forget_loss", "eval_retain_loss"} <= {key for line in run.state.log_history for key in line}


def test_the_logged_loss_is_the_sum_of_the_objectives_means(tmp_path: Path) -> None:
    run = trainer(tmp_path, llama(), accumulate=3, logging_steps=1)
    run.train()
    for line in run.state.log_history[:-1]:
        assert line["loss"] == pytest.approx(line["loss_forget"] + line["loss_retain"], abs=2e-4)  # Trainer rounds
    assert line["loss_forget"] > 0.0


def test_more_objectives_and_losses_of_ones_own(tmp_path: Path) -> None:
    names = ("forget", "retain", "style")
    model, plain = llama(), llama()
    data = {name: examples()["retain" if name == "style" else name] for name in names}
    three = partial(gs.GradientSurgery, objectives=names, rule="sum")
    halved = {"style": lambda logits, labels: 0.5 * gs.losses.cross_entropy(logits, labels), "forget": None}
    trainer(tmp_path, model, data=data, surgery=three, losses=halved).train()
    # The plain sum of three objectives, of which two see the same batches: a weighted sum of two.
    weighted = {"retain": lambda logits, labels: 1.5 * gs.losses.cross_entropy(logits, labels), "forget": None}
    trainer(tmp_path, plain, surgery=partial(gs.GradientSurgery, rule="sum"), losses=weighted).train()
    close(values(model), values(plain), STEPPED_FLOAT32)


def test_tokens_and_operations_of_all_objectives_are_counted(tmp_path: Path) -> None:
    run = trainer(tmp_path, llama(), num_train_epochs=1, include_num_input_tokens_seen="all")
    run.train()
    seen = len(TWO) * BATCHES * 8
    if hasattr(transformers.Trainer, "_track_num_input_tokens"):  # Trainer of 5.0 counts in its loop, one batch
        assert run.state.num_input_tokens_seen == seen
    assert run.state.total_flos == 6 * seen * run.model.num_parameters(exclude_embeddings=True)


def rows() -> list[dict[str, list[int]]]:
    return examples()["forget"]


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "one of two": ({"data": {"forget": rows()}}, ValueError, r"train_dataset: expected one for each of .*'retain'\], found \['forget'\]"),
    "another name": ({"data": {"forget": rows(), "keep": rows()}}, ValueError, "train_dataset: .* found .'forget', 'keep'."),
    "none": ({"data": {}}, ValueError, "expected a dataset for each objective, found none"),
    "an empty one": ({"data": {"forget": [], "retain": rows()}}, ValueError, "forget: expected at least one example, found none"),
    "a stream": ({"data": {"forget": iter(rows()), "retain": rows()}}, TypeError, 'forget: expected a dataset with a length.*"retain": example'),
    "an ordinary dataset": ({"data": rows()}, ValueError, "expected a batch for each objective, found .*input_ids.*; pass train_dataset="),
    "pairs of others": ({"data": [{"a": rows()[0], "b": rows()[0]}]}, ValueError, r"expected one for each of .*, found \['a', 'b'\]"),
    "a loss by name": ({"losses": {"forget": "ceu"}}, ValueError, "losses: expected a function of logits and labels, or None, .*'forget'"),
    "a loss of no objective": ({"losses": {"forgt": gs.losses.ceu}}, ValueError, "losses: expected one for each of .*'forgt'"),
}  # fmt: skip


@pytest.mark.parametrize("found", REFUSED)
def test_what_cannot_be_trained_on_is_refused_before_a_step(found: str, tmp_path: Path) -> None:
    options, error, sentence = REFUSED[found]
    model = llama()
    with pytest.raises(error, match=sentence):
        trainer(tmp_path, model, **options).train()
    assert torch.equal(values(model), values(llama()))


def test_pairs_to_evaluate_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, llama(), eval_dataset=pairs())
    with pytest.raises(ValueError, match=r"eval_dataset: expected ordinary examples, .* pass a dataset for each"):
        run.evaluate()


def test_there_is_no_record_before_training(tmp_path: Path) -> None:
    run = trainer(tmp_path, llama(), optimizers=(None, None))
    with pytest.raises(TypeError, match="it is created when training starts"):
        _ = run.surgery


@pytest.mark.parametrize(
    ("attribute", "engine"), [("is_deepspeed_enabled", "DeepSpeed"), ("is_fsdp_enabled", "FSDP"), ("n_gpu", "several GPUs")]
)  # fmt: skip
def test_engines_that_own_the_gradients_are_refused(
    attribute: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = transformers.Trainer.create_accelerator_and_postprocess

    def with_engine(self: Any) -> None:
        make(self)
        if attribute == "n_gpu":
            self.args._n_gpu = 2
        else:
            setattr(self, attribute, True)

    monkeypatch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", with_engine)
    with pytest.raises(RuntimeError, match=f"expected one process for each device.* found {engine}.*torchrun"):
        trainer(tmp_path, llama(), optimizers=(None, None))


def test_the_mean_of_no_token_is_0(tmp_path: Path) -> None:
    run = trainer(tmp_path, llama())
    for number in (0, torch.tensor(0), None):
        assert float(run.mean_over_step(torch.zeros(0), number)) == 0.0
