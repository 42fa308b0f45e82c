"""`--radius auto`: the lowest point on the way, found without leaving a trace, and written down once."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import gradsurgery as gs
from lightning_modules import cli
from lightning_modules.data.tokenization import Encoded, collate
from lightning_modules.run import methods, radius
from lightning_modules.run.options import UnlearnOptions
from lightning_modules.run.radius import search_settings
from lightning_modules.training.adapter_settings import AdapterSettings
from lightning_modules.training.adapters import adapt
from lightning_modules.training.auto_radius import GROWTH, RadiusSearch, _search, measured_radius
from tests.lightning_modules.run.small_runs import small_run
from tests.lightning_modules.training.test_callbacks import examples
from tests.lightning_modules.training.test_probes import llama


def knowing(steps: int = 80) -> tuple[Any, list[Encoded]]:
    """A small model that has learned its examples, so that the loss rises again soon on the way down."""
    model, rows = llama(), examples(8, 1)
    optimizer, batch = torch.optim.AdamW(model.parameters(), lr=0.03), collate(rows, 0)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), rows


def summed(model: Any, rows: list[Encoded]) -> torch.Tensor:
    """The mean cross-entropy of all answer tokens, one example at a time."""
    losses = []
    for tokens, labels in rows:
        logits = model(input_ids=torch.tensor([tokens])).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="none"))
    kept = torch.cat([torch.tensor(labels[1:]) != -100 for _, labels in rows])
    return torch.cat(losses)[kept].mean()


def at(model: Any, rows: list[Encoded], rho: float, scale: Any) -> float:
    """The loss where the perturbation of the optimizer goes with this radius."""
    moved = copy.deepcopy(model)
    optimizer = gs.GradientSurgery(torch.optim.SGD(moved.parameters(), lr=0.0))
    place = optimizer.perturbed(radius=rho, scale=scale)
    with place.direction():
        summed(moved, rows).backward()
    with optimizer.objective("forget", at=place):
        loss = summed(moved, rows)
        loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize("scale", ["global", "tensor"])
def test_the_loss_where_the_perturbation_goes_is_lowest_there(scale: Any) -> None:
    model, rows = knowing()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        found = measured_radius(model, rows, pad_token_id=0, settings=RadiusSearch(scale=scale))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    start = found["start"]
    around = {factor: at(model, rows, factor * start, scale) for factor in (0.6, 1.0, 1.6)}
    assert around[1.0] == min(around.values())
    assert around[1.0] < float(summed(model, rows))
    assert found["end"] == pytest.approx(GROWTH * start, rel=0.06)
    assert f"{start:.2g}" == f"{start:g}"


def test_every_batch_has_its_own_and_the_median_counts() -> None:
    model, rows = knowing()
    settings = [RadiusSearch(batch_size=2, batches=1), RadiusSearch(batch_size=2)]
    alone = [
        measured_radius(model, rows[number::4], pad_token_id=0, settings=settings[0])["start"] for number in range(4)
    ]
    together = measured_radius(model, rows, pad_token_id=0, settings=settings[1])["start"]
    low, high = sorted(alone)[1:3]
    assert together == pytest.approx((low + high) / 2, rel=0.06)


def test_with_adapters_it_is_measured_in_their_space() -> None:
    model, rows = knowing(20)
    adapted = adapt(model, AdapterSettings(rank=2))
    before = copy.deepcopy(adapted.state_dict())
    found = measured_radius(adapted, rows, pad_token_id=0)
    assert found["start"] > 0.0
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())


def test_what_cannot_be_measured_is_refused() -> None:
    model, rows = knowing(1)
    with pytest.raises(ValueError, match="radius auto: expected forget examples"):
        measured_radius(model, [], pad_token_id=0)
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="radius auto: expected forget answers with a finite loss"):
        measured_radius(broken, rows, pad_token_id=0)
    with pytest.raises(ValueError, match="radius auto: expected a model that trains something"):
        measured_radius(model.requires_grad_(False), rows, pad_token_id=0)


def test_a_run_writes_it_down_and_does_not_search_again_when_it_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = small_run(tmp_path, "--radius", "auto", "--epochs", "1")
    folder, fit = tmp_path / "run", methods.fit

    def interrupted(*given: Any) -> float:
        fit(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(methods, "fit", interrupted)
        assert cli.main(arguments) == 130
    found = yaml.safe_load((folder / "config.yaml").read_text())["radius"]
    assert set(found) == {"start", "end"}
    assert json.loads((folder / "training.json").read_text())["radius"] == found
    monkeypatch.setattr(radius, "measured_radius", lambda *_, **__: pytest.fail("measured again"))
    assert cli.main([*arguments, "--resume"]) == 0
    assert yaml.safe_load((folder / "config.yaml").read_text())["radius"] == found


def test_auto_is_not_taken_for_a_radius_that_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = small_run(tmp_path, "--epochs", "1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("radius: {start: 0.1}\n")
    assert cli.main([*arguments, "--radius", "auto", "--resume"]) == 1
    assert "--radius auto (there it is {'start': 0.1})" in capsys.readouterr().err


def test_the_search_ends_where_the_loss_stops_to_fall() -> None:
    tried: list[float] = []

    def at(radius: float) -> float:
        tried.append(radius)
        return (radius - 2.0) ** 2 if radius < 4.5 else -1.0  # it falls again, far beyond

    assert _search(at, 4.0, 1.0) == pytest.approx(2.0)
    assert tried == pytest.approx([1.0, 2**0.5, 2.0, 2 * 2**0.5])


def test_a_batch_has_examples_from_everywhere() -> None:
    model, rows = knowing()
    both = measured_radius(model, rows[:2], pad_token_id=0, settings=RadiusSearch(batches=1, batch_size=2))
    twice = [rows[0], rows[0], rows[1], rows[1]]
    assert measured_radius(model, twice, pad_token_id=0, settings=RadiusSearch(batches=2, batch_size=2)) == both


def test_read_in_parts_a_batch_has_the_radius_of_the_whole() -> None:
    """As processes measure it, each with the memory of its own batch; a part may be empty."""
    model, rows = knowing()
    whole = RadiusSearch(batches=1, batch_size=3)
    found = measured_radius(model, rows[:3], pad_token_id=0, settings=whole)
    for parts in (2, 4):
        assert measured_radius(model, rows[:3], pad_token_id=0, settings=replace(whole, parts=parts)) == found


def test_two_processes_measure_on_the_batch_that_one_would_have() -> None:
    one = UnlearnOptions.of(radius="auto", batch_size=4, devices="1")
    two = UnlearnOptions.of(radius="auto", batch_size=2, devices="2")
    assert search_settings(two) == replace(search_settings(one), parts=2) == RadiusSearch(batch_size=4, parts=2)
