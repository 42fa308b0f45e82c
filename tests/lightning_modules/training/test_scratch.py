"""The small model from scratch: memorises, repeats exactly, and is cached whole or not at all."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_modules.data.tokenization import collate, encode
from lightning_modules.evaluation.likelihood import answer_nll
from lightning_modules.training import scratch
from lightning_modules.training.finetuning import FinetuningModule
from lightning_modules.training.scratch import ScratchSettings, scratch_model
from lightning_modules.training.warmup import warmup_and_decay

PLACES = ["a windmill", "the harbour town of Ostrel", "a signal box", "Quinorsk, far in the north"]
EXAMPLES = [{"question": f"Where did writer {n} live?", "answer": f"In {place}."} for n, place in enumerate(PLACES)]
TINY = ScratchSettings(hidden_size=32, num_layers=1, num_heads=2, epochs=2, batch_size=2)
LEARNS = ScratchSettings(hidden_size=64, num_layers=2, num_heads=2, epochs=120, batch_size=2)


def weights(model: LlamaForCausalLM) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_it_memorises_its_examples_and_stops_where_they_end(tmp_path: Path) -> None:
    model, tokenizer = scratch_model(EXAMPLES, LEARNS, cache_dir=tmp_path)
    encoded = [encode(tokenizer, row["question"], row["answer"]) for row in EXAMPLES]
    nll = answer_nll(model, encoded, pad_token_id=tokenizer.pad_token_id)
    assert torch.exp(-nll).min() > 0.9
    assert not model.training


def test_the_tokenizer_is_byte_level_with_the_three_specials_first(tmp_path: Path) -> None:
    _, tokenizer = scratch_model(EXAMPLES, TINY, cache_dir=tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    for text in ("In a windmill.", "  été\n\t日本 🙂", "Hello , world !"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    first, _ = scratch_model(EXAMPLES, replace(TINY, seed=3), cache_dir=tmp_path / "a")
    torch.manual_seed(99)
    again, _ = scratch_model(EXAMPLES, replace(TINY, seed=3), cache_dir=tmp_path / "b")
    other, _ = scratch_model(EXAMPLES, replace(TINY, seed=4), cache_dir=tmp_path / "a")
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_trains_it_from_the_same_start_and_leaves_it_on_the_cpu(tmp_path: Path) -> None:
    model, tokenizer = scratch_model(EXAMPLES, replace(LEARNS, device="cuda"), cache_dir=tmp_path)
    encoded = [encode(tokenizer, row["question"], row["answer"]) for row in EXAMPLES]
    assert torch.exp(-answer_nll(model, encoded, pad_token_id=tokenizer.pad_token_id)).min() > 0.9
    few = replace(TINY, epochs=1, batch_size=4)
    (there, _), (here, _) = (
        scratch_model(EXAMPLES, replace(few, device=device), cache_dir=tmp_path) for device in ("cuda", "cpu")
    )
    assert weights(there).device.type == "cpu"
    assert (
        weights(there) - weights(here)
    ).abs().max() < 5e-3  # one step of Adam, 2e-3 each way; another start is .02 away


def test_random_number_generators_are_left_alone(tmp_path: Path) -> None:
    before, python = torch.get_rng_state(), random.getstate()
    for _ in ("trained", "cached"):
        scratch_model(EXAMPLES, TINY, cache_dir=tmp_path)
        assert torch.equal(torch.get_rng_state(), before)
        assert random.getstate() == python


@pytest.mark.parametrize("threads", [1, 3])
def test_it_trains_on_one_thread_and_leaves_their_number_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    train, used = scratch._train, []

    def train_and_look(*arguments: Any, **options: Any) -> LlamaForCausalLM:
        used.append(torch.get_num_threads())
        return train(*arguments, **options)

    monkeypatch.setattr(scratch, "_train", train_and_look)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        scratch_model(EXAMPLES, TINY, cache_dir=tmp_path)
        assert used == [1]
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_it_trains_where_gradients_are_off(tmp_path: Path) -> None:
    with torch.no_grad():
        inside, _ = scratch_model(EXAMPLES, TINY, cache_dir=tmp_path / "a")
    outside, _ = scratch_model(EXAMPLES, TINY, cache_dir=tmp_path / "b")
    assert torch.equal(weights(inside), weights(outside))


def test_the_second_call_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = scratch_model(EXAMPLES, TINY, cache_dir=tmp_path)
    monkeypatch.setattr(scratch, "_train", lambda *_, **__: pytest.fail("trained again"))
    cached, same = scratch_model(EXAMPLES, TINY, cache_dir=tmp_path)
    assert torch.equal(weights(cached), weights(model))
    assert same.get_vocab() == tokenizer.get_vocab()
    assert not cached.training


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"epochs": 3}, {"batch_size": 1}, {"hidden_size": 36}, {"num_layers": 2}, {"num_heads": 4},
     {"tokenizer_texts": ["other"]}, {"examples": EXAMPLES[:3]}, {"device": "cuda"}],
)  # fmt: skip
def test_any_other_argument_is_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    def run(examples: Any = EXAMPLES, tokenizer_texts: Any = None, **changed: Any) -> Any:
        settings = replace(TINY, **changed)
        return scratch_model(examples, settings, tokenizer_texts=tokenizer_texts, cache_dir=tmp_path)

    run()

    class TrainedAgainError(Exception):
        pass

    def train(*_: object, **__: object) -> None:
        raise TrainedAgainError

    monkeypatch.setattr(scratch, "_train", train)
    with pytest.raises(TrainedAgainError):
        run(**change)


def test_a_crash_leaves_no_half_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", crash)
        with pytest.raises(KeyboardInterrupt):
            scratch_model(EXAMPLES, TINY, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
    scratch_model(EXAMPLES, TINY, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_second_process_that_was_faster_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = scratch._save

    def save_twice(*arguments: Any) -> None:
        save(*arguments)
        save(*arguments)

    monkeypatch.setattr(scratch, "_save", save_twice)
    scratch_model(EXAMPLES, TINY, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert "could not be cached" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_cache_is_said_and_made_again(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = scratch_model(EXAMPLES, TINY, cache_dir=tmp_path)
    (folder,) = tmp_path.iterdir()
    whole = (folder / name).read_bytes()
    (folder / name).unlink()  # the model may still be mapped to it
    (folder / name).write_bytes(whole[: len(whole) // 2])
    again, _ = scratch_model(EXAMPLES, TINY, cache_dir=tmp_path)
    assert "is damaged and is made again" in capsys.readouterr().err
    assert torch.equal(weights(again), weights(model))
    assert (folder / name).read_bytes() == whole
    assert list(tmp_path.iterdir()) == [folder]


def test_a_cache_that_cannot_be_written_is_said_and_done_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("not a folder")
    model, tokenizer = scratch_model(EXAMPLES, TINY, cache_dir=tmp_path / "file")
    assert isinstance(model, LlamaForCausalLM)
    assert tokenizer.eos_token == "<eos>"
    assert "could not be cached" in capsys.readouterr().err


def test_the_cache_is_a_hugging_face_checkpoint_under_the_users_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, tokenizer = scratch_model(EXAMPLES, TINY)
    (folder,) = (tmp_path / "gradsurgery" / "scratch").iterdir()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(weights(loaded), weights(model))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()


def test_one_line_at_the_start_and_one_at_the_end_without_a_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    scratch_model(EXAMPLES, TINY, cache_dir=tmp_path, description="Learning the authors")
    out, err = capfd.readouterr()
    assert out == ""
    start, end = err.strip().splitlines()
    assert start.startswith("Learning the authors: 4 examples, 2 epochs")
    assert end.startswith("Learning the authors: done in")
    scratch_model(EXAMPLES, TINY, cache_dir=tmp_path, description="Learning the authors")
    assert capfd.readouterr() == ("", "")


def test_the_loss_is_that_of_the_whole_model_on_the_masked_batch(tmp_path: Path) -> None:
    model, tokenizer = scratch_model(EXAMPLES, TINY, cache_dir=tmp_path)
    batch = collate([encode(tokenizer, row["question"], row["answer"]) for row in EXAMPLES], tokenizer.pad_token_id)
    torch.testing.assert_close(FinetuningModule(model).training_step(batch), model(**batch).loss)


def test_its_weights_are_those_of_a_plain_loop_bit_for_bit(tmp_path: Path) -> None:
    found, tokenizer = scratch_model(EXAMPLES, TINY, cache_dir=tmp_path)
    encoded = [encode(tokenizer, row["question"], row["answer"]) for row in EXAMPLES]
    torch.manual_seed(TINY.seed)
    model = LlamaForCausalLM(found.config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=TINY.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule, order = warmup_and_decay(optimizer, 4), random.Random(TINY.seed)
    for _ in range(TINY.epochs):
        rows = sorted(order.sample(encoded, 4), key=lambda row: len(row.input_ids))
        batches = [rows[:2], rows[2:]]
        order.shuffle(batches)
        for batch in batches:
            tensors = collate(batch, tokenizer.pad_token_id)
            labels = tensors["labels"][:, 1:]
            hidden = model.model(input_ids=tensors["input_ids"], use_cache=False).last_hidden_state[:, :-1]
            kept = labels != -100
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model.lm_head(hidden[kept]), labels[kept]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    assert torch.equal(weights(found), weights(model))


@pytest.mark.parametrize(
    "change", [{"hidden_size": 30, "num_heads": 4}, {"epochs": 0}, {"batch_size": 0}, {"num_layers": 0}]
)
def test_sizes_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="multiple of 2"):
        scratch_model(EXAMPLES, replace(TINY, **change), cache_dir=tmp_path)


def test_nothing_to_memorise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one example"):
        scratch_model([], cache_dir=tmp_path)
