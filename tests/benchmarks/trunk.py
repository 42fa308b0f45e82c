"""What losses of one forward pass cost: `join` with ``retain_graph``, with ``features``, and with ``batched``.

Run it: python -m tests.benchmarks.trunk [--threads 1] [--device cuda] [--repeats 9] [--quick]

Each way is a forward pass, every backward pass and the combination; the base is SGD, which costs next to nothing. Whole
backward passes of one forward pass (``retain_graph=True``) are 1. "Contexts" run the forward pass anew for every loss:
where the losses look at the same examples, of all of them, and where each has its own ("other examples"), of its own,
while the other ways run one forward pass over all examples. Ratios are medians of interleaved rounds in one process,
with their quartiles; peaks are allocations above the parameters. Beside them stands the largest error of the Gram
matrix, against float64 and in units of its largest number.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import gradsurgery as gs
from tests.benchmarks import telling
from tests.benchmarks.limit import ROUNDS, interleaved, keep_heap, ratio
from tests.benchmarks.losses import peak
from tests.benchmarks.telling import conditions, progress, table, turned

NAMES = ("forget", "retain", "utility", "style")


class Hidden(nn.Module):
    """A small Llama without its head."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaModel

        config = LlamaConfig(
            vocab_size=2000,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
        )
        self.model = LlamaModel(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).last_hidden_state


class Problem(NamedTuple):
    """A trunk with a head, and inputs of which each loss has a part or all.

    Attributes:
        model: The trunk and its head.
        inputs: ``[B, ...]``.
        labels: A class for each of the trunk's hidden states, ``[K, B, ...]``.
        same: Whether all losses look at the same examples; if not, each at its own.
    """

    model: nn.ModuleDict
    inputs: Tensor
    labels: Tensor
    same: bool

    def parts(self) -> list[slice]:
        number, size = len(self.labels), len(self.inputs)
        return [
            slice(None) if self.same else slice(k * size // number, (k + 1) * size // number) for k in range(number)
        ]


def problem(kind: str, number: int, size: int, same: bool, device: str) -> Problem:
    torch.manual_seed(0)
    if kind == "Llama":
        trunk, width, classes = Hidden(128, 4), 128, 2000
        inputs = torch.randint(2000, (size, 48))
    else:
        trunk = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.GELU()) for _ in range(6)))
        width, classes, inputs = 512, 10, torch.randn(size, 512)
    model = nn.ModuleDict({"trunk": trunk, "head": nn.Linear(width, classes, bias=False)})
    labels = torch.randint(classes, (number, *(inputs.shape if kind == "Llama" else (size,))))
    return Problem(model.to(device), inputs.to(device), labels.to(device), same)


def loss(model: nn.ModuleDict, hidden: Tensor, labels: Tensor, index: int) -> Tensor:
    value = functional.cross_entropy(model["head"](hidden).flatten(0, -2), labels.flatten())
    return -value if index == 0 else value


def one_forward(given: Problem, optimizer: gs.GradientSurgery, options: dict[str, Any]) -> None:
    hidden = given.model["trunk"](given.inputs)
    losses = {
        name: loss(given.model, hidden[part], labels[part], k)
        for k, (name, part, labels) in enumerate(zip(NAMES, given.parts(), given.labels, strict=False))
    }
    named: dict[str, Any] = options if "retain_graph" in options else {"features": hidden, **options}
    optimizer.join(**losses, **named).backward()
    optimizer.step()
    optimizer.zero_grad()


def contexts(given: Problem, optimizer: gs.GradientSurgery, _: dict[str, Any]) -> None:
    for k, (name, part, labels) in reversed(list(enumerate(zip(NAMES, given.parts(), given.labels, strict=False)))):
        with optimizer.objective(name):
            loss(given.model, given.model["trunk"](given.inputs[part]), labels[part], k).backward()
    optimizer.step()
    optimizer.zero_grad()


WAYS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "retain_graph": (one_forward, {"retain_graph": True}),
    "features": (one_forward, {}),
    "batched": (one_forward, {"batched": True}),
    "contexts": (contexts, {}),
}


def gram(given: Problem, way: Callable[..., None], options: dict[str, Any]) -> Tensor:
    optimizer = surgeon(given)
    way(given, optimizer, options)
    assert optimizer.record is not None
    return optimizer.record.gram.cpu()


def surgeon(given: Problem) -> gs.GradientSurgery:
    return gs.GradientSurgery(torch.optim.SGD(given.model.parameters(), lr=0.0), "gru", NAMES[: len(given.labels)])


def compare(kind: str, number: int, size: int, same: bool, device: str, repeats: int) -> dict[str, dict[str, str]]:
    """Way -> what of it is told -> how much."""
    given = problem(kind, number, size, same, device)
    exact = given._replace(model=copy.deepcopy(given.model).double())
    if kind == "MLP":
        exact = exact._replace(inputs=given.inputs.double())
    right = gram(exact, *WAYS["contexts"])
    actions = {name: partial(way, given, surgeon(given), options) for name, (way, options) in WAYS.items()}

    def waited(action: Callable[[], None]) -> None:
        action()
        if device != "cpu":
            torch.cuda.synchronize()

    times = interleaved({name: partial(waited, action) for name, action in actions.items()}, repeats)
    errors = {
        name: float((gram(given, way, options) - right).abs().max() / right.abs().max())
        for name, (way, options) in WAYS.items()
    }
    return {
        "times retain_graph": {name: ratio(times[name], times["retain_graph"]) for name in WAYS},
        "peak in MiB": {name: f"{peak(action, device):.1f}" for name, action in actions.items()},
        "error of the Gram matrix": {name: f"{error:.0e}" for name, error in errors.items()},
    }


CASES: Sequence[tuple[str, int, int, bool]] = (
    ("Llama", 2, 1, True),
    ("Llama", 4, 1, True),
    ("Llama", 2, 4, True),
    ("Llama", 4, 4, True),
    ("Llama", 2, 4, False),
    ("MLP", 2, 4, True),
    ("MLP", 4, 4, True),
    ("MLP", 2, 128, True),
    ("MLP", 4, 128, True),
    ("MLP", 2, 128, False),
)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", type=telling.device, default="cpu")
    parser.add_argument("--repeats", type=int, help="rounds (9; quick: 2)")
    parser.add_argument("--quick", action="store_true", help="the first two cases")
    arguments = parser.parse_args()
    keep_heap()
    torch.set_num_threads(arguments.threads)
    print(conditions("transformers"))
    found: dict[str, dict[str, dict[str, str]]] = {}
    for kind, number, size, same in CASES[: 2 if arguments.quick else None]:
        case = f"{kind}, {number} losses, batch {size}, {'the same' if same else 'other'} examples"
        progress(case)
        repeats = arguments.repeats or (2 if arguments.quick else 9)
        found[case] = compare(kind, number, size, same, arguments.device, repeats)
    print(f"\nA step, {ROUNDS}.")
    for told in next(iter(found.values())):
        print(f"\n{table(told, turned({name: each[told] for name, each in found.items()}))}")
