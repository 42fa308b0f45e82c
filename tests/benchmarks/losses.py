"""What a loss and its head cost together: `losses.linear` beside the obvious way and beside the matrix products alone.

Run it: python tests/benchmarks/losses.py [--threads 1] [--device cuda] [--quick] [--default-malloc]

The obvious way is what the papers' code does: logits of all tokens, a clone with the label at minus infinity, its softmax, cross-entropy
against that. The products alone are those that nobody can avoid: logits, and the gradients of the hidden states and (with a trainable head)
of the weight, of the answer tokens in one piece, without any loss. Times are the best of interleaved rounds in one process; only ratios
mean something. Memory is the largest sum of live allocations above the inputs, the gradients included.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

import gradsurgery as gs
from tests.benchmarks.surgery import HEAP_KEPT, peaks, timed

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler announces every start


def obvious(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """CE-U as it is usually written: every token goes through the head, and those that do not count are left out at the end."""
    logits = hidden @ weight.T
    valid = labels != -100
    masked = logits.clone()
    masked.scatter_(1, labels.clamp_min(0)[:, None], -torch.inf)
    target = torch.softmax(masked, -1).detach()
    return (functional.cross_entropy(logits, target, reduction="none") * valid).sum() / valid.sum()


def after_head(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As in the authors' code: the tokens that count are gathered from the logits."""
    valid = labels != -100
    return _ceu((hidden @ weight.T)[valid], labels[valid])


def gathered(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The best that can be done by hand: the tokens that count are gathered before the head."""
    valid = labels != -100
    return _ceu(hidden[valid] @ weight.T, labels[valid])


def _ceu(logits: Tensor, labels: Tensor) -> Tensor:
    masked = logits.clone()
    masked.scatter_(1, labels[:, None], -torch.inf)
    return functional.cross_entropy(logits, torch.softmax(masked, -1).detach())


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return gs.losses.linear(hidden, weight, labels, gs.losses.ceu).sum() / (labels != -100).sum()


def weighted(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """A weight for every token, known only after the values: a trainable head's gradient is made a second time."""
    values = gs.losses.linear(hidden, weight, labels, gs.losses.ceu)
    return (values * torch.linspace(0.0, 1.0, len(values), device=values.device)).sum() / (labels != -100).sum()


def sequences(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As NPO and its like take likelihoods: the gradient is made in the backward pass."""
    values = gs.losses.linear(hidden, weight, labels, gs.losses.cross_entropy, recompute=weight.requires_grad)
    return gs.losses.npo(values.view(8, -1).sum(1), torch.zeros(8, device=values.device)).mean()


def hinge(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return gs.losses.linear(hidden, weight, labels, gs.losses.inverted_hinge).sum() / (labels != -100).sum()


def our_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return gs.losses.linear(hidden, weight, labels, gs.losses.cross_entropy).sum() / (labels != -100).sum()


def plain_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy((hidden @ weight.T), labels)


def torch_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch's own, on the gathered tokens, with the chunk that was best here."""
    valid = labels != -100
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=64 if hidden.device.type == "cpu" else 2048)
    return functional.linear_cross_entropy(hidden[valid], weight, labels[valid], options=options)


def case(
    device: str, vocabulary: int, width: int, tokens: int, share: float, dtype: torch.dtype, trainable: bool
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(device, dtype).requires_grad_()
    weight = (0.05 * torch.randn(vocabulary, width, generator=generator)).to(device, dtype).requires_grad_(trainable)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[torch.randperm(tokens, generator=generator)[: int(tokens * (1 - share))]] = -100
    return hidden, weight, labels.to(device)


def step(function: Callable[..., Tensor], hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    function(hidden, weight, labels).backward()
    hidden.grad = weight.grad = None


def products(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    with torch.no_grad():
        chosen = hidden[labels != -100]
        logits = chosen @ weight.T
        logits @ weight
        if weight.requires_grad:
            logits.T @ chosen


def peak(function: Callable[[], None], device: str) -> float:
    """MiB."""
    if device == "cpu":
        return peaks(function, lambda: None)["backward"] / 2**20
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def compare(device: str, repeats: int, *shape: object) -> None:
    hidden, weight, labels = case(device, *shape)  # pyright: ignore[reportArgumentType]
    functions = {
        "obvious": obvious, "gathered after": after_head, "gathered before": gathered, "ours": ours, "ours, weights": weighted,
        "ours, NPO": sequences, "inverted hinge": hinge,
        "plain CE": plain_cross_entropy, "torch linear CE": torch_cross_entropy, "our CE": our_cross_entropy,
    }  # fmt: skip
    if not hasattr(functional, "linear_cross_entropy"):
        del functions["torch linear CE"]
    actions: dict[str, Callable[[], None]] = {
        name: lambda function=function: step(function, hidden, weight, labels) for name, function in functions.items()
    }
    actions["products"] = lambda: products(hidden, weight, labels)
    times: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(repeats + 1):
        for name, action in actions.items():
            seconds = timed(action, device)
            if repeat:
                times[name].append(seconds)
    best = {name: min(values) for name, values in times.items()}
    memory = {
        name: peak(actions[name], device)
        for name in ("obvious", "gathered after", "gathered before", "ours", "plain CE", "our CE")
    }
    vocabulary, width, tokens, share, dtype, trainable = shape
    print(
        f"V={vocabulary} H={width} N={tokens} ({share:.0%} answers) {str(dtype)[6:]} {'trainable' if trainable else 'frozen'}: "
        f"products {best['products'] * 1e3:.0f} ms"
    )
    for name in functions:
        print(
            f"  {name:16s} x {best[name] / best['products']:5.2f} of the products (medians x "
            f"{median(times[name]) / median(times['products']):5.2f})"
            + (f", peak {memory[name]:7.1f} MiB" if name in memory else "")
        )
    print(
        f"  CE-U: {best['obvious'] / best['ours']:.2f} times as fast, {memory['obvious'] / memory['ours']:.1f} times less memory; "
        f"CE: {best['plain CE'] / best['our CE']:.2f} and {memory['plain CE'] / memory['our CE']:.1f}",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one small shape")
    parser.add_argument("--default-malloc", action="store_true")
    arguments = parser.parse_args()
    if not arguments.default_malloc and any(os.environ.get(name) != value for name, value in HEAP_KEPT.items()):
        os.environ.update(HEAP_KEPT)
        os.execv(sys.executable, [sys.executable, *sys.argv])  # glibc reads them when a process starts
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.device}, {arguments.threads} threads, {time.strftime('%Y-%m-%d')}")
    shapes = [(128256, 512, 512, 0.5), (128256, 512, 512, 1.0), (32000, 2048, 512, 0.5)]
    if arguments.device != "cpu":
        shapes = [(128256, 2048, 8192, 1.0), (128256, 4096, 8192, 0.5)]
    if arguments.quick:
        shapes = [(32000, 256, 256, 0.5)]
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            for trainable in (True, False):
                compare(arguments.device, arguments.repeats, *shape, dtype, trainable)
