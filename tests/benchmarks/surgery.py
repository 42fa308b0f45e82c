"""What surgery costs: beside the memory's bandwidth, beside two backward passes alone, and in memory.

Run it: python tests/benchmarks/surgery.py [--threads 2] [--device cuda] [--default-malloc] [--only limit] [--small]

Times are the best of interleaved rounds in one process (what else the machine does can only add), and only their ratio means something. The model is a Llama of 47M
parameters (vocabulary 32000, width 512, 8 layers, tied head, float32).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gradsurgery as gs
from tests.benchmarks import limit
from tests.benchmarks.memory import pass_table, peaks


def limit_table(repeats: int, small: bool) -> None:
    """Gram matrix and combination of two rows over the memory-bandwidth limit, by backend, with the matrix's error."""
    print("\nGram matrix and combination over the limit of the memory: median of rounds (quartiles; best)")
    for name in limit.LISTS:
        rows = limit.rows_of(name, small=small)
        numbers = sum(t.numel() for t in rows[0] if t is not None)
        exact = exact_gram(rows)
        print(f"  {name}, {len(rows[0])} tensors, {numbers / 1e6:.1f}M numbers")
        functions: dict[str, Callable[[], object]] = {"limit": limit.limit_of(rows)}
        for choice in ("compiled", "eager"):
            for kind, scale in (("", 1.0), (", two coefficients", 0.9999)):
                coefficients = torch.tensor([scale, 1e-9], dtype=torch.float64)
                functions[choice + kind] = partial(one_pass, rows, coefficients, choice)
        times = limit.interleaved(functions, repeats)
        print(f"    the limit: {median(times['limit']) * 1e3:.1f} ms")
        for choice, seconds in times.items():
            if choice == "limit":
                continue
            print(f"    {choice:28s} {limit.ratio(seconds, times['limit'])}", end="")
            with gs.gram.backend(choice.split(",")[0]):
                found = gs.gram.gram(limit.rows_of(name, small=small))
            print(f"  <r,r> off by {float((found / exact - 1.0).abs()[1, 1]):.1e}")


def device_table(repeats: int, small: bool) -> None:
    """The same on a CUDA device, whose limit is five halves of a copy: two reads, and two reads and a write, of one row's bytes."""
    print("\nGram matrix and combination over the limit of the memory: median of rounds (quartiles; best)")
    for name in limit.LISTS:
        rows = [[None if t is None else t.cuda() for t in row] for row in limit.rows_of(name, small=small)]
        numbers = sum(t.numel() for t in rows[0] if t is not None)
        first, second = (torch.zeros(numbers, dtype=limit.LISTS[name][0], device="cuda") for _ in range(2))
        coefficients = torch.tensor([1.0, 1e-9], dtype=torch.float64, device="cuda")
        functions: dict[str, Callable[[], object]] = {
            "copy": partial(first.copy_, second),
            "triton": partial(one_pass, rows, coefficients, "triton"),
            "triton, three launches": partial(three_launches, rows),
            "eager": partial(one_pass, rows, coefficients, "eager"),
        }
        functions["triton, three launches"]()  # a graph is captured of what has run
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            three_launches(rows)
        functions["triton, a graph of three"] = graph.replay
        times: dict[str, list[float]] = {kind: [] for kind in functions}
        for repeat in range(repeats + 1):
            for kind, function in functions.items():
                seconds = timed(function, "cuda")
                if repeat:
                    times[kind].append(seconds)
        floor = [2.5 * seconds for seconds in times.pop("copy")]
        print(
            f"  {name}, {len(rows[0])} tensors, {numbers / 1e6:.1f}M numbers; the limit: {median(floor) * 1e6:.0f} us"
        )
        for kind, seconds in times.items():
            print(f"    {kind:28s} {limit.ratio(seconds, floor)}  {median(seconds) * 1e6:.0f} us")


def three_launches(rows: list[list[torch.Tensor | None]]) -> None:
    with gs.gram.backend("triton"):
        gs.gram.update_(rows, "sum")


def exact_gram(rows: list[list[torch.Tensor | None]]) -> torch.Tensor:
    """Products and sums in float64, in pieces that need no copy of the whole."""
    total = torch.zeros(2, 2, dtype=torch.float64)
    for pair in zip(*rows, strict=True):
        flat = [tensor.reshape(-1) for tensor in pair if tensor is not None]
        for parts in zip(*(tensor.split(1 << 20) for tensor in flat), strict=True):
            both = torch.stack([part.double() for part in parts])
            total += both @ both.mT
    return total


def one_pass(rows: list[list[torch.Tensor | None]], coefficients: torch.Tensor, choice: Any) -> None:
    with gs.gram.backend(choice):
        gs.gram.gram(rows)
        gs.gram.combine_(rows, coefficients)


def make_model(device: str, layers: int = 8) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1792,
        num_hidden_layers=layers,
        num_attention_heads=8,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(device)


def loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    logits, labels = gs.losses.answer_tokens(model(tokens).logits, tokens)
    return gs.losses.token_mean(gs.losses.cross_entropy(logits, labels), labels)


def timed(function: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_ratios(device: str, tokens: int, repeats: int) -> None:
    model = make_model(device)
    batches = {name: torch.randint(32000, (1, tokens), device=device) for name in ("retain", "forget")}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    variants: dict[str, dict[str, Any]] = {
        "rule=gru": {},
        "rule=gru, ema_decay=0.2": {"ema_decay": 0.2},
        "rule=pcgrad": {"rule": "pcgrad"},
        "rule=gru, scope=tensor": {"scope": "tensor"},
    }
    # A learning rate of 0 and SGD: the base's own step is not what is measured, and is in neither time.
    optimizers = {
        name: gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.0), **options)
        for name, options in variants.items()
    }

    def alone() -> None:
        for batch in batches.values():
            loss(model, batch).backward()
            model.zero_grad()

    def rows(optimizer: gs.GradientSurgery) -> None:
        for name, batch in batches.items():
            with optimizer.objective(name):
                loss(model, batch).backward()

    alone_times: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in variants}
    combine_times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        first = timed(alone, device)
        for name, optimizer in optimizers.items():
            seconds = timed(lambda optimizer=optimizer: rows(optimizer), device)
            combining = timed(optimizer.combine, device)
            optimizer.step()  # commits the average, where there is one
            optimizer.zero_grad()
            if repeat:  # the first round warms up
                times[name].append(seconds + combining)
                combine_times[name].append(combining)
        if repeat:
            alone_times.append(first)
    best = min(alone_times)
    print(
        f"\n{parameters / 1e6:.1f}M parameters, {tokens} tokens a loss, best of {repeats} interleaved rounds: ", end=""
    )
    print(f"two backward passes alone {best * 1e3:.0f} ms (median {median(alone_times) * 1e3:.0f})")
    for name, values in times.items():
        print(
            f"  {name:28s} x {min(values) / best:.3f} (medians x {median(values) / median(alone_times):.3f}), of it combine() "
            f"{min(combine_times[name]) * 1e3:.0f} ms = {min(combine_times[name]) / best:.1%}"
        )


def memory_table() -> None:
    """An additional copy that lives in the step only, when activations are gone, must be seen there: compare phase by phase."""
    tokens = torch.randint(32000, (1, 8))

    def plain_backward(model: LlamaForCausalLM) -> None:
        loss(model, tokens).backward()

    def surgery_backward(model: LlamaForCausalLM, optimizer: gs.GradientSurgery) -> None:
        for name in reversed(optimizer.objectives):
            with optimizer.objective(name):
                loss(model, tokens).backward()

    def step(optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        optimizer.zero_grad()

    model = make_model("cpu", layers=4)
    base = torch.optim.SGD(model.parameters(), lr=1e-3)
    plain = peaks(lambda: plain_backward(model), lambda: step(base))
    print(f"\nlive above the weights in plain SGD: {plain['backward'] / 2**20:.0f} MiB while backward runs, ", end="")
    print(f"{plain['step'] / 2**20:.0f} MiB in the step; surgery adds")
    variants: dict[str, dict[str, Any]] = {
        "gru": {},
        "gru, ema": {"ema_decay": 0.2},
        "gru, ema in bf16": {"ema_decay": 0.2, "ema_dtype": torch.bfloat16},
        "gru, accumulate": {"accumulate": True},
        "gru, guard": {"guard": "update"},
        "gru, two protected": {"objectives": ("forget", "retain", "general")},
    }
    for name, options in variants.items():
        model = make_model("cpu", layers=4)
        optimizer = gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=1e-3), **options)
        found = peaks(
            lambda model=model, optimizer=optimizer: surgery_backward(model, optimizer),
            lambda optimizer=optimizer: step(optimizer),
        )
        measured = max(found[phase] - plain[phase] for phase in plain)
        estimate = optimizer.memory_estimate()
        copy = sum(parameter.nbytes for parameter in model.parameters())
        print(
            f"  {name:20s} measured {measured / 2**20:6.1f} MiB, memory_estimate() {estimate / 2**20:6.1f} MiB, "
            f"ratio {measured / estimate:.3f}, beyond it {(measured - estimate) / copy:.3f} gradient copies"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--default-malloc", action="store_true")
    parser.add_argument("--only", choices=("limit", "ratios", "memory"))
    parser.add_argument("--small", action="store_true", help="a list of 12M numbers instead of 58M")
    arguments = parser.parse_args()
    if not arguments.default_malloc:
        limit.keep_heap()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.device}, {arguments.threads} threads; {gs.gram.backend()!r}")
    if arguments.only in (None, "limit"):
        (device_table if arguments.device == "cuda" else limit_table)(arguments.repeats, arguments.small)
    if arguments.only in (None, "ratios"):
        for tokens in (512, 256):
            time_ratios(arguments.device, tokens, arguments.repeats)
    if arguments.only in (None, "memory"):
        pass_table(arguments.small)
        memory_table()
