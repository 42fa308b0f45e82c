"""A compiled backbone: the steps of one that is not, and a model that keeps nothing of it."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradsurgery as gs
import lightning_modules as lm
from lightning_modules import cli
from lightning_modules.run import assembly
from lightning_modules.training.finetuning import FinetuningModule
from tests.lightning_modules.run.small_runs import small_run
from tests.lightning_modules.training.test_module import Bigram, batches, fit
from tests.lightning_modules.training.test_recomputing import adapters, llama, weights
from tests.tolerances import LINEAR, close

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.supports("The command", "`--compile`, on one device (tested without Inductor)"),
]


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """What is compiled, by AOTAutograd without Inductor, whose C++ takes half a minute."""
    found: list[type] = []
    real = torch.compile

    def quick(model: nn.Module, **options: Any) -> Any:
        found.append(type(model))
        return real(model, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", quick)
    return found


def unlearned(model: nn.Module, *, compiled: bool) -> Tensor:
    torch.manual_seed(3)
    surgery = partial(gs.GRU, guard="update", ema_decay=0.5)
    module = lm.UnlearningModule(model, optimizer=partial(torch.optim.SGD, lr=0.1), surgery=surgery)
    if compiled:
        module.head.compile()
    fit(module, batches(3))
    return weights(model)


LLAMA = pytest.mark.slow  # tracing one takes ten seconds


@pytest.mark.parametrize(
    ("make", "part"),
    [
        pytest.param(llama, "LlamaModel", marks=LLAMA),
        pytest.param(adapters, "LlamaModel", marks=LLAMA),
        (Bigram, "Bigram"),
    ],
)
def test_a_compiled_backbone_takes_the_same_steps(programs: list[type], make: Any, part: str) -> None:
    model = make().train()
    names, start = list(model.state_dict()), weights(model).clone()
    torch.manual_seed(0)
    eager = unlearned(copy.deepcopy(model), compiled=False)
    assert programs == []
    compiled = unlearned(model, compiled=True)
    assert [kind.__name__ for kind in programs] == [part]
    close(compiled, eager, LINEAR[torch.float32])
    assert (eager - start).abs().max() > 1e-3
    assert list(model.state_dict()) == names
    copy.deepcopy(model)


@LLAMA
def test_teaching_too(programs: list[type]) -> None:
    found = []
    for compiled in (False, True):
        module = FinetuningModule(llama().train())
        if compiled:
            module.head.compile()
        module.training_step(batches(1)[0]["retain"]).backward()
        found.append(torch.cat([each.grad.flatten() for each in module.parameters() if each.grad is not None]))
    assert len(programs) == 1
    close(found[1], found[0], LINEAR[torch.float32])


def test_the_command_compiles_what_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def as_it_is(model: nn.Module, **_: Any) -> nn.Module:
        compiled.append(type(model).__name__)
        return model

    monkeypatch.setattr(torch, "compile", as_it_is)
    monkeypatch.setattr(assembly, "check_compiler", lambda _: None)  # nothing is compiled here
    assert cli.main(small_run(tmp_path, "--compile")) == 0
    assert compiled == ["LlamaModel"]
    for refused in (["--method", "uld"], ["--strategy", "fsdp2"], ["--retain-inside", "1"]):
        assert cli.main([*small_run(tmp_path, "--compile", *refused), "--output", str(tmp_path / "other")]) == 1
