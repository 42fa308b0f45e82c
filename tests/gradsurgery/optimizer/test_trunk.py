"""`join(features=...)`: every row is what `torch.autograd.grad` gives of its loss alone, or it is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import gradsurgery as gs
from tests.problems import FOUR, TWO, assert_same, batch, mlp, snapshot
from tests.tolerances import COMBINED, STEPPED, close

MODES: dict[str, dict[str, Any]] = {"one after another": {}, "batched": {"batched": True}}
NAMES = ("forget", "retain", "utility")


class Case(NamedTuple):
    """Losses of one forward pass.

    Attributes:
        leaves: Everything that can get a gradient; the optimizer's parameters first.
        own: How many of them are the optimizer's.
        make: Builds the graph: the features, and a loss for each of three objectives.
        apart: Whether heads and trunk can run apart, so that a batched pass is possible.
        options: For join.
    """

    leaves: list[Tensor]
    own: int
    make: Callable[[], tuple[Any, list[Tensor]]]
    apart: bool = True
    options: Mapping[str, Any] = MappingProxyType({})


def tensors(dtype: torch.dtype, *shapes: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def heads_of_their_own(dtype: torch.dtype) -> Case:
    """Three heads, one of which is not trained, a parameter that nothing reaches, and one number."""
    x, w, b, h0, h1, unused, number = tensors(dtype, (5, 4), (4, 3), (3,), (3,), (3, 2), (2,), ())

    def make() -> tuple[Tensor, list[Tensor]]:
        hidden = (x.detach() @ w + b).tanh()
        return hidden, [(hidden @ h0).square().sum(), (hidden @ h1).exp().mean() + number, hidden.square().mean()]

    return Case([w, b, h0, h1, unused, number], 6, make)


def one_head_for_all(dtype: torch.dtype) -> Case:
    """Each loss runs the same head anew, on rows of its own: a batch of several objectives' examples."""
    x, w, head = tensors(dtype, (6, 4), (4, 3), (3, 5))

    def make() -> tuple[Tensor, list[Tensor]]:
        hidden = (x.detach() @ w).sigmoid()
        return hidden, [(part @ head).logsumexp(1).sum() for part in hidden.chunk(3)]

    return Case([w, head], 2, make)


def heads_that_share_a_graph(dtype: torch.dtype) -> Case:
    case = one_head_for_all(dtype)
    _, head = case.leaves

    def make() -> tuple[Tensor, list[Tensor]]:
        hidden, _ = case.make()
        logits = (hidden @ head).tanh()
        return hidden, [(logits * k).square().sum() for k in (1.0, 2.0, 3.0)]

    return case._replace(make=make, options={"retain_graph": True})


def several_features(dtype: torch.dtype) -> Case:
    """Outputs of one node, one of them twice in a loss, and one that two losses do not see."""
    x, w, h, input_ = tensors(dtype, (5, 4), (4, 6), (3,), (5, 4))

    def make() -> tuple[list[Tensor], list[Tensor]]:
        first, second = (x.detach() @ w + input_ @ w).tanh().chunk(2, 1)
        return [first, second], [first.square().sum(), (first @ h).sum() * first.sum(), (first * second).sum()]

    return Case([w, h, input_], 2, make)


def expanded_and_shared_gradients(dtype: torch.dtype) -> Case:
    """Gradients that autograd hands out as views without memory of their own, or twice."""
    x, w, a, b = tensors(dtype, (3, 3), (3, 3), (3, 3), (3, 3))

    def make() -> tuple[Tensor, list[Tensor]]:
        hidden = x.detach() + w
        return hidden, [(hidden + a + b).sum(), (hidden + a + b).square().sum(), (hidden * a).sum()]

    return Case([w, a, b], 3, make)


def tied(dtype: torch.dtype) -> Case:
    """The embedding is the head too."""
    (embedding,) = tensors(dtype, (5, 3))

    def make() -> tuple[Tensor, list[Tensor]]:
        hidden = embedding[torch.tensor([0, 3, 3, 1])].tanh()
        return hidden, [(hidden @ embedding.T).log_softmax(1)[:, k].sum() for k in range(3)]

    return Case([embedding], 1, make, apart=False)


def around_the_features(dtype: torch.dtype) -> Case:
    x, w, h = tensors(dtype, (5, 4), (4, 3), (3,))

    def make() -> tuple[Tensor, list[Tensor]]:
        hidden = (x.detach() @ w).tanh()
        return hidden, [(hidden @ h).sum(), hidden.square().sum() + w.square().sum(), hidden.sum()]

    return Case([w, h], 2, make, apart=False)


def one_from_another(dtype: torch.dtype) -> Case:
    """The hidden states of two layers."""
    x, w, v = tensors(dtype, (5, 4), (4, 3), (3, 3))

    def make() -> tuple[list[Tensor], list[Tensor]]:
        first = (x.detach() @ w).tanh()
        second = (first @ v).tanh()
        return [first, second], [first.square().sum(), second.sum(), (first * second).sum()]

    return Case([w, v], 2, make, apart=False)


def hooked_features(dtype: torch.dtype) -> Case:
    case = heads_of_their_own(dtype)

    def make() -> tuple[Tensor, list[Tensor]]:
        hidden, losses = case.make()
        hidden.register_hook(lambda gradient: -2.0 * gradient)  # before the backward passes, as gradient reversal
        return hidden, losses

    return case._replace(make=make, apart=False)


def hooked_parameters(dtype: torch.dtype) -> Case:
    case = heads_of_their_own(dtype)
    for leaf in case.leaves[:3]:
        leaf.register_hook(lambda gradient: 3.0 * gradient)
    return case._replace(apart=False)


CASES = {
    function.__name__.replace("_", " "): function
    for function in (
        heads_of_their_own, one_head_for_all, heads_that_share_a_graph, several_features, expanded_and_shared_gradients,
        tied, around_the_features, one_from_another, hooked_features, hooked_parameters,
    )
}  # fmt: skip


def joined_rows(case: Case, scale: float, **options: Any) -> list[list[Tensor | None]]:
    """What an elementwise rule sees of each objective, in unscaled units."""
    seen: list[list[Tensor | None]] = []

    @gs.elementwise.rule
    def look(rows: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
        seen[:] = [[None if part is None else part.clone() for part in row] for row in rows]
        return list(rows[0])

    optimizer = gs.GradientSurgery(torch.optim.SGD(case.leaves[: case.own], lr=0.1), look, NAMES)
    features, losses = case.make()
    total = optimizer.join(features=features, **dict(zip(NAMES, losses, strict=True)), **case.options, **options)
    (scale * total).backward()
    return seen


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_every_row_is_that_of_its_loss_alone(name: str, dtype: torch.dtype, mode: str) -> None:
    case = CASES[name](dtype)
    expected = []
    for index in range(3):
        loss = case.make()[1][index]
        expected.append(torch.autograd.grad(loss, case.leaves[: case.own], allow_unused=True))
    if not case.apart and mode == "batched":
        before = [leaf.detach().clone() for leaf in case.leaves]
        with pytest.raises(RuntimeError, match=r"join: expected a trunk that runs apart .* leave batched out"):
            joined_rows(case, 0.25, **MODES[mode])
        assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, case.leaves, strict=True))
        return
    found = joined_rows(case, 0.25, **MODES[mode])
    assert [[part is None for part in row] for row in found] == [[part is None for part in row] for row in expected]
    for row, correct in zip(found, expected, strict=True):
        for part, right in zip(row, correct, strict=True):
            if part is not None and right is not None:
                close(part, right, COMBINED[dtype], scale=right.abs().max().clamp_min(1.0) * 4)


def shared(
    model: nn.Sequential, step: int, micro: int, names: Sequence[str] = FOUR
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses on one batch: of a trunk, and of a head that each runs anew."""
    inputs, labels = batch(0, step, micro)
    hidden = model[:2](inputs)
    losses = {
        name: nn.functional.cross_entropy((k + 1) * model[2](hidden), (labels + k) % 3) for k, name in enumerate(names)
    }
    return hidden, losses | {names[0]: -losses[names[0]]}


def detached(hidden: Tensor) -> Any:
    return hidden.detach()


REFUSED: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "no tensor": (lambda hidden: "hidden", ValueError, r"a tensor or several, found \['str'\]"),
    "a number": (lambda hidden: 3, ValueError, r"a tensor or several, found \['int'\]"),
    "none": (lambda hidden: [], ValueError, r"a tensor or several, found \[\]"),
    "among others": (lambda hidden: [hidden, None], ValueError, r"found \['Tensor', 'NoneType'\]"),
    "twice": (lambda hidden: (hidden, hidden), ValueError, "distinct features, found the same tensor twice"),
    "detached": (detached, RuntimeError, r"found one without a gradient of shape \[4, 5\].*not detached"),
    "a leaf": (lambda hidden: detached(hidden).requires_grad_(), RuntimeError, "found a leaf of shape"),
    "a copy": (lambda hidden: hidden.clone(), RuntimeError, "loss of 'retain' to be computed from features.*itself"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_features_that_cannot_be_are_refused_before_anything_ran(name: str) -> None:
    change, kind, sentence = REFUSED[name]
    model = mlp()
    optimizer = gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1), objectives=("retain", "forget"))
    hidden, losses = shared(model, 0, 0, ("retain", "forget"))
    before = snapshot(model, optimizer)
    with pytest.raises(kind, match=sentence):
        optimizer.join(features=change(hidden), **losses)
    with pytest.raises(ValueError, match="expected features with batched=True, found none"):
        optimizer.join(**losses, **MODES["batched"])
    assert_same(snapshot(model, optimizer), before)
    optimizer.join(features=hidden, **losses).backward()
    optimizer.step()


def test_validation_without_gradients_takes_features_too() -> None:
    model = mlp()
    optimizer = gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1))
    with torch.no_grad():
        hidden, losses = shared(model, 0, 0, TWO)
        total = optimizer.join(features=hidden, **losses)
    close(total, losses["forget"] + losses["retain"], STEPPED)


@pytest.mark.parametrize("hook", ["retain_grad", "post-accumulate"])
def test_what_a_hook_would_see_keeps_backward_passes_whole(hook: str) -> None:
    def run(**options: Any) -> list[Any]:
        model, seen = mlp(), []
        optimizer = gs.GradientSurgery(torch.optim.SGD(model.parameters(), lr=0.1), objectives=("retain", "forget"))
        hidden, losses = shared(model, 0, 0, ("retain", "forget"))
        if hook == "retain_grad":
            hidden.retain_grad()
        else:
            model[0].weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
        given = {"features": hidden} if "batched" in options else {"retain_graph": True}
        optimizer.join(**losses, **given, **options).backward()
        return [hidden.grad, *seen] if hook == "retain_grad" else seen

    whole, apart = run(), run(batched=False)
    assert len(whole) == len(apart)
    torch.testing.assert_close(apart, whole)
    with pytest.raises(RuntimeError, match="hook"):
        run(batched=True)
