"""What the real job costs: tokens a second, the share of surgery in a step, and the share of scoring in a run.

Run it: python -m tests.benchmarks.end_to_end [--quick] [--model FOLDER] [--threads 2] [--steps 40] [--questions 24] [--rounds 3]

The command's small Llama, which learns its fictional authors for an epoch, and with `--model` another beside it, such as
SmolLM2's folder. Both learn nothing here that they could forget, so that generation has to say everything
itself: a model that knows its answers is scored in less.

A step is `gs.GRU` over AdamW with a forget and a retain batch, CE-U and cross-entropy at the answers' tokens. The share of
surgery is what a step takes longer than the same two backward passes summed into one gradient and AdamW's step. A step
without padding is the same step with `head.pack()`, as the command takes it of a `--model` on a CPU; the share of scoring
is beside such steps. All is float32 but for the line that says otherwise. Times are
medians of interleaved rounds in one process; only ratios mean something on a machine that does other work too, and its
load is printed with them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import gradsurgery as gs
from lightning_modules.data.examples import asked
from lightning_modules.data.fictional_authors import fictional_authors
from lightning_modules.data.tokenization import collate, encode, padding_id
from lightning_modules.evaluation.evaluate import EvaluationSettings, evaluate
from lightning_modules.training.heads import AnswerHead, answer_values
from lightning_modules.training.scratch import ScratchSettings, scratch_model
from tests.benchmarks.telling import conditions, table

Batches = Mapping[str, Mapping[str, Tensor]]


def loss(head: AnswerHead, batch: Mapping[str, Tensor], kind: Any) -> Tensor:
    values, tokens = answer_values(kind, head.states(batch), batch["labels"])
    return gs.losses.token_mean(values, tokens)


def surgery_step(
    model: nn.Module, batches: Batches, *, packed: bool = False, autocast: bool = False
) -> Callable[[], None]:
    head = AnswerHead(model)
    if packed:
        head.pack()
    optimizer = gs.GRU(torch.optim.AdamW(model.parameters(), lr=0.0))
    device = next(model.parameters()).device.type

    def value(objective: str, kind: Any) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return loss(head, batches[objective], kind)

    def step() -> None:
        with optimizer.objective("retain"):
            value("retain", gs.losses.cross_entropy).backward()
        with optimizer.objective("forget"):
            value("forget", gs.losses.ceu).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def summed_step(model: nn.Module, batches: Batches) -> Callable[[], None]:
    head = AnswerHead(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def step() -> None:
        loss(head, batches["retain"], gs.losses.cross_entropy).backward()
        loss(head, batches["forget"], gs.losses.ceu).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def learner(folder: str | None, rows: Any) -> tuple[Any, Any]:
    """A model and its tokenizer: of this folder, or the command's small Llama."""
    if folder is not None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer
    with tempfile.TemporaryDirectory() as cache:
        return scratch_model(rows, ScratchSettings(epochs=1), cache_dir=Path(cache))


def measured(folder: str | None, arguments: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """What the model is, and what its steps and scores cost."""
    rows = fictional_authors(2 if arguments.quick else 10)
    model, tokenizer = learner(folder, rows)
    if torch.cuda.is_available():
        model = model.to("cuda")
    device = next(model.parameters()).device
    model.train()
    size = arguments.batch_size
    encoded = [encode(tokenizer, asked(row), row["answer"]) for row in rows[: 2 * size]]
    batches = {
        name: {key: value.to(device) for key, value in collate(part, padding_id(tokenizer)).items()}
        for name, part in (("forget", encoded[:size]), ("retain", encoded[size:]))
    }
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches.values())
    steps = {
        "surgery": surgery_step(model, batches),
        "packed": surgery_step(model, batches, packed=True),
        "autocast": surgery_step(model, batches, packed=True, autocast=True),
        "summed": summed_step(model, batches),
    }
    half = arguments.questions // 2
    splits = {"forget": rows[:half], "retain": rows[half : arguments.questions]}
    scoring = {
        "likelihoods": EvaluationSettings(generate=False),
        "likelihoods and answers": EvaluationSettings(),
    }
    works: dict[str, Callable[[], object]] = {**steps}
    for name, settings in scoring.items():
        works[name] = partial(evaluate, model, tokenizer, splits, settings, progress=False)
    times: dict[str, list[float]] = {name: [] for name in works}
    for step in steps.values():
        timed(step)
    for _ in range(arguments.rounds):
        for name, work in works.items():
            times[name].append(timed(work))
    step, packed, autocast, summed, likelihoods, everything = (median(found) for found in times.values())
    gained = median(plain / without for plain, without in zip(times["surgery"], times["packed"], strict=True))
    share = median(1 - plain / whole for whole, plain in zip(times["surgery"], times["summed"], strict=True))
    training, evaluation = arguments.steps * packed, 2 * everything
    weights = sum(parameter.numel() for parameter in model.parameters())
    return f"{weights / 1e6:.1f}M parameters, {device.type}", {
        "a step": f"{step:.2f} s, {tokens} tokens, {tokens / step:.1f} a second",
        "of it surgery": f"{share:.1%} (summed gradients: {summed:.2f} s)",
        "a step without padding": f"{packed:.2f} s, {gained:.2f} times as fast",
        "the same under bfloat16 autocast": f"{autocast:.2f} s",
        "scoring a question": f"{everything / arguments.questions:.2f} s, of it {1 - likelihoods / everything:.0%} generation",
        f"scoring in a run of {arguments.steps} steps": f"{evaluation / (evaluation + training):.1%}, "
        f"{evaluation / training:.2f} times the training",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a causal language model, measured after the command's small Llama")
    defaults = {"threads": torch.get_num_threads(), "steps": 40, "questions": 24, "batch-size": 8, "rounds": 3}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--quick", action="store_true", help="4 questions and 1 round: whether it runs at all")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.questions, arguments.rounds, arguments.batch_size = 4, 1, 2
    torch.set_num_threads(arguments.threads)
    print(conditions("transformers"))
    models = [None] if arguments.model is None else [None, arguments.model]
    found = dict(measured(folder, arguments) for folder in models)
    print(f"\nBatches of 2 x {arguments.batch_size}; {arguments.questions} questions scored before and after; ", end="")
    print(f"medians of {arguments.rounds} interleaved rounds.\n")
    print(table("the real job", found))


if __name__ == "__main__":
    main()
