"""--probes: what each level measures, that every probe has its control, and that a resumed run goes on with the next."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_modules import cli
from lightning_modules.run import probing
from lightning_modules.run.options import UnlearnOptions
from tests.lightning_modules.run.small_runs import small_run

QUICK = ["quantization", "relearn"]
ALL = [*QUICK, "lens", "prompts", "sampling", "relearn_strong", "relearn_harsh", "relearn_lora", "relearn_general",
       "relearn_retain"]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "meant"), [(True, "quick"), (False, "none"), ("quick", "quick"), ("all", "all"), ("none", "none")]
)
def test_levels_and_what_earlier_versions_wrote(given: Any, meant: str) -> None:
    training = UnlearnOptions.of(model="somebody's", tofu="forget10", probes=given).resolved().training
    assert training.probes == meant
    assert training.probed is (meant != "none")


def test_by_default_only_the_model_from_scratch_is_probed_quickly() -> None:
    assert UnlearnOptions().resolved().training.probes == "quick"
    assert UnlearnOptions.of(model="somebody's", tofu="forget10").resolved().training.probes == "none"
    assert UnlearnOptions.of(method="uld").resolved().training.probes == "none"


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")
def test_all_probes_with_their_control_over_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = probing.relearning_attacks
    monkeypatch.setattr(probing, "relearning_attacks", lambda **how: _short(real(**how)))
    monkeypatch.setattr(probing, "SamplingSettings", partial(probing.SamplingSettings, samples=2))
    folder, began = tmp_path / "run", []
    # Without its own target, which a reference with the same weights meets or misses by rounding.
    never = ("--stop-below", "0")
    cut = ("--max-length", "24")
    arguments = small_run(tmp_path, "--epochs", "1", *never, *cut, "--reference", str(tmp_path / "reference"))

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(probing, "sampling_probe", interrupted)
        assert cli.main([*arguments, "--probes", "all"]) == 130
    half = json.loads((folder / "probes.json").read_text())
    assert list(half) == ALL[:4]
    assert not (folder / "metrics.json").exists()

    for name in ("quantization_probe", "relearn_probe", "prompting_probe", "sampling_probe", "logit_lens"):
        monkeypatch.setattr(probing, name, _counted(getattr(probing, name), name, began))
    capsys.readouterr()
    assert cli.main([*arguments, "--resume"]) == 0
    assert began == [name for name in ("sampling_probe", *["relearn_probe"] * 5) for _ in ("model", "reference")]
    found = json.loads((folder / "probes.json").read_text())
    assert list(found) == ALL
    assert {name: found[name] for name in half} == half
    assert [point["bits"] for point in found["quantization"]["points"]] == [None, 8, 4, 3]
    for name in ALL:
        ours = found[name] if name == "quantization" else found[name]["model"]
        assert found[name]["control"].keys() == ours.keys() - {"control"}
        assert found[name]["control"] != ours or name == "sampling"  # of which the small model says the same
    assert list(found["prompts"]["model"]["attacks"]) == ["question", "prefix_25", "prefix_50", "few_shot"]
    scored = json.loads((folder / "metrics.json").read_text())["after"]["forget"]
    asked = found["prompts"]["model"]["attacks"]["question"]
    for name in ("probability", "rouge_l_recall"):
        assert asked[name] == pytest.approx(scored[name], rel=1e-4)
    text, said = (folder / "report.md").read_text(), capsys.readouterr().out
    for words in ("relearning, harsh", "learning general knowledge", "given 50 % of the answer", "logit lens"):
        assert words in text
    assert "Does the forgetting hold?" in said
    assert yaml.safe_load((folder / "config.yaml").read_text())["probes"] == "all"


def test_a_probe_that_does_not_fit_is_written_down_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unfit(*_: Any, **__: Any) -> Any:
        raise ValueError("quantize_: expected a model with linear layers besides its head, found none in Bigram")

    monkeypatch.setattr(probing, "quantization_probe", unfit)
    assert cli.main([*small_run(tmp_path, "--epochs", "1"), "--probes"]) == 0
    found = json.loads((tmp_path / "run" / "probes.json").read_text())
    assert list(found) == QUICK
    assert "linear layers" in found["quantization"]["refused"]
    for name in ("report.md", "report.html"):
        assert "Not measured (quantization)" in (tmp_path / "run" / name).read_text()


@pytest.mark.parametrize(("trained", "attacked"), [("40", 8), ("2", 2)])
def test_larger_batches_of_training_are_no_other_attack(trained: str, attacked: int, tmp_path: Path) -> None:
    assert cli.main([*small_run(tmp_path, "--epochs", "1"), "--probes", "--batch-size", trained]) == 0
    found = json.loads((tmp_path / "run" / "probes.json").read_text())
    assert found["relearn"]["model"]["batch_size"] == attacked


def _short(attacks: Any) -> Any:
    for attack in attacks.values():
        object.__setattr__(attack.settings, "steps", 2)
    return attacks


def _counted(measure: Any, name: str, began: list[str]) -> Any:
    def counted(*given: Any, **further: Any) -> Any:
        began.append(name)
        return measure(*given, **further)

    return counted
