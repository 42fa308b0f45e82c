"""`gradsurgery finetune`: what it leaves, that a resumed run is the undisturbed one, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_modules import cli
from lightning_modules.data.fictional_authors import fictional_authors
from lightning_modules.data.tokenization import encode, padding_id
from lightning_modules.evaluation.likelihood import answer_nll
from lightning_modules.folder import CHECKPOINTS
from lightning_modules.run import assembly, finetune
from lightning_modules.run.finetune import read_taught
from lightning_modules.run.loading import read_splits
from lightning_modules.run.options import FinetuneOptions, TaughtOptions, UnlearnOptions
from lightning_modules.training.finetuning import FinetuningModule
from lightning_modules.training.scratch import ScratchSettings, scratch_model
from tests.tolerances import STEPPED_FLOAT32, close

TOFU = Path(__file__).parents[4] / "shared" / "tofu"
ROWS = fictional_authors(1)[:11]
STEPS = ["--epochs", "3", "--batch-size", "1", "--accumulate", "2", "--lr", "1e-2", "--precision", "32-true"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with dropout that knows nothing, and what it is taught."""
    root = tmp_path_factory.mktemp("school")
    small = ScratchSettings(hidden_size=32, num_layers=1, num_heads=2, epochs=1)
    model, tokenizer = scratch_model(ROWS, small, cache_dir=root / "scratch")
    model.config.attention_dropout = 0.3  # so that every batch draws random numbers
    model.save_pretrained(root / "start")
    tokenizer.save_pretrained(root / "start")
    (root / "data.json").write_text(json.dumps(ROWS))
    return root


def command(world: Path, output: Path, *further: str) -> list[str]:
    start, data = str(world / "start"), str(world / "data.json")
    return ["finetune", "--model", start, "--data", data, "--output", str(output), "--devices", "1", *further]


def probability(folder: Path) -> float:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = [encode(tokenizer, str(row["question"]), str(row["answer"])) for row in ROWS]
    nll = answer_nll(AutoModelForCausalLM.from_pretrained(folder).eval(), encoded, pad_token_id=padding_id(tokenizer))
    return float(torch.exp(-nll).mean())


def test_it_compiles_what_it_trains_if_it_is_told_to(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    def as_it_is(model: torch.nn.Module, **_: Any) -> torch.nn.Module:
        compiled.append(type(model).__name__)
        return model

    monkeypatch.setattr(torch, "compile", as_it_is)
    monkeypatch.setattr(assembly, "check_compiler", lambda _: None)  # nothing is compiled here
    for number, further in enumerate(([], ["--compile"])):
        assert cli.main(command(world, tmp_path / str(number), "--epochs", "1", *further)) == 0
        assert compiled == ["LlamaModel"] * number


def test_what_is_taught_is_memorised_measured_and_taken_by_unlearn(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.main(command(world, run, "--epochs", "50", "--batch-size", "2", "--lr", "8e-3")) == 0
    found = json.loads((run / "metrics.json").read_text())
    close(torch.tensor(found["taught"]["before"]), torch.tensor(probability(world / "start")), STEPPED_FLOAT32)
    close(torch.tensor(found["taught"]["after"]), torch.tensor(probability(run / "model")), STEPPED_FLOAT32)
    assert found["taught"]["before"] < 0.1 < 0.5 < found["taught"]["after"]
    assert found["taught"]["examples"] == found["taught"]["scored"] == 11
    said = capsys.readouterr()
    assert "not memorised" not in said.out
    assert "The first example, its answer between [[ and ]]: " in said.err
    assert {path.name for path in run.iterdir()} == {"config.yaml", "curve.csv", "metrics.json", "model"}
    for name, rows in (("forget", ROWS[:5]), ("retain", ROWS[5:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    data = [text for name in ("forget", "retain") for text in (f"--{name}", str(tmp_path / f"{name}.json"))]
    few = ["--epochs", "1", "--accumulate", "1", "--max-new-tokens", "2", "--lr", "1e-6"]
    assert cli.main(["unlearn", "--model", str(run / "model"), *data, *few, "--output", str(tmp_path / "un")]) == 0
    before = json.loads((tmp_path / "un" / "metrics.json").read_text())["before"]["forget"]["probability"]
    assert before > 0.5
    assert "There is little to forget" not in capsys.readouterr().err


def test_a_lesson_that_was_not_learned_is_said(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(world, tmp_path / "run", "--epochs", "1", "--lr", "1e-6")) == 0
    assert "the answers are not memorised: expected a mean probability of at least 0.5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("further", "step", "every"),
    [([], 10, 1), (["--lora-rank", "2", "--lora-dropout", "0.2", "--save", "adapter"], 11, 4), ([], 2, 3)],
    ids=["inside an epoch", "adapters, some steps ago", "before any checkpoint"],
)
def test_a_run_that_dies_and_is_resumed_is_the_undisturbed_one_bit_for_bit(
    further: list[str], step: int, every: int, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*STEPS, *further, "--checkpoint-every", str(every)]
    assert cli.main(command(world, tmp_path / "whole", *options)) == 0

    def dies(self: FinetuningModule, _: Any) -> None:
        if self.trainer.global_step == step:
            raise KeyError("the power")

    with monkeypatch.context() as patch:
        patch.setattr(FinetuningModule, "on_before_optimizer_step", dies)
        with pytest.raises(KeyError):
            cli.main(command(world, tmp_path / "cut", *options))
    seen: list[int] = []
    monkeypatch.setattr(
        FinetuningModule, "on_before_optimizer_step", lambda self, _: seen.append(self.trainer.global_step)
    )
    assert cli.main(["finetune", "--resume", "--output", str(tmp_path / "cut")]) == 0
    assert seen == list(range(step // every * every if step > every else 0, 18))
    for path in (tmp_path / "whole" / "model").glob("*.safetensors"):
        ours, theirs = load_file(tmp_path / "cut" / "model" / path.name), load_file(path)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text())["taught"] for name in ("whole", "cut")]
    assert metrics[0] == metrics[1]
    curve = (tmp_path / "whole" / "curve.csv").read_bytes()
    assert (tmp_path / "cut" / "curve.csv").read_bytes() == curve
    assert curve.count(b"\n") == 1 + 18


def test_no_other_process_waits_for_a_first_one_that_has_nothing_left_to_train(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchrun starts them, where the run was killed when it had its scores."""
    assert cli.main(command(world, tmp_path, "--epochs", "1", "--precision", "32-true")) == 0
    (tmp_path / CHECKPOINTS).mkdir()
    monkeypatch.setattr(finetune, "_taught", lambda *_: pytest.fail("it trains"))
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["finetune", "--resume", "--output", str(tmp_path)]) == 0
        assert (tmp_path / CHECKPOINTS).exists() == (rank == "1")
    for rank, status in (("1", 0), ("0", 1)):  # one that comes late finds a finished run, which the first refuses
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["finetune", "--resume", "--output", str(tmp_path)]) == status


def test_a_finished_run_is_not_resumed_and_options_of_another_are_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.main(command(world, run, "--epochs", "1")) == 0
    assert cli.main(command(world, run, "--epochs", "1")) == 1
    assert "expected a new or empty folder" in capsys.readouterr().err
    assert cli.main(["finetune", "--resume", "--output", str(run)]) == 1
    assert "expected an interrupted run, found a finished one" in capsys.readouterr().err
    (run / "metrics.json").unlink()
    assert cli.main(["finetune", "--resume", "--lr", "1", "--output", str(run)]) == 1
    assert "--lr 1.0 (there it is 0.0002)" in capsys.readouterr().err
    assert cli.main(["unlearn", "--resume", "--output", str(run)]) == 1
    assert "expected the options of `gradsurgery unlearn`, found 'data', which is none" in capsys.readouterr().err


def test_the_merged_adapter_is_the_adapter_that_is_saved_alone(world: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    for save in ("merged", "adapter"):
        more = ["--lora-rank", "2", "--save", save, "--epochs", "1", "--lr", "1e-2"]
        assert cli.main(command(world, tmp_path / save, *more)) == 0
    start: Any = AutoModelForCausalLM.from_pretrained(world / "start")
    adapted: Any = PeftModel.from_pretrained(start, str(tmp_path / "adapter" / "model"))
    whole = adapted.merge_and_unload().state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "model").state_dict()
    first = AutoModelForCausalLM.from_pretrained(world / "start").state_dict()
    assert any(not torch.equal(merged[name], first[name]) for name in first)
    for name, tensor in merged.items():
        close(whole[name], tensor, STEPPED_FLOAT32)


def test_bfloat16_trains_and_leaves_float32(world: Path, tmp_path: Path) -> None:
    assert cli.main(command(world, tmp_path / "run", "--precision", "bf16-mixed", "--epochs", "1", "--lr", "1e-2")) == 0
    found = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def test_the_first_authors_of_a_file_of_tofu(tmp_path: Path) -> None:
    rows = [{"question": f"Q{number}", "answer": f"A{number}"} for number in range(60)]
    (tmp_path / "full.json").write_text("\n".join(map(json.dumps, rows)))
    taught = TaughtOptions(tofu="full", tofu_dir=str(tmp_path), authors=2)
    assert [row["question"] for row in read_taught(taught)] == [f"Q{number}" for number in range(40)]
    with pytest.raises(ValueError, match="--authors: expected at most 3, which full has, found 4"):
        read_taught(TaughtOptions(tofu="full", tofu_dir=str(tmp_path), authors=4))


@pytest.mark.skipif(not TOFU.is_dir(), reason="needs TOFU's files in ../shared/tofu")
@pytest.mark.parametrize("split", ["forget01", "forget05", "forget10"])
def test_what_was_taught_with_authors_to_forget_is_what_unlearn_has(split: str) -> None:
    few = {"tofu_dir": str(TOFU), "authors": 5, "forget_authors": 2}
    taught = read_taught(TaughtOptions(tofu="full", **few))
    splits = read_splits(UnlearnOptions.of(model="m", tofu=split, **few))
    asked = [(row["question"], row["answer"]) for row in taught]
    assert asked == [(row["question"], row["answer"]) for name in ("retain", "forget") for row in splits[name]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "d.json"], "expected --model, a folder or hub name"),
        (["--model", "m"], "expected either --data or --tofu, found neither"),
        (["--model", "m", "--data", "d.json", "--tofu", "full"], "expected either --data or --tofu, found both"),
        (["--model", "m", "--data", "d.json", "--authors", "2"], "expected --tofu with --authors"),
        (["--model", "m", "--tofu", "full", "--forget-authors", "2"], "1 <= --forget-authors < --authors, found no --authors"),
        (["--model", "m", "--tofu", "retain90", "--authors", "3", "--forget-authors", "2"], "--forget-authors: expected --tofu full"),
        (["--model", "m", "--tofu", "full", "--authors", "2", "--forget-authors", "2"], "--forget-authors < --authors, found 2 of 2"),
        (["--model", "m", "--data", "d.json", "--max-norm", "0"], "expected --max-norm > 0"),
        (["--model", "m", "--data", "d.json", "--lr", "0"], "expected --lr > 0"),
        (["--model", "m", "--data", "d.json", "--epochs", "0"], "expected --epochs >= 1"),
        (["--model", "m", "--data", "d.json", "--strategy", "fsdp2"], "--strategy fsdp2: expected a model that one device"),
        (["--model", "m", "--data", "d.json", "--lora-dropout", "0.1"], "expected --lora-rank with --lora-dropout"),
        (["--model", "m", "--data", "d.json", "--save", "adapter"], "expected --lora-rank with --save adapter"),
        (["--model", "m", "--data", "none.json"], "none.json"),
        (["--model", "none", "--data", "{data}"], "'none' is neither a folder nor a model on the hub"),
        (["--model", "{start}", "--data", "{data}", "--lora-rank", "99"], "at most the model's width, 32, found 99"),
        (["--model", "{start}", "--data", "{data}", "--max-length", "4"], "taught, example 1: expected a question that leaves"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_leaves_nothing(
    arguments: list[str],
    said: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    named = [text.format(start=world / "start", data=world / "data.json") for text in arguments]
    assert cli.main(["finetune", *named]) == 1
    found = capsys.readouterr().err
    assert said in found
    assert "Traceback" not in found
    assert list(tmp_path.iterdir()) == []


def test_gradients_that_are_not_finite_stop_the_run_in_one_sentence(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step: Callable[..., torch.Tensor] = FinetuningModule.training_step
    monkeypatch.setattr(FinetuningModule, "training_step", lambda self, batch: step(self, batch) * float("nan"))
    assert cli.main(command(world, tmp_path / "run")) == 1
    assert "expected finite gradients, found NaN or infinity at optimizer step 0" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model").exists()


def test_every_option_of_training_means_what_it_means_for_unlearn() -> None:
    options = FinetuneOptions.of(lora_rank=3, devices="2", lr=0.5)
    assert (
        options.training.as_unlearning()
        == UnlearnOptions.of(lora_rank=3, devices="2", lr=0.5, epochs=5, accumulate=1).training
    )
