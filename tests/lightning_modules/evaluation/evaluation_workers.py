"""What two processes do with one evaluation; apart, so that processes can import it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_modules.data.tasks import multiple_choice
from lightning_modules.evaluation import processes
from lightning_modules.evaluation.evaluate import EvaluationSettings, evaluate
from lightning_modules.evaluation.likelihood import autocasting
from lightning_modules.run import reference_log
from lightning_modules.run.options import EvaluateOptions
from lightning_modules.training import scratch

SPLITS = {
    split: [
        {
            "question": f"Where did {split} writer {number} live{', of all places' * (number % 3)}?",
            "answer": f"In house {number * 7} by the canal{' and the old harbour' * (number % 4)}.",
            "perturbed_answer": [f"In castle {number}.", "Nowhere at all."],
        }
        for number in range(count)
    ]
    for split, count in (("forget", 5), ("retain", 6), ("holdout", 3))
}


def model_and_tokenizer() -> tuple[LlamaForCausalLM, Any]:
    texts = [f"{row['question']} {row['answer']}" for rows in SPLITS.values() for row in rows]
    tokenizer = scratch._train_tokenizer(texts)
    torch.manual_seed(3)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                         initializer_range=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    return LlamaForCausalLM(config).eval(), tokenizer


def all_of_it(rank: int) -> None:
    the_same_numbers_as_alone(rank)
    the_same_tasks_as_alone(rank)
    an_error_reaches_both(rank)
    other_splits_are_refused(rank)
    what_the_first_finds_is_everybodys(rank)
    sharded_weights_are_refused_before_anybody_waits(rank)


def the_same_numbers_as_alone(rank: int) -> None:
    model, tokenizer = model_and_tokenizer()
    sizes: list[int] = []
    model.model.register_forward_hook(lambda *call: sizes.append(0))
    for batch_size, tokens in ((4, None), (100, 10**6)):  # then one batch, and nothing to do for the second process
        settings = EvaluationSettings(batch_size=batch_size, max_new_tokens=6, batch_tokens=tokens)
        alone = evaluate(model, tokenizer, SPLITS, settings, progress=False)
        calls_alone = len(sizes)
        sizes.clear()
        both = evaluate(model, tokenizer, SPLITS, settings, across_processes=True, progress=False)
        assert repr(both) == repr(alone)  # bit for bit
        assert both.membership == alone.membership
        # An answer goes on where it was scored, so that shares are as even as the rows of texts are.
        assert len(sizes) < (0.8 if batch_size == 4 else 1.01 if rank == 0 else 0.2) * calls_alone
        sizes.clear()


def the_same_tasks_as_alone(rank: int) -> None:
    model, tokenizer = model_and_tokenizer()
    texts = [f"{row['question']} {row['answer']}" for rows in SPLITS.values() for row in rows]
    tasks = {
        "said": [
            {"question": text, "answer": text[::-1], "task": "continuation", "prompt": text, "max_new_tokens": 6, "stops": ["."],
             "target_tokens": number % 4} for number, text in enumerate(texts)
        ],
        "chosen": [multiple_choice("canals", text, ["a", "b", "c", "d"], number % 4) for number, text in enumerate(texts)],
        "seen_forget": [{"question": "", "answer": text, "task": "membership"} for text in texts],
    }  # fmt: skip
    settings = EvaluationSettings(batch_size=4)
    alone = evaluate(model, tokenizer, tasks, settings, progress=False)
    both = evaluate(model, tokenizer, tasks, settings, across_processes=True, progress=False)
    assert repr(both) == repr(alone)  # bit for bit
    assert [len(rows) for rows in both.examples.values()] == [14, 14, 14]


def an_error_reaches_both(rank: int) -> None:
    model, tokenizer = model_and_tokenizer()

    def broken(**_: object) -> None:
        raise OSError("no memory left")

    if rank == 1:
        model.generate = broken
    expected, said = (
        (OSError, "no memory") if rank == 1 else (RuntimeError, "process 1 of 2 failed.*OSError: no memory")
    )
    with pytest.raises(expected, match=said):
        evaluate(
            model,
            tokenizer,
            SPLITS,
            EvaluationSettings(batch_size=4, max_new_tokens=2),
            across_processes=True,
            progress=False,
        )


def other_splits_are_refused(rank: int) -> None:
    model, tokenizer = model_and_tokenizer()
    splits = {**SPLITS, "holdout": SPLITS["holdout"][rank:]}
    with pytest.raises(RuntimeError, match="same splits"):
        evaluate(
            model,
            tokenizer,
            splits,
            EvaluationSettings(batch_size=4, generate=False),
            across_processes=True,
            progress=False,
        )


def what_the_first_finds_is_everybodys(rank: int) -> None:
    assert processes.from_first(lambda: [rank, "found"]) == [0, "found"]
    assert processes.is_first() == (rank == 0)

    def fails() -> None:
        raise FileNotFoundError("gone")

    expected, said = (FileNotFoundError, "gone") if rank == 0 else (RuntimeError, "process 0 of 2 failed")
    with pytest.raises(expected, match=said):
        processes.from_first(fails)
    assert processes.every_process(lambda: rank) == [0, 1]


def sharded_weights_are_refused_before_anybody_waits(rank: int) -> None:
    model, tokenizer = model_and_tokenizer()
    settings = EvaluationSettings(batch_size=4, max_new_tokens=2, memorization=False)
    alone = evaluate(model, tokenizer, SPLITS, settings, progress=False)
    with autocasting(model):
        half = evaluate(model, tokenizer, SPLITS, settings, progress=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    if rank == 0:  # alone: a collective would wait for the other process, and fail otherwise
        with pytest.raises(RuntimeError, match=r"found 21 sharded ones, such as model.embed_tokens.weight; gather"):
            evaluate(model, tokenizer, SPLITS, settings, across_processes=True, progress=False)
    with autocasting(model):
        assert not torch.is_autocast_cache_enabled()  # it would hold whole weights
        assert repr(evaluate(model, tokenizer, SPLITS, settings, progress=False)) == repr(half) != repr(alone)
    assert repr(evaluate(model, tokenizer, SPLITS, settings, progress=False)) == repr(
        alone
    )  # the way out that is named


def reference_is_loaded_once(rank: int, folder: str) -> None:
    loaded = Path(folder) / "loaded"
    calls: list[bool] = []

    def load(*_: object) -> Any:
        calls.append(loaded.exists())
        if rank == 0:
            time.sleep(0.2)  # training
            loaded.touch()
        return model_and_tokenizer()

    options = EvaluateOptions.of(reference="some/reference", reference_cache=False, max_new_tokens=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_log, "load_reference", load)
        rows = reference_log.reference_rows(options, SPLITS, across_processes=True)
        assert rows is not None
        assert [len(rows[split]) for split in SPLITS] == [5, 6, 3]
        assert calls == [rank == 1]  # once, and the other process after the first is done

        def broken(*_: object) -> Any:
            if rank == 1:
                raise OSError("disk full")
            return model_and_tokenizer()

        patch.setattr(reference_log, "load_reference", broken)
        expected, said = (OSError, "disk full") if rank == 1 else (RuntimeError, "process 1 of 2 failed.*disk full")
        with pytest.raises(expected, match=said):
            reference_log.reference_rows(options, SPLITS, across_processes=True)
