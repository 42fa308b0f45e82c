"""What a training step of ULD's assistant costs, compared with a step of full unlearning on the same rows.

Run it: python -m tests.benchmarks.uld [--quick] [--layers 32] [--assistant-layers 8] [--width 256] [--rows 4] [--length 64] [--device cuda]

All steps see the same forget and retain batch, count every token, and end with AdamW's update:

- full: gradient ascent and retain cross-entropy on all weights, in two backward passes that `gs.GRU` keeps apart and
  combines;
- full, summed: the same losses in one backward pass and plain AdamW. This is GradDiff's step, the cheapest of all;
- ULD: cross-entropy and KL(uniform || assistant) on a LoRA adapter (rank 32) over the first layers.

A time is the median over interleaved rounds in one process; only ratios of times mean something. An epoch of ULD has
more steps: D'_f holds a paraphrase (in the paper two) beside every forget row. The ratio for one pass over the forget
set is therefore half (a third of) the ratio for one step. The first two are printed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import gradsurgery as gs
from gradsurgery.logit_difference import assistant
from lightning_modules.training.uld import ULDModule
from tests.benchmarks import telling


def make_model(layers: int, width: int, vocabulary: int, device: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=int(2.67 * width) // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(device)


def token_loss(model: LlamaForCausalLM, tokens: Tensor, loss: gs.losses.TokenLoss) -> Tensor:
    logits, labels = gs.losses.answer_tokens(model(tokens).logits, tokens)
    return gs.losses.token_mean(loss(logits, labels), labels)


def full_step(model: LlamaForCausalLM, batch: dict[str, Tensor]) -> Callable[[], None]:
    optimizer = gs.GRU(torch.optim.AdamW(model.parameters(), lr=1e-6))
    losses = {"retain": gs.losses.cross_entropy, "forget": gs.losses.gradient_ascent}

    def step() -> None:
        for name, loss in losses.items():
            with optimizer.objective(name):
                token_loss(model, batch[name], loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def summed_step(model: LlamaForCausalLM, batch: dict[str, Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step() -> None:
        forget = token_loss(model, batch["forget"], gs.losses.gradient_ascent)
        (forget + token_loss(model, batch["retain"], gs.losses.cross_entropy)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def uld_step(model: LlamaForCausalLM, batch: dict[str, Tensor], layers: int) -> Callable[[], None]:
    module = ULDModule(assistant(model, layers))
    optimizer = module.configure_optimizers()
    inputs = {
        name: {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
        for name, tokens in batch.items()
    }

    def step() -> None:
        (module.forget_loss(inputs["forget"]) + 6.5 * module.retain_loss(inputs["retain"])).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(step: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=telling.device, default="cpu")
    parser.add_argument("--quick", action="store_true", help="4 layers and 2 rounds: whether it runs at all")
    for name, default in {"layers": 32, "assistant-layers": 8, "width": 256, "vocabulary": 4096}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in {"rows": 4, "length": 64, "rounds": 5, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.layers, arguments.assistant_layers, arguments.rounds = 4, 1, 2
    torch.set_num_threads(arguments.threads)
    print(telling.conditions("transformers"))
    model = make_model(arguments.layers, arguments.width, arguments.vocabulary, arguments.device)
    shape = (arguments.rows, arguments.length)
    batch = {name: torch.randint(arguments.vocabulary, shape, device=arguments.device) for name in ("forget", "retain")}
    steps = {
        "full unlearning, GA + retain with gs.GRU": full_step(model, batch),
        "full unlearning, GA + retain summed": summed_step(model, batch),
        f"ULD's assistant, {arguments.assistant_layers} of {arguments.layers} layers": uld_step(
            model, batch, arguments.assistant_layers
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        timed(step, arguments.device)
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            times[name].append(timed(step, arguments.device))
    *_, uld = times.values()
    ratios = {name: median(a / b for a, b in zip(found, uld, strict=True)) for name, found in times.items()}
    columns = {
        "a step": {name: f"{ratio:.2f}" for name, ratio in ratios.items()},
        "one pass over the forget set, one paraphrase": {name: f"{ratio / 2:.2f}" for name, ratio in ratios.items()},
    }
    milliseconds = {name: f"{1e3 * median(found):.1f}" for name, found in times.items()}
    print(f"\n{arguments.layers} layers of {arguments.width}, 2 x {shape[0]} rows of {shape[1]} tokens; ", end="")
    print(f"medians of {arguments.rounds} interleaved rounds.\n\n{telling.table('times ULD', columns)}")
    print(f"\n{telling.table('milliseconds', {'a step': milliseconds})}")


if __name__ == "__main__":
    main()
