"""What surgery costs: beside the memory's bandwidth, beside a step without it, and in memory.

Run it: python -m tests.benchmarks.surgery [--threads 2] [--device cuda] [--default-malloc] [--only limit] [--small] [--quick]

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
from tests.benchmarks.growth import backends
from tests.benchmarks.memory import pass_table, peaks
from tests.benchmarks.telling import conditions, device, progress, table


def limit_table(repeats: int, small: bool) -> None:
    """Gram matrix and combination of two rows over the memory-bandwidth limit, by backend, with the matrix's error."""
    ratios: dict[str, dict[str, str]] = {}
    errors: dict[str, dict[str, str]] = {}
    for name in limit.LISTS:
        progress(name)
        rows = limit.rows_of(name, small=small)
        numbers = sum(t.numel() for t in rows[0] if t is not None)
        exact = exact_gram(rows)
        functions: dict[str, Callable[[], object]] = {"limit": limit.limit_of(rows)}
        choices: tuple[Any, ...] = backends()
        for choice in choices:
            for kind, scale in (("", 1.0), (", two coefficients", 0.9999)):
                coefficients = torch.tensor([scale, 1e-9], dtype=torch.float64)
                functions[choice + kind] = partial(one_pass, rows, coefficients, choice)
        times = limit.interleaved(functions, repeats)
        floor = times.pop("limit")
        case = f"{name}, {len(rows[0])} tensors, {numbers / 1e6:.1f}M"
        ratios[case] = {"the limit": f"{median(floor) * 1e3:.1f} ms"}
        ratios[case] |= {choice: limit.ratio(seconds, floor) for choice, seconds in times.items()}
        errors[case] = {}
        for choice in choices:
            with gs.gram.backend(choice):
                found = gs.gram.gram(limit.rows_of(name, small=small))
            errors[case][choice] = f"{float((found / exact - 1.0).abs()[1, 1]):.1e}"
    print(f"\nGram matrix and combination of two rows, {limit.ROUNDS}.\n\n{table('times the limit', ratios)}")
    print(f"\n{table('error of <r, r>', errors)}")


def device_table(repeats: int, small: bool) -> None:
    """The same on a CUDA device, whose limit is five halves of a copy: two reads, and two reads and a write, of one row's bytes."""
    ratios: dict[str, dict[str, str]] = {}
    microseconds: dict[str, dict[str, str]] = {}
    for name in limit.LISTS:
        progress(name)
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
        case = f"{name}, {len(rows[0])} tensors, {numbers / 1e6:.1f}M"
        ratios[case] = {kind: limit.ratio(seconds, floor) for kind, seconds in times.items()}
        microseconds[case] = {
            kind: f"{median(took) * 1e6:.0f}" for kind, took in ({"the limit": floor} | times).items()
        }
    print(f"\nGram matrix and combination of two rows, {limit.ROUNDS}.\n\n{table('times the limit', ratios)}")
    print(f"\n{table('microseconds', microseconds)}")


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


CORRECTED = 'the forget loss alone, guard="update", which corrects it'


def forget_alone(gram: torch.Tensor) -> torch.Tensor:
    """No surgery, so that the change raises a retain loss whose negative is the forget loss."""
    return gs.rules.sum(gram) * gram.new_tensor([1.0, 0.0])


def time_ratios(device: str, tokens: int, repeats: int, layers: int = 8) -> dict[str, str]:
    """Times of a step with surgery over those of one without, by variant, for so many tokens a loss.

    Without surgery it is two backward passes, whose gradients add up, and AdamW's step.
    """
    progress(f"{tokens} tokens a loss")
    model = make_model(device, layers)
    batches = {name: torch.randint(32000, (1, tokens), device=device) for name in ("retain", "forget")}
    variants: dict[str, dict[str, Any]] = {
        "rule=gru": {},
        "rule=gru, ema_decay=0.7": {"ema_decay": 0.7},
        'rule=gru, ema_decay=0.7, guard="update"': {"ema_decay": 0.7, "guard": "update"},
        CORRECTED: {"rule": forget_alone, "guard": "update"},
        "rule=pcgrad": {"rule": "pcgrad"},
        "rule=gru, scope=tensor": {"scope": "tensor"},
    }

    def base(lr: float = 0.0) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=lr)  # the weights stay, so that every step is the same

    plain = base()
    # A step that the guard corrects has to move the weights, by the least that float32 weights hold.
    optimizers = {
        name: gs.GradientSurgery(base(1e-8 if name == CORRECTED else 0.0), **options)
        for name, options in variants.items()
    }

    def alone() -> None:
        for batch in batches.values():
            loss(model, batch).backward()
        plain.step()
        plain.zero_grad()

    def rows(optimizer: gs.GradientSurgery) -> None:
        for name, batch in batches.items():
            with optimizer.objective(name):
                if optimizer is optimizers[CORRECTED] and name == "forget":
                    (-loss(model, batches["retain"])).backward()
                else:
                    loss(model, batch).backward()

    def rest(optimizer: gs.GradientSurgery) -> None:
        optimizer.step()
        optimizer.zero_grad()

    alone_times: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in variants}
    combine_times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        first = timed(alone, device)
        for name, optimizer in optimizers.items():
            seconds = timed(lambda optimizer=optimizer: rows(optimizer), device)
            combining = timed(optimizer.combine, device)
            seconds += combining + timed(lambda optimizer=optimizer: rest(optimizer), device)
            if repeat:  # the first round warms up
                times[name].append(seconds)
                combine_times[name].append(combining)
        record = optimizers[CORRECTED].record
        assert record is not None
        assert record.unguarded_change is not None
        assert record.actual_change is not None
        if not bool(record.actual_change < record.unguarded_change):
            raise RuntimeError(f"expected a change that the guard corrects, found {record.unguarded_change} untouched")
        if repeat:
            alone_times.append(first)
    best = min(alone_times)
    alone_said = f"{best * 1e3:.0f} ms (median {median(alone_times) * 1e3:.0f})"
    return {"two backward passes and AdamW's step": alone_said} | {
        name: f"{min(values) / best:.3f} (medians {median(values) / median(alone_times):.3f}; combine() "
        f"{min(combine_times[name]) * 1e3:.0f} ms, {min(combine_times[name]) / best:.1%})"
        for name, values in times.items()
    }


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
    rows: dict[str, dict[str, str]] = {"measured": {}, "memory_estimate()": {}, "ratio": {}, "beyond it, in copies": {}}
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
        said = (f"{measured / 2**20:.1f} MiB", f"{estimate / 2**20:.1f} MiB", f"{measured / estimate:.3f}")
        for column, cell in zip(rows.values(), (*said, f"{(measured - estimate) / copy:.3f}"), strict=True):
            column[name] = cell
    print(f"\nLive above the weights in plain SGD: {plain['backward'] / 2**20:.0f} MiB while backward runs, ", end="")
    print(f"{plain['step'] / 2**20:.0f} MiB in the step (4 layers, 8 tokens).\n\n{table('surgery adds', rows)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--repeats", type=int, help="rounds (9; quick: 2)")
    parser.add_argument("--default-malloc", action="store_true")
    parser.add_argument("--only", choices=("limit", "ratios", "memory"))
    parser.add_argument("--small", action="store_true", help="a list of 12M numbers instead of 58M")
    parser.add_argument(
        "--quick", action="store_true", help="small lists, few tokens and rounds: whether it runs at all"
    )
    arguments = parser.parse_args()
    if not arguments.default_malloc:
        limit.keep_heap()
    torch.set_num_threads(arguments.threads)
    small, repeats = arguments.small or arguments.quick, arguments.repeats or (2 if arguments.quick else 9)
    print(f"{conditions('transformers')} Gram matrices: {gs.gram.backend()!r}.")
    if arguments.only in (None, "limit"):
        (device_table if arguments.device == "cuda" else limit_table)(repeats, small)
    if arguments.only in (None, "ratios"):
        tokens, layers = ((16,), 1) if arguments.quick else ((512, 256), 8)
        found = {f"{number} tokens a loss": time_ratios(arguments.device, number, repeats, layers) for number in tokens}
        print(
            f"\nA step with surgery, best of {repeats} interleaved rounds; learning rate 0, so that a guard measures "
            "and corrects nothing, but in the row that says otherwise.\n"
        )
        print(table("times a step without surgery", found))
    if arguments.only in (None, "memory"):
        pass_table(small)
        memory_table()
