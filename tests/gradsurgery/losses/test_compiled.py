"""The compiled kernels for losses of logits: what they take, their bits, their choice, and what can keep them from being built."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from gradsurgery.losses import (
    _backend,
    _divergence,
    _divergence_kernel,
    _kernel,
    _odds_kernel,
    _row_kernel,
    backend,
    ceu,
    inverted_hinge,
    kl_divergence,
    undial,
    uniform,
)
from gradsurgery.losses._divergence import cross_entropy_, divergence_
from gradsurgery.losses._divergence_kernel import Compared, Kernel
from gradsurgery.native import Unavailable
from tests.reference import losses as token_losses
from tests.reference import row_losses as reference
from tests.tolerances import LOSS, close

F32, BF16 = torch.float32, torch.bfloat16
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "kl_divergence": lambda logits, labels, other: kl_divergence(logits, other),
    "uniform": lambda logits, labels, other: uniform(logits),
    "undial": lambda logits, labels, other: undial(logits, labels, other),
}
names = pytest.mark.parametrize("name", LOSSES)
OF_ODDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ceu": lambda logits, labels, other: ceu(logits, labels),
    "inverted_hinge": lambda logits, labels, other: inverted_hinge(logits, labels),
}
ALL = LOSSES | OF_ODDS
all_names = pytest.mark.parametrize("name", ALL)


@pytest.fixture(autouse=True)
def kernel() -> Iterator[Kernel]:
    if isinstance(found := _divergence_kernel.built(), str):
        pytest.skip(found)
    with backend("compiled"):
        yield found


def rows(vocabulary: int, kinds: tuple[torch.dtype, torch.dtype] = (F32, F32), number: int = 6) -> tuple[Tensor, ...]:
    """Logits, labels at the edges of the vocabulary and of the kernel's blocks, and reference logits."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits, other = (3 * torch.randn(number, vocabulary, generator=generator) for _ in range(2))
    labels = torch.tensor([0, vocabulary - 1, 1023, 1024, -100, vocabulary // 2]).clamp_max(vocabulary - 1)
    return logits.to(kinds[0]), labels[torch.arange(number) % 6], other.to(kinds[1])


def differentiated(name: str, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    logits = inputs[0].detach().requires_grad_()
    values = ALL[name](logits, *inputs[1:])
    weights = torch.linspace(-1, 2, len(values), device=logits.device)
    return values.detach(), torch.autograd.grad((values * weights).sum(), logits)[0]


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@all_names
@pytest.mark.parametrize("kinds", [(F32, F32), (F32, BF16), (BF16, F32), (BF16, BF16)])
@pytest.mark.parametrize("vocabulary", [2, 15, 16, 1023, 1024, 1025, 2500])
def test_every_vocabulary_and_type_gives_the_textbook_form(
    vocabulary: int, kinds: tuple[torch.dtype, torch.dtype], name: str
) -> None:
    inputs = rows(vocabulary, kinds)
    # Of equal runners-up autograd takes all, and the inverted hinge the first.
    inputs[0][:, vocabulary // 3] = inputs[0].amax(1) + 1.0
    values, gradient = differentiated(name, *inputs)
    assert gradient.dtype == kinds[0]
    logits, labels, other = inputs[0].double().requires_grad_(), inputs[1], inputs[2].double()
    textbook = {
        "kl_divergence": lambda row: reference.kl_divergence(logits[row], other[row]),
        "uniform": lambda row: reference.uniform(logits[row]),
        "undial": lambda row: reference.undial(logits[row], int(labels[row]), other[row], 10.0),
        "ceu": lambda row: token_losses.ceu(logits[row], int(labels[row])),
        "inverted_hinge": lambda row: token_losses.inverted_hinge(logits[row], int(labels[row])),
    }[name]
    counts = [row for row in range(6) if name in ("kl_divergence", "uniform") or labels[row] >= 0]
    expected = torch.stack([textbook(row) if row in counts else torch.zeros(()).double() for row in range(6)])
    (expected * torch.linspace(-1, 2, 6)).sum().backward()
    assert logits.grad is not None
    close(values.double(), expected.detach(), LOSS[F32], scale=expected.detach())
    close(gradient.double(), logits.grad, LOSS[kinds[0]], scale=logits.grad.norm(dim=1, keepdim=True))


@all_names
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_bits_depend_on_nothing_but_the_row(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the number of threads, on other rows, on repetition, or on where in memory a row starts."""
    inputs = rows(2500, (dtype, dtype), 12)
    expected = differentiated(name, *inputs)
    threads = torch.get_num_threads()
    monkeypatch.setattr(_row_kernel, "_A_THREAD", 1)
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            same(differentiated(name, *inputs), expected)
    finally:
        torch.set_num_threads(threads)
    values = ALL[name](*(value[3:5] for value in inputs))
    assert torch.equal(values, expected[0][3:5])
    for start in (1, 2, 3):
        wide = [torch.full((12, 2507), torch.nan, dtype=dtype) for _ in range(2)]
        logits, other = (
            room[:, start : start + 2500].copy_(value) for room, value in zip(wide, inputs[::2], strict=True)
        )
        assert not logits.is_contiguous()
        same(differentiated(name, logits, inputs[1], other), expected)
    logits = inputs[0].clone().requires_grad_()
    loss = ALL[name](logits, *inputs[1:]).sum()
    same(torch.autograd.grad(loss, logits, retain_graph=True), torch.autograd.grad(loss, logits))


@pytest.mark.parametrize("name", ["kl_divergence", "undial"])
def test_gradients_over_the_logits_are_those_on_bare_logits(name: str) -> None:
    logits, labels, other = (value[[0, 1, 2, 3, 5]] for value in rows(1030))
    expected = differentiated(name, logits, labels, other)
    weights = torch.linspace(-1, 2, 5)
    found = (
        divergence_(logits, labels, other, weights)
        if name == "kl_divergence"
        else cross_entropy_(logits, labels, other, weights, beta=10.0)
    )
    same((found, logits), expected)


@all_names
def test_other_layouts_and_hooks_of_saved_tensors_change_nothing(name: str) -> None:
    inputs = rows(40)
    expected = differentiated(name, *inputs)
    transposed = [value.t().contiguous().t() if value.dim() == 2 else value for value in inputs]
    for one, other in zip(differentiated(name, *transposed), expected, strict=True):  # by plain PyTorch
        close(one, other, LOSS[F32])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.t().contiguous().t() if t.dim() == 2 else t):
        same(differentiated(name, *inputs), expected)
    first, second = inputs[0][:1], inputs[2][:1]
    expanded = differentiated(name, first.expand(6, -1), inputs[1], second.expand(6, -1))
    same(expanded, differentiated(name, first.repeat(6, 1), inputs[1], second.repeat(6, 1)))


@all_names
def test_a_default_device_is_no_obstacle(name: str) -> None:
    inputs = rows(40)
    expected = differentiated(name, *inputs)
    with torch.device("meta"):
        same(differentiated(name, *inputs), expected)


def test_what_the_kernel_does_not_take(kernel: Kernel) -> None:
    def taken(logits: Tensor, other: Tensor | None = None) -> bool:
        return _divergence.kernel_for(Compared(logits, other, None, None)) is not None

    class Elsewhere(Tensor):
        """Its numbers may be anywhere."""

    one = torch.zeros(3, 4)
    assert taken(one)
    assert taken(Parameter(one), one.bfloat16())
    assert not taken(torch.zeros(0, 4))
    for value in (one.double(), one.half(), one.to("meta"), one.as_subclass(Elsewhere), torch.zeros(4, 3).t()):
        assert not taken(value)
        assert not taken(one, value)
    lazy = torch.zeros(3, 4, dtype=torch.complex64).conj().imag
    assert lazy.is_neg()
    assert not taken(lazy)


def test_logits_that_change_before_the_backward_pass_are_noticed() -> None:
    logits = torch.zeros(2, 5, requires_grad=True)
    rows = logits * 1.0
    loss = ceu(rows, torch.tensor([0, 1])).sum()
    rows.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_a_hook_for_saved_tensors_gives_back_in_another_type_is_refused() -> None:
    for hook in (Tensor.half, Tensor.double):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: t, lambda t, hook=hook: hook(t) if t.is_floating_point() else t
        ):
            loss = ceu(torch.zeros(2, 5, requires_grad=True), torch.tensor([0, 1])).sum()
        with pytest.raises(RuntimeError, match="has to give back what it was given"):
            loss.backward()


def test_a_default_type_is_no_obstacle(kernel: Kernel) -> None:
    odds = _odds_kernel.built()
    assert not isinstance(odds, str)
    torch.set_default_dtype(torch.float64)
    try:
        _divergence_kernel._check(kernel)
        _odds_kernel._check(odds)
    finally:
        torch.set_default_dtype(torch.float32)


def test_compiled_code_goes_through_plain_pytorch() -> None:
    logits, labels = rows(40)[:2]
    function = torch.compile(lambda rows: ceu(rows, labels).sum(), backend="eager", fullgraph=True)
    expected = differentiated("ceu", logits, labels, logits)
    logits.requires_grad_()
    with backend("eager"):
        eager = torch.autograd.grad(ceu(logits, labels).sum(), logits)
    same(torch.autograd.grad(function(logits), logits), eager)
    assert expected[1].shape == logits.shape


# ---------------------------------------------------------------------------------------------------------------------
# The choice
# ---------------------------------------------------------------------------------------------------------------------


def test_auto_takes_many_logits_only(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    kept = Kernel.measure

    def counted(self: Kernel, compared: Compared, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        taken.append(compared.logits.numel())
        return kept(self, compared, weights)

    reduce = _odds_kernel.Kernel.reduce

    def reduced(self: _odds_kernel.Kernel, logits: Tensor, *others: Any) -> tuple[Tensor, ...]:
        taken.append(-logits.numel())
        return reduce(self, logits, *others)

    monkeypatch.setattr(Kernel, "measure", counted)
    monkeypatch.setattr(_odds_kernel.Kernel, "reduce", reduced)
    monkeypatch.setattr(_backend, "SMALLEST", 30)
    with backend("auto"):
        assert "for 30 or more float32" in repr(backend())
        uniform(torch.zeros(1, 29))
        uniform(torch.zeros(2, 15))
        with backend("eager"):
            uniform(torch.zeros(2, 16))
        uniform(torch.zeros(2, 17))
        for width in (14, 15):
            ceu(torch.zeros(2, width), torch.tensor([0, 1]))
    assert taken == [30, 34, -30]


def test_the_choice_says_itself_and_is_restored() -> None:
    assert "float32 and bfloat16 logits on a CPU, built by" in repr(backend())
    with backend("eager"):
        assert repr(backend()) == "eager: it was chosen"
        with pytest.raises(
            ValueError, match="backend: expected one of 'auto', 'compiled', 'eager', 'triton', or None, found 'x'"
        ):
            backend("x")
    assert backend().name == "compiled"


def test_without_a_compiler_plain_pytorch_runs_and_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(_backend, "SMALLEST", 1)
    _divergence_kernel.built.cache_clear()
    _odds_kernel.built.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"expected the kernels to be built, found that no C\+\+ compiler"):
            backend("compiled")
        with backend("auto") as chosen:
            assert chosen.name == "eager"
            assert uniform(torch.zeros(2, 3)).tolist() == [0.0, 0.0]
            assert not _kernel.usable(torch.zeros(2, 3))
    finally:
        _divergence_kernel.built.cache_clear()
        _odds_kernel.built.cache_clear()


@pytest.mark.parametrize("spoilt", ["values", "gradients"])
def test_a_library_that_computes_wrong_numbers_is_not_used(
    spoilt: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kernel.measure

    def wrong(self: Kernel, compared: Compared, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        values, totals = kept(self, compared, weights)
        (values if spoilt == "values" else compared.logits)[0] += 1e-3
        return values, totals

    monkeypatch.setattr(Kernel, "measure", wrong)
    with pytest.raises(Unavailable, match="the built library computes wrong numbers"):
        _divergence_kernel._check(kernel)


@pytest.mark.parametrize("spoilt", [0, 1, 2, 3, "gradients"])
def test_a_library_of_log_odds_that_computes_wrong_numbers_is_not_used(
    spoilt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    odds = _odds_kernel.built()
    assert not isinstance(odds, str)
    kept, differentiate = _odds_kernel.Kernel.reduce, _odds_kernel.Kernel.gradient_

    def wrong_gradient(self: _odds_kernel.Kernel, *arguments: Any, to: Tensor | None = None) -> None:
        differentiate(self, *arguments, to=to)
        (arguments[0] if to is None else to)[1, 5] += 1e-2

    def wrong(self: _odds_kernel.Kernel, *arguments: Any) -> tuple[Tensor, ...]:
        found = kept(self, *arguments)
        found[spoilt][1] += 1
        return found

    if spoilt == "gradients":
        monkeypatch.setattr(_odds_kernel.Kernel, "gradient_", wrong_gradient)
    else:
        monkeypatch.setattr(_odds_kernel.Kernel, "reduce", wrong)
    with pytest.raises(Unavailable, match="the built library computes wrong numbers"):
        _odds_kernel._check(odds)
