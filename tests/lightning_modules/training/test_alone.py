"""The forget gradient alone: one backward pass a step, in the module and in the command."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import gradsurgery as gs
import lightning_modules as lm
from lightning_modules import cli
from lightning_modules.run.held import held_by_unlearning
from lightning_modules.run.options import UnlearnOptions
from lightning_modules.run.options.method import MethodOptions
from tests.lightning_modules.evaluation.evaluation_workers import model_and_tokenizer
from tests.lightning_modules.run.small_runs import small_run
from tests.lightning_modules.training.test_module import Bigram, batches, fit
from tests.tolerances import STEPPED_FLOAT32, close


def test_without_a_retain_loss_a_step_is_the_base_optimizer_s_and_reads_no_retain_batch() -> None:
    data, seen = batches(6), list[Tensor]()
    model = Bigram()
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    optimizer = partial(torch.optim.AdamW, lr=1e-2)
    module = lm.UnlearningModule(model, retain_loss=None, optimizer=optimizer)
    log = lm.callbacks.SurgeryLogger()
    fit(module, data, callbacks=[log])
    twin = Bigram()
    plain = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    for batch in data:
        plain.zero_grad()
        logits = twin(batch["forget"]["input_ids"], batch["forget"]["attention_mask"]).logits
        tokens = gs.losses.answer_tokens(logits, batch["forget"]["labels"], skip_first=1)
        gs.losses.token_mean(gs.losses.ceu(*tokens), tokens[1]).backward()
        plain.step()
    close(module.model.table.detach(), twin.table.detach(), STEPPED_FLOAT32)
    assert len(seen) == len(data)
    assert all(torch.equal(tokens, batch["forget"]["input_ids"]) for tokens, batch in zip(seen, data, strict=True))
    assert [row["step"] for row in log.rows] == [1, 2, 3, 4, 5, 6]
    assert not {"cosine", "conflict", "loss_retain"} & set(log.rows[0])


@pytest.mark.parametrize(
    "option",
    [
        {"retain_inside": 0.5},
        {"dual": gs.losses.DualVariable(limit=1.0, step_size=0.5, initial=2.0)},
        {"noise": lm.NoiseSettings(0.5)},
    ],
    ids=lambda option: next(iter(option)),
)
def test_what_acts_on_a_retain_loss_is_refused_without_one(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(ValueError, match=f"{name}: expected a retain_loss, on which it acts, found retain_loss=None"):
        lm.UnlearningModule(Bigram(), retain_loss=None, **option)


@pytest.mark.parametrize(
    ("given", "alone"),
    [({}, True), ({"retain_weight": 2.0}, False), ({"guard": "update"}, False), ({"guard": "measure"}, False)],
)
def test_no_rule_needs_a_retain_gradient_only_where_something_reads_it(given: dict[str, Any], alone: bool) -> None:
    method = MethodOptions(rule="none", **given)
    assert method.alone is alone
    found: Tensor = method.bound_rule()(torch.tensor([[4.0, -3.0], [-3.0, 9.0]]))
    assert found.tolist() == [1.0, 0.0]
    assert not MethodOptions(rule="gru", **given).alone


def test_a_model_that_is_given_gets_no_recipe_unasked() -> None:
    plain = UnlearnOptions.of(model="m", tofu="forget10", rule="none")
    assert plain.method == MethodOptions(rule="none")
    assert UnlearnOptions.of(model="m", tofu="forget10", rule="none", recipe="balanced").method.guard == "update"


def test_the_command_takes_the_steps_of_a_rule_that_leaves_the_retain_gradient_out(tmp_path: Path) -> None:
    """And with an anchor; it leaves no record of a surgery that there was not, and its report opens."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, rule in {"none": ["none"], "control": ["gradient_difference", "--rule-options", "{alpha: 0}"]}.items():
        folder = tmp_path / name
        folder.mkdir()
        own = ["--recipe", "paper", "--retain-anchor", "100", "--rule", *rule]
        assert cli.main(small_run(folder, *own)) == 0
        found[name] = load_file(folder / "run" / "model" / "model.safetensors")
    for key, value in found["control"].items():
        close(found["none"][key], value, STEPPED_FLOAT32)
    left = {path.name for path in (tmp_path / "none" / "run").iterdir()}
    assert {"report.html", "curve.csv"} <= left
    assert not {"surgery.csv", "g_effect.csv"} & left
    assert json.loads((tmp_path / "none" / "run" / "metrics.json").read_text())["after"]["forget"]["n"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--retain-noise", "1"], "--retain-noise: expected a retain gradient, on which it acts, found --rule none"),
        (["--retain-inside", "1"], "--retain-inside: expected a retain gradient"),
        (["--dual", "{limit: 1, step_size: 1}"], "--dual: expected a retain gradient"),
        (["--rule-options", "{alpha: 1}"], "--rule-options: expected none with --rule none"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(
    tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(small_run(tmp_path, "--recipe", "paper", "--rule", "none", *options)) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_its_memory_has_no_second_row() -> None:
    model, _ = model_and_tokenizer()
    given = {"model": "m", "tofu": "forget10"}

    def rows(rule: str) -> int:
        parts = held_by_unlearning(model, UnlearnOptions.of(**given, rule=rule, recipe="paper").resolved())
        (row,) = (part.bytes for part in parts if part.what.startswith("surgery"))
        assert row is not None
        return row

    assert rows("none") < rows("gru")
