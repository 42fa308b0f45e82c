"""What a loss and its head cost together: `losses.linear` beside the obvious way and beside the matrix products alone.

Run it: python -m tests.benchmarks.losses [--rows] [--threads 1] [--device cuda] [--backend triton] [--first] [--quick] [--default-malloc]

The obvious way is what the papers' code does: logits of all tokens, a clone with the label at minus infinity, its softmax, cross-entropy
against that. The products alone are those that nobody can avoid: logits, and the gradients of the hidden states and (with a trainable head)
of the weight, of the answer tokens in one piece, without any loss. Times are the best of interleaved rounds in one process; only ratios
mean something. Memory is the largest sum of live allocations above the inputs, the gradients included. On a GPU, Liger's head and Cut
Cross-Entropy's stand beside ours where they are installed (tests/benchmarks/fused_heads.py).

With --rows: losses of bare logits beside plain PyTorch. `kl_divergence`, `uniform` and `undial` are measured with a head too. The model is once
far from what it is compared with, and once near: a small divergence is summed in another way than a large one.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from itertools import product
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

import gradsurgery as gs
from tests.benchmarks import telling
from tests.benchmarks.fused_heads import fused_heads
from tests.benchmarks.limit import keep_heap
from tests.benchmarks.memory import peaks
from tests.benchmarks.plain_losses import ON_LOGITS, ROWS
from tests.benchmarks.surgery import timed
from tests.benchmarks.telling import conditions, progress, table, turned


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
    loss = gs.losses.Loss.of(gs.losses.cross_entropy, recompute=weight.requires_grad)
    values = gs.losses.linear(hidden, weight, labels, loss)
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


Told = dict[str, dict[str, str]]
"""What is told -> of what -> how much."""


def compare_rows(device: str, repeats: int, vocabulary: int, tokens: int, dtype: torch.dtype, distance: float) -> Told:
    """On logits: value and gradient, beside plain PyTorch; the models' logits differ by ``distance``, and logits are about 3."""
    generator = torch.Generator().manual_seed(0)
    noise, other = (torch.randn(tokens, vocabulary, generator=generator) for _ in range(2))
    labels = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    other = 3.0 * other
    starts = {name: distance * noise if name == "uniform" else other + distance * noise for name in ON_LOGITS}
    leaves = {name: start.to(device, dtype).requires_grad_() for name, start in starts.items()}
    other = other.to(device, dtype)

    def act(name: str, function: Callable[..., Tensor]) -> None:
        function(leaves[name], labels, other).mean().backward()
        leaves[name].grad = None

    return beside(
        {name: tuple(partial(act, name, way) for way in ways) for name, ways in ON_LOGITS.items()}, device, repeats
    )


def compare_heads(
    device: str, repeats: int, vocabulary: int, tokens: int, dtype: torch.dtype, trainable: bool, distance: float
) -> Told:
    """With a head, half of the tokens answers; the models' hidden states differ by ``distance``, and logits are about 1."""
    hidden, weight, labels = case(device, vocabulary, 512, tokens, 0.5, dtype, trainable)
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    near = (hidden.detach() + distance * noise).requires_grad_()
    flat = (distance * noise).requires_grad_()
    head = weight.detach().clone()
    valid = labels != -100

    def plainly(name: str, start: Tensor) -> None:
        values = ROWS[name][0](start @ weight.T, labels, hidden.detach() @ head.T)
        ((values * valid).sum() / valid.sum()).backward()
        start.grad = weight.grad = None

    def ours_(name: str, start: Tensor) -> None:
        reference = gs.losses.Reference(hidden.detach(), gs.losses.Head(head))
        loss = gs.losses.Loss.of(gs.losses.ROW_LOSSES[name], None if name == "uniform" else reference)
        (gs.losses.linear(start, weight, labels, loss).sum() / valid.sum()).backward()
        start.grad = weight.grad = None

    starts = {name: flat if name == "uniform" else near for name in ROWS}
    return beside(
        {name: tuple(partial(way, name, start) for way in (plainly, ours_)) for name, start in starts.items()},
        device,
        repeats,
    )


def beside(actions: dict[str, tuple[Callable[[], None], ...]], device: str, repeats: int) -> Told:
    """Of plain PyTorch's way and of ours: times and peaks, loss by loss."""
    best = {name: [math.inf, math.inf] for name in actions}
    for repeat in range(repeats + 1):
        for name, ways in actions.items():
            found = [timed(way, device) for way in ways]
            if repeat:  # the first round warms up
                best[name] = [min(pair) for pair in zip(best[name], found, strict=True)]
    peaks_of = {name: [peak(way, device) for way in ways] for name, ways in actions.items()}
    return {
        "times plain PyTorch": {name: f"{own / plain:.2f}" for name, (plain, own) in best.items()},
        "peak in MiB / plain PyTorch's": {name: f"{own:.1f} / {plain:.1f}" for name, (plain, own) in peaks_of.items()},
    }


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


def gradient(function: Callable[..., Tensor], hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Of the hidden states, in float64."""
    return torch.autograd.grad(function(hidden, weight, labels), hidden)[0].double()


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


def compare(device: str, repeats: int, *shape: object) -> Told:
    hidden, weight, labels = case(device, *shape)  # pyright: ignore[reportArgumentType]
    usual, own, usual_ce, own_ce, torch_ce, alone = (
        "CE-U as usual, all tokens", "`losses.linear`, CE-U", "cross-entropy, all tokens", "`losses.linear`, cross-entropy",
        "`F.linear_cross_entropy`, gathered", "the products alone",
    )  # fmt: skip
    after, before = "CE-U, gathered after the head", "CE-U, gathered before the head"
    functions = {
        usual: obvious, after: after_head, before: gathered, own: ours, f"{own}, a weight per token": weighted,
        "`losses.linear` for NPO (`recompute`)": sequences, "`losses.linear`, inverted hinge": hinge,
        usual_ce: plain_cross_entropy, torch_ce: torch_cross_entropy, own_ce: our_cross_entropy,
    }  # fmt: skip
    if not hasattr(functional, "linear_cross_entropy"):
        del functions[torch_ce]
    others = fused_heads(hidden, weight, labels)
    functions |= others
    actions: dict[str, Callable[[], None]] = {
        name: lambda function=function: step(function, hidden, weight, labels) for name, function in functions.items()
    }
    actions[alone] = lambda: products(hidden, weight, labels)
    times: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(repeats + 1):
        for name, action in actions.items():
            seconds = timed(action, device)
            if repeat:
                times[name].append(seconds)
    best = {name: min(values) for name, values in times.items()}
    memory = {name: peak(actions[name], device) for name in (usual, after, before, own, usual_ce, own_ce, *others)}
    middle = {name: median(values) for name, values in times.items()}
    over = {name: f"{best[name] / best[alone]:.2f} (medians {middle[name] / middle[alone]:.2f})" for name in functions}
    exact = gradient(plain_cross_entropy, hidden.double(), weight.double(), labels)
    wrong = {
        name: float((gradient(functions[name], hidden, weight, labels) - exact).norm() / exact.norm())
        for name in (usual_ce, own_ce, *others)
    }
    return {
        "times the products": {alone: f"{best[alone] * 1e3:.0f} ms"} | over,
        "peak in MiB": {name: f"{bytes_:.1f}" for name, bytes_ in memory.items()},
        "relative error of the hidden states' gradient": {name: f"{error:.1e}" for name, error in wrong.items()},
        "usual / ours": {
            f"{loss}, {what}": f"{found[of] / found[by]:.2f}"
            for loss, of, by in (("CE-U", usual, own), ("cross-entropy", usual_ce, own_ce))
            for what, found in (("time", best), ("memory", memory))
        },
    }


def tell(about: str, found: dict[str, Told], by_case: bool = False) -> None:
    """A table of everything that was told of the cases."""
    for told in next(iter(found.values())):
        columns = {case: each[told] for case, each in found.items()}
        print(f"\n{table(f'{told}, {about}', turned(columns) if by_case else columns)}", flush=True)


def rows_tables(device: str, repeats: int, quick: bool, first: bool) -> None:
    """Losses of logits; with a head, half of the tokens are answers."""
    shapes = [(32000, 64)] if quick else [(32000, 64), (32000, 512), (128256, 64), (128256, 512)]
    for vocabulary, tokens in shapes[:1] if first else shapes:
        found: dict[str, Told] = {}
        for dtype, distance in product((torch.float32, torch.bfloat16), (3.0, 0.1)):
            case = f"{str(dtype)[6:]}, {distance} apart"
            progress(f"V={vocabulary} N={tokens}, {case}")
            found[f"{case}, logits"] = compare_rows(device, repeats, vocabulary, tokens, dtype, distance)
            for trainable, head in ((True, "trainable head"), (False, "frozen head")):
                found[f"{case}, {head}"] = compare_heads(
                    device, repeats, vocabulary, tokens, dtype, trainable, distance
                )
        tell(f"V={vocabulary} H=512 N={tokens}", found, by_case=True)


def heads_tables(device: str, repeats: int, quick: bool, first: bool) -> None:
    """Losses with their heads."""
    shapes = [(128256, 512, 512, 0.5), (128256, 512, 512, 1.0), (32000, 2048, 512, 0.5)]
    if device != "cpu":
        shapes = [(128256, 2048, 8192, 1.0), (128256, 4096, 8192, 0.5)]
    if quick:
        shapes = [(32000, 256, 256, 0.5)]
    for vocabulary, width, tokens, share in shapes[:1] if first else shapes:
        about = f"V={vocabulary} H={width} N={tokens} ({share:.0%} answers)"
        found: dict[str, Told] = {}
        for dtype, trainable in product((torch.float32, torch.bfloat16), (True, False)):
            case = f"{str(dtype)[6:]} {'trainable' if trainable else 'frozen'}"
            progress(f"{about}, {case}")
            found[case] = compare(device, repeats, vocabulary, width, tokens, share, dtype, trainable)
        tell(about, found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", type=telling.device, default="cpu")
    parser.add_argument("--backend", default="auto", help="of gs.losses.backend")
    parser.add_argument("--rows", action="store_true", help="losses of bare logits beside plain PyTorch")
    parser.add_argument("--repeats", type=int, help="rounds (5; quick: 2)")
    parser.add_argument("--quick", action="store_true", help="one small shape")
    parser.add_argument("--first", action="store_true", help="the first shape alone, which takes minutes")
    parser.add_argument("--default-malloc", action="store_true")
    arguments = parser.parse_args()
    if not arguments.default_malloc:
        keep_heap()
    torch.set_num_threads(arguments.threads)
    repeats = arguments.repeats or (2 if arguments.quick else 5)
    print(
        f"{conditions()} Losses of logits: {gs.losses.backend(arguments.backend)!r}.\n\nBest of {repeats} interleaved rounds."
    )
    (rows_tables if arguments.rows else heads_tables)(arguments.device, repeats, arguments.quick, arguments.first)
