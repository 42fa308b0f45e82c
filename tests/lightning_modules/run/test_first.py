"""`unlearn --finetune-first`: the target and the reference are what `finetune` makes, once for all runs."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_modules import cli, progress
from lightning_modules.data.fictional_authors import fictional_authors
from lightning_modules.folder import locked
from lightning_modules.report.findings import little_forgotten, little_to_forget
from lightning_modules.run import teaching
from lightning_modules.run.first import Lesson, lesson, taught_folder
from lightning_modules.run.loading import make_data, read_splits
from lightning_modules.run.options import UnlearnOptions
from lightning_modules.training.finetuning import FinetuningModule
from lightning_modules.training.scratch import ScratchSettings, scratch_model

ROWS = fictional_authors(1)[:9]
FORGET, RETAIN = ROWS[:4], ROWS[4:]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = ScratchSettings(hidden_size=16, num_layers=1, num_heads=2, epochs=1)
    model, tokenizer = scratch_model(ROWS, small, cache_dir=tmp_path / "scratch")
    model.config.attention_dropout = 0.3
    model.save_pretrained("start")
    tokenizer.save_pretrained("start")
    for name, rows in (("forget", FORGET), ("retain", RETAIN), ("both", [*RETAIN, *FORGET])):
        Path(f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


HOW = "{epochs: 2, lr: 1e-2, batch_size: 2}"
UNLEARN = [
    "unlearn",
    "--model",
    "start",
    "--forget",
    "forget.json",
    "--retain",
    "retain.json",
    "--finetune-first",
    "true",
]
UNLEARN += ["--finetune", HOW, "--epochs", "1", "--accumulate", "1", "--max-new-tokens", "2", "--lr", "1e-3"]


def options(**changed: Any) -> UnlearnOptions:
    given: dict[str, Any] = {"model": "start", "forget": "forget.json", "retain": "retain.json"}
    how = {"epochs": 2, "lr": 1e-2, "batch_size": 2}
    return UnlearnOptions.of(**given | {"finetune_first": True, "finetune": how} | changed)


def test_target_and_reference_are_those_of_finetune_bit_for_bit_and_are_taught_once(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*UNLEARN, "--output", "run"]) == 0
    said = capsys.readouterr().err
    assert "Teaching the target forget and retain: 9 examples, 2 epochs" in said
    assert "Teaching the reference retain: 5 examples, 2 epochs" in said
    assert "There is little to forget: the mean probability of the forget answers is 0.00" in said
    assert "There is little to forget" in Path("run/report.md").read_text()
    splits = read_splits(options())
    for part, data in (("target", "both"), ("reference", "retain")):
        steps = ["--epochs", "2", "--lr", "1e-2", "--batch-size", "2", "--devices", "1", "--output", part]
        assert cli.main(["finetune", "--model", "start", "--data", f"{data}.json", *steps]) == 0
        kept = Path(str(taught_folder(options(), splits, part)))  # pyright: ignore[reportArgumentType]
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (kept, Path(part) / "model"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["reference"]["forget"]["n"] == 4
    monkeypatch.setattr(teaching, "_teach", lambda *_, **__: pytest.fail("taught again"))
    adapter = ["--lora-rank", "2", "--save", "adapter", "--output", "again"]
    assert cli.main([*UNLEARN, *adapter]) == 0
    base = load_file("again/base/model.safetensors")
    target = load_file("target/model/model.safetensors")
    assert all(torch.equal(base[name], target[name]) for name in target)
    again = json.loads(Path("again/metrics.json").read_text())
    assert (again["before"], again["reference"]) == (metrics["before"], metrics["reference"])


def test_layers_are_recomputed_and_compiled_while_it_is_taught_too_with_the_same_weights(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teach, recomputed, kept = teaching.taught_alone, list[bool](), list[dict[str, torch.Tensor]]()
    compiled: list[str] = []

    def as_it_is(model: Any, **_: Any) -> Any:
        compiled.append(type(model).__name__)
        return model

    def watched(model: Any, *given: Any, **settings: Any) -> None:
        recomputed.append(any(getattr(module, "gradient_checkpointing", False) for module in model.modules()))
        teach(model, *given, **settings)

    monkeypatch.setattr(teaching, "taught_alone", watched)
    monkeypatch.setattr(torch, "compile", as_it_is)
    for recompute in (False, True):
        monkeypatch.setenv("XDG_CACHE_HOME", str(world / f"cache of {recompute}"))
        given = options(gradient_checkpointing=recompute, compile=recompute, reference="start")
        splits = read_splits(given)
        teaching.teach_first(given, splits)
        kept.append(load_file(Path(str(taught_folder(given, splits, "target"))) / "model.safetensors"))
    assert recomputed == [False, True]
    assert compiled == ["LlamaModel"]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


def test_whatever_decides_a_taught_model_makes_another_one(world: Path) -> None:
    splits = read_splits(options())

    def folder(changed: UnlearnOptions, rows: Any = splits, part: Any = "target") -> Path:
        found = lesson(changed, rows, part)
        assert found is not None
        return found.folder

    assert folder(options()) == folder(
        options(lr=1.0, rule="sum", finetune={"epochs": 2.0, "lr": 0.01, "batch_size": 2})
    )
    other = [
        folder(options(), part="reference"),
        folder(options(), {**splits, "forget": splits["forget"][:-1]}),
        folder(options(seed=1)),
        folder(options(precision="bf16-true")),
        folder(options(max_length=40)),
        *(folder(options(finetune={"epochs": 2, "lr": 0.01, "batch_size": 2} | one)) for one in (
            {"epochs": 3}, {"lr": 0.1}, {"batch_size": 3}, {"accumulate": 2}, {"weight_decay": 0.0}, {"max_norm": 2.0}
        )),
    ]  # fmt: skip
    found = lesson(options(), splits, "target")
    assert isinstance(found, Lesson)
    other += [replace(found, identity="another").folder]
    assert len({folder(options()), *other}) == len(other) + 1
    assert lesson(options(reference="start"), splits, "reference") is None
    assert lesson(UnlearnOptions.of(model="start"), splits, "target") is None


def test_who_dies_while_teaching_goes_on_from_there_and_says_where_it_stands(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    given, splits = options(), read_splits(options())
    seen: list[int] = []

    def dies(self: FinetuningModule, _: Any) -> None:
        seen.append(self.trainer.global_step)
        if seen == [*range(8)]:
            raise KeyError("the power")

    monkeypatch.setattr(FinetuningModule, "on_before_optimizer_step", dies)
    with pytest.raises(KeyError):
        teaching.teach_first(given, splits)
    teaching.teach_first(given, splits)
    assert seen == [*range(8), *range(5, 10), *range(6)]  # nine examples make five steps an epoch, and five three
    said = capsys.readouterr().err
    assert "Teaching the target, optimizer steps: 10 of 10" in said
    assert "Teaching the reference, optimizer steps: 6 of 6" in said
    kept = Path(str(taught_folder(given, splits, "target")))
    found = load_file(kept / "model.safetensors")
    assert {path.name for path in kept.parent.iterdir()} == {
        kept.name,
        Path(str(taught_folder(given, splits, "reference"))).name,
    }
    monkeypatch.setenv("XDG_CACHE_HOME", str(world / "elsewhere"))
    teaching.teach_first(given, splits)
    whole = load_file(Path(str(taught_folder(given, splits, "target"))) / "model.safetensors")
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_a_model_that_another_process_teaches_is_waited_for(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teaching, "_WAIT", 0.01)
    monkeypatch.setattr(teaching, "_teach", lambda *_: pytest.fail("taught twice"))
    given, splits = options(reference="start"), read_splits(options())
    found = lesson(given, splits, "target")
    assert found is not None
    work = found.folder.with_name(f"{found.folder.name}.training")
    work.mkdir(parents=True)
    thread = threading.Thread(target=teaching.teach_first, args=(given, splits))
    with locked(work):
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        found.folder.mkdir()
        (found.folder / "config.json").write_text("{}")
    thread.join(30)
    assert not thread.is_alive()


def test_a_process_that_is_not_the_first_does_not_teach(world: Path) -> None:
    with pytest.raises(
        ValueError, match=r"--finetune-first: expected the target in .*, found none: one process teaches it"
    ):
        taught_folder(options(), read_splits(options()), "target")


def test_the_first_of_several_processes_refuses_as_the_others_do(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun starts all at once: the others need the model now, and would end while the first one teaches it."""
    given = options()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process teaches it before others are started"):
        teaching.teach_first(given, read_splits(given))


def test_authors_of_tofu_are_chosen_for_any_model_that_is_taught_first(world: Path) -> None:
    rows = [{"question": f"Q{number}", "answer": f"A{number}"} for number in range(200)]
    for name, part in (("forget10", rows[-60:]), ("retain90", rows[:-60])):
        Path(f"{name}.json").write_text("\n".join(map(json.dumps, part)))
    Path("world_facts_perturbed.json").write_text(json.dumps(rows[0]))
    tofu: dict[str, Any] = {"model": "start", "tofu": "forget10", "tofu_dir": "."}
    few = UnlearnOptions.of(**tofu, finetune_first=True, authors=5, forget_authors=2)
    few.check()
    sizes = {name: len(found) for name, found in make_data(few, None).read().items()}
    assert sizes == {"forget": 40, "retain": 60, "world_facts": 1}
    sizes = {name: len(found) for name, found in make_data(UnlearnOptions.of(**tofu), None).read().items()}
    assert sizes == {"forget": 60, "retain": 140, "world_facts": 1}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": "scratch"}, "--finetune-first: expected --model, which is to be taught first"),
        ({"finetune_first": False}, "--finetune: expected --finetune-first with it"),
        ({"finetune": {"rate": 1}}, "--finetune: expected epochs, batch_size, accumulate, lr, weight_decay, max_norm, found rate"),
        ({"finetune": {"epochs": 2.5}}, "--finetune, epochs: expected a whole number >= 1, found 2.5"),
        ({"finetune": {"lr": 0.0}}, "--finetune, lr: expected a number > 0, found 0.0"),
        ({"finetune": {"weight_decay": -1.0}}, "--finetune, weight_decay: expected a number >= 0, found -1.0"),
        ({"finetune": {"lr": float("nan")}}, "--finetune, lr: expected a finite number, found nan"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        options(**changed).check()
    assert said in str(caught.value)


def test_an_adapter_is_refused_before_any_work(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "start", "peft_type": "LORA"})
    )
    assert cli.main([*UNLEARN, "--model", "adapter", "--output", "run"]) == 1
    assert "--finetune-first: expected a whole model, by whose files" in capsys.readouterr().err
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("probability", "said"), [(0.49, True), (0.5, False), (0.51, False), (float("nan"), False), (None, False)]
)
def test_little_to_forget_is_less_than_a_half(probability: float | None, said: bool) -> None:
    found = little_to_forget({"forget": {"probability": probability}})
    assert (found is not None) == said
    if found is not None:
        assert found.startswith("There is little to forget: the mean probability of the forget answers is 0.490 before")
    assert little_to_forget(None) is None


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [(0.9, 0.46, True), (0.9, 0.44, False), (0.4, 0.39, False), (None, 0.9, False), (0.9, float("nan"), False)],
)
def test_little_was_forgotten_is_more_than_a_half_of_what_was_known(
    before: float | None, after: float, said: bool
) -> None:
    scores = {"before": {"forget": {"probability": before}}, "after": {"forget": {"probability": after}}}
    found = little_forgotten(scores)
    assert (found is not None) == said
    if found is not None:
        assert found.startswith(
            "Little was forgotten: the mean probability of the forget answers is 0.460, 51 % of what"
        )
    assert little_forgotten(scores | {"before": None}) is None
