"""The forget gradient alone: one backward pass a step, in the module and in the command."""

from __future__ import annotations

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
from lightning_modules.ablation.grid import Grid, Run
from lightning_modules.ablation.many_rows import ManyRows
from lightning_modules.ablation.methods import Method
from lightning_modules.ablation.sections import Targets
from lightning_modules.ablation.training import build_module
from lightning_modules.run.held import held_by_unlearning
from lightning_modules.run.options import UnlearnOptions
from lightning_modules.run.options.method import MethodOptions
from lightning_modules.training.protecting import ProtectingModule
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
    [
        ({}, True),
        ({"retain_weight": 2.0}, False),
        ({"retain_inside": 2.0}, False),
        ({"guard": "update"}, False),
        ({"guard": "measure"}, False),
    ],
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
    run = tmp_path / "none" / "run"
    assert not (run / "g_effect.csv").exists()
    assert (run / "surgery.csv").read_text().splitlines()[
        0
    ] == "step,loss_forget,norm_forget,update_norm,coefficient_forget,predicted_change_forget"
    report = (run / "report.md").read_text()
    assert "is not in the folder" not in report
    assert "conflict" not in report
    assert "unlearns: ceu with no rule" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--retain-noise", "1"], "--retain-noise 1.0"),
        (["--ema-decay", "0.7", "--retain-weight", "5"], "--ema-decay 0.7"),
        (["--retain-noise", "1", "--guard", "measure", "--scope", "tensor"], "--retain-noise 1.0"),
        (["--dual", "{limit: 1, step_size: 1}"], "--dual {'limit': 1.0, 'step_size': 1.0}"),
        (["--rule-options", "{alpha: 1}"], "--rule-options {'alpha': 1.0}"),
        (["--metric", "optimizer", "--scope", "tensor"], "--scope tensor, --metric optimizer"),
        (["--retain-loss", "kl_divergence"], "--retain-loss kl_divergence"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(
    tmp_path: Path, options: list[str], found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(small_run(tmp_path, "--recipe", "paper", "--rule", "none", *options)) == 1
    said = f"--rule none: expected no option that needs a rule or a retain gradient, found {found}; leave it out"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_resumed_ends_in_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[dict[str, Tensor]] = []
    own = ("--recipe", "paper", "--rule", "none", "--retain-anchor", "100", "--stop-below", "0", "--score-every", "2")
    for name in ("whole", "interrupted"):
        (tmp_path / name).mkdir()
        arguments = small_run(tmp_path / name, *own, "--checkpoint-every", "1")
        if name == "interrupted":
            step = lm.UnlearningModule.on_train_batch_start

            def stop(module: Any, *rest: Any, step: Any = step) -> None:
                if module.trainer.global_step == 3:
                    raise KeyboardInterrupt
                step(module, *rest)

            with monkeypatch.context() as patch:
                patch.setattr(lm.UnlearningModule, "on_train_batch_start", stop)
                assert cli.main(arguments) == 130
            arguments = ["unlearn", "--resume", "--output", str(tmp_path / name / "run")]
        assert cli.main(arguments) == 0
        found.append(load_file(tmp_path / name / "run" / "model" / "model.safetensors"))
    whole, resumed = found
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    tables = [(tmp_path / name / "run" / "curve.csv").read_text() for name in ("whole", "interrupted")]
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    "kind", [partial(ManyRows, rows=2), partial(ProtectingModule, texts=["earlier"])], ids=["many rows", "earlier"]
)
def test_further_protected_rows_need_a_retain_loss_beside_them(kind: Any) -> None:
    with pytest.raises(ValueError, match="retain_loss: expected a loss beside further protected rows, found None"):
        kind(Bigram(), retain_loss=None, surgery=gs.GRU)


def test_a_guard_without_anything_to_protect_is_refused() -> None:
    base = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(ValueError, match="guard: expected None with one objective, which leaves nothing to protect"):
        gs.GradientSurgery(base, objectives=("forget",), guard="update")


@pytest.mark.parametrize(("guard", "objectives"), [("none", ["forget"]), ("measure", ["forget", "retain"])])
def test_a_row_of_a_grid_takes_one_backward_pass_where_nothing_reads_another(guard: Any, objectives: list[str]) -> None:
    method = Method("alone", rule="none", guard=guard)
    run = Run(Grid((method,), Targets((0.5,))), method, 0, 0)
    model, _ = model_and_tokenizer()
    assert list(build_module(model, run).objectives) == objectives
    assert method.backward_passes == 1


def test_its_memory_has_no_second_row() -> None:
    model, _ = model_and_tokenizer()
    given = {"model": "m", "tofu": "forget10"}

    def rows(rule: str) -> int:
        parts = held_by_unlearning(model, UnlearnOptions.of(**given, rule=rule, recipe="paper").resolved())
        (row,) = (part.bytes for part in parts if part.what.startswith("surgery"))
        assert row is not None
        return row

    assert rows("none") < rows("gru")
