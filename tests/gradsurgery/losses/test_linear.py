"""`losses.linear` against the plain loss on logits: value and every gradient, whatever the chunks, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

import gradsurgery as gs
from gradsurgery.losses import Head, Loss, Reference, _chunk
from tests.reference import losses as reference
from tests.tolerances import LINEAR, close

NAMES = list(gs.losses.LOSSES)


def linear(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss: Any,
    bias: Tensor | None = None,
    chunk_size: int | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    reference: Reference | None = None,
    recompute: bool = False,
) -> Tensor:
    """`gs.losses.linear`, with a `Head` only where a weight and a bias do not say it, and a `Loss` only where a call binds something."""
    if reference is not None or recompute:
        loss = Loss.of(gs.losses.as_row_loss(loss), reference, recompute)
    if scale != 1.0 or softcap is not None:
        return gs.losses.linear(hidden, Head(weight, bias, scale, softcap), labels, loss, chunk_size=chunk_size)
    return gs.losses.linear(hidden, weight, labels, loss, bias, chunk_size)


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None


def case(
    tokens: int = 23, width: int = 8, vocabulary: int = 37, *, bias: bool = False, seed: int = 0, masked: float = 0.4
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < masked] = -100
    hidden, weight = (torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (tokens, vocabulary))
    return Case(hidden, weight, labels, torch.randn(vocabulary, dtype=torch.float64) if bias else None)


def both(
    inputs: Case,
    loss: Callable[[Tensor, Tensor], Tensor],
    upstream: Tensor | None,
    dtype: torch.dtype = torch.float64,
    frozen: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    **options: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    """Values and gradients: fused, and by autograd through all logits, which are rounded to the dtype as the product would."""
    found = []
    for fused in (True, False):
        hidden, weight = inputs.hidden.to(dtype).requires_grad_(), inputs.weight.to(dtype).requires_grad_(not frozen)
        bias = None if inputs.bias is None else inputs.bias.to(dtype).requires_grad_()
        if fused:
            values = linear(hidden, weight, inputs.labels, loss, bias, scale=scale, softcap=softcap, **options)
        else:
            logits = functional.linear(hidden, weight, bias).to(
                torch.float64 if dtype == torch.float64 else torch.float32
            )
            logits = logits * scale
            values = loss(logits if softcap is None else softcap * torch.tanh(logits / softcap), inputs.labels)
        (values.sum() if upstream is None else values @ upstream.to(values.dtype)).backward()
        grads = [tensor.grad for tensor in (hidden, weight, bias) if tensor is not None and tensor.requires_grad]
        assert all(grad is not None and grad.dtype == dtype for grad in grads)
        found.append([values.detach(), *grads])
    return found[0], found[1]


def agree(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for one, other in zip(found, expected, strict=True):
        close(one.double(), other.double(), LINEAR[dtype], scale=float(other.double().norm()) + 1e-30)


WEIGHTS = {
    "summed": None,
    "one for each token": torch.linspace(-1, 2, 23),
    "negative and zero": torch.arange(23) % 3 - 1.0,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_plain_loss_in_value_and_gradient(
    name: str, weights: str, frozen: bool, recompute: bool, dtype: torch.dtype
) -> None:
    found, expected = both(
        case(bias=True), gs.losses.by_name(name), WEIGHTS[weights], dtype, frozen, chunk_size=5, recompute=recompute
    )
    agree(found, expected, dtype)


@pytest.mark.parametrize("name", ["ceu", "inverted_hinge"])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_scaled_and_capped_logits(name: str, softcap: float | None, scale: float) -> None:
    for recompute in (False, True):
        found, expected = both(
            case(bias=True), gs.losses.by_name(name), WEIGHTS["one for each token"], scale=scale, softcap=softcap,
            recompute=recompute,
        )  # fmt: skip
        agree(found, expected, torch.float64)


@given(
    tokens=st.integers(0, 40),
    chunk=st.integers(1, 50),
    masked=st.floats(0, 1),
    recompute=st.booleans(),
    frozen=st.booleans(),
)
def test_chunks_change_nothing(tokens: int, chunk: int, masked: float, recompute: bool, frozen: bool) -> None:
    inputs = case(tokens, masked=masked, seed=tokens)
    upstream = torch.linspace(-1, 1, tokens)
    found, expected = both(inputs, gs.losses.ceu, upstream, frozen=frozen, chunk_size=chunk, recompute=recompute)
    agree(found, expected, torch.float64)


MARGINS = {"ordinary": None, "forgotten": -30.0, "nearly certain": 18.0, "certain": 200.0}


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("name", NAMES)
def test_tokens_that_ordinary_arithmetic_loses(name: str, margin: str, offset: float) -> None:
    """With an identity head the hidden states are the logits, and the gradient of a row is known to 250 digits."""
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(6, 11, generator=generator, dtype=torch.float64)
    labels = torch.randint(11, (6,), generator=generator)
    if MARGINS[margin] is not None:
        others = logits.scatter(1, labels[:, None], -torch.inf).amax(1, keepdim=True)
        logits.scatter_(1, labels[:, None], others + MARGINS[margin])
    hidden = (logits + offset).float().requires_grad_()
    values = linear(hidden, torch.eye(11), labels, name)
    upstream = torch.linspace(0.5, 2, 6)
    (values @ upstream).backward()
    for row, label, value, gradient, weight in zip(
        hidden.tolist(), labels.tolist(), values.tolist(), hidden.grad.double(), upstream.tolist(), strict=True
    ):
        expected, expected_row = reference.exact(name, row, label)
        size = 1.0 if name == "inverted_hinge" else abs(expected)
        assert abs(value - expected) <= 2e-5 * max(size, 1e-37)
        wanted = weight * torch.tensor(expected_row, dtype=torch.float64)
        assert (gradient - wanted).norm() <= 2e-5 * wanted.norm() + 2e-38


def test_all_tokens_masked_gives_zeros_and_zero_gradients() -> None:
    inputs = case(masked=1.1, bias=True)
    for recompute in (False, True):
        found, _ = both(inputs, gs.losses.ceu, WEIGHTS["one for each token"], recompute=recompute)
        assert all(not tensor.any() for tensor in found)
        assert found[2].shape == inputs.weight.shape


def test_what_is_masked_may_hold_anything() -> None:
    inputs = case()
    inputs.hidden[inputs.labels == -100] = torch.nan
    hidden, weight = inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()
    linear(hidden, weight, inputs.labels, "ceu").sum().backward()
    assert weight.grad.isfinite().all()
    assert (hidden.grad[inputs.labels == -100] == 0).all()


def test_a_nan_in_a_token_that_counts_is_not_hidden() -> None:
    inputs = case(masked=0.0)
    inputs.hidden[3, 0] = torch.nan
    for name in NAMES:
        hidden = inputs.hidden.clone().requires_grad_()
        values = linear(hidden, inputs.weight, inputs.labels, name)
        values.sum().backward()
        assert values[3].isnan()
        assert hidden.grad[3].isnan().all()
        assert values[[0, 1, 2, 4]].isfinite().all()


def test_options_are_bound_by_partial() -> None:
    loss = partial(gs.losses.satimp, beta1=1.0, beta2=0.5)
    agree(*both(case(), loss, WEIGHTS["one for each token"]), torch.float64)


def test_any_function_of_a_row_is_a_loss() -> None:
    def spread(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.where(labels == -100, 0.0, logits.std(-1) * logits.logsumexp(-1))

    for recompute in (False, True):
        agree(
            *both(case(bias=True), spread, WEIGHTS["one for each token"], recompute=recompute, chunk_size=4),
            torch.float64,
        )


def test_a_custom_loss_of_the_log_odds() -> None:
    @gs.losses.token_loss
    def squared(odds: Tensor, *, power: float = 2.0) -> Tensor:
        return functional.softplus(odds) ** power

    agree(*both(case(), partial(squared, power=1.5), WEIGHTS["one for each token"]), torch.float64)


def test_a_function_that_wraps_a_loss_is_not_taken_for_it() -> None:
    @wraps(gs.losses.ceu)  # copies the attributes of what it wraps
    def doubled(logits: Tensor, labels: Tensor) -> Tensor:
        return 2 * gs.losses.ceu(logits, labels)

    agree(*both(case(bias=True), doubled, None), torch.float64)


def test_a_reference_has_a_scale_and_a_cap_of_its_own() -> None:
    inputs, other = case(masked=0.0), case(seed=9)
    head = Head(other.weight, None, 0.5, 3.0)
    found = linear(inputs.hidden, inputs.weight, inputs.labels, "undial", reference=Reference(other.hidden, head))
    target = 3.0 * torch.tanh(0.5 * other.hidden @ other.weight.T / 3.0)
    expected = gs.losses.undial(inputs.hidden @ inputs.weight.T, inputs.labels, target)
    close(found, expected, LINEAR[torch.float64], scale=float(expected.norm()))


def test_a_description_keeps_what_is_bound_to_it() -> None:
    reference = Reference(torch.zeros(1, 1))
    bound = Loss.of(Loss.of(partial(gs.losses.undial, beta=2.0), reference), recompute=True)
    assert bound.reference is reference
    assert bound.recompute
    assert Loss.of(bound) is bound
    assert gs.losses.as_row_loss(bound) is bound
    assert Loss.of(gs.losses.ceu).reference is None


def test_a_loss_that_does_not_depend_on_the_logits_has_no_gradient() -> None:
    inputs = case()
    for loss in (
        gs.losses.token_loss(lambda odds: torch.ones_like(odds)),
        lambda logits, labels: torch.ones(len(labels)),
    ):
        hidden = inputs.hidden.clone().requires_grad_()
        linear(hidden, inputs.weight, inputs.labels, loss).sum().backward()
        assert not hidden.grad.any()


REFERENCED = {
    "undial": lambda logits, labels, other: gs.losses.undial(logits, labels, other),
    "kl_divergence": lambda logits, labels, other: gs.losses.kl_divergence(logits, other).where(labels != -100, 0.0),
    "uniform": lambda logits, labels, other: gs.losses.uniform(logits).where(labels != -100, 0.0),
    "logit_margin": lambda logits, labels, other: gs.losses.logit_margin(logits, labels),
}


@pytest.mark.parametrize("own_head", [True, False])
@pytest.mark.parametrize("name", REFERENCED)
def test_losses_of_rows_and_of_a_reference(name: str, own_head: bool) -> None:
    inputs, other = case(bias=True), case(bias=True, seed=9)
    takes = name in ("undial", "kl_divergence")
    own = Head(other.weight, other.bias) if own_head else None
    options: dict[str, Any] = {"reference": Reference(other.hidden, own)} if takes else {}
    head = (other.weight, other.bias) if own_head else (inputs.weight, inputs.bias)
    target = functional.linear(other.hidden, *head)
    results = []
    for fused in (True, False):
        tensors = [tensor.clone().requires_grad_() for tensor in (inputs.hidden, inputs.weight, inputs.bias)]
        if fused:
            values = linear(tensors[0], tensors[1], inputs.labels, name, tensors[2], chunk_size=4, **options)
        else:
            values = REFERENCED[name](functional.linear(*tensors), inputs.labels, target)
        (values @ WEIGHTS["one for each token"].double()).backward()
        results.append([values.detach(), *(tensor.grad for tensor in tensors)])
    agree(*results, torch.float64)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"scale": 0.5, "softcap": 3.0}])
@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("loss", ["kl_divergence", "uniform", "undial", partial(gs.losses.undial, beta=2.0)])
def test_the_gradient_that_a_divergence_makes_itself_is_that_of_autograd(
    loss: Any, near: bool, options: dict[str, float], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, other = case(), case(seed=9)
    if near:  # a small divergence is summed in another way than a large one
        inputs = inputs._replace(hidden=0.05 * inputs.hidden)
        other = other._replace(hidden=inputs.hidden + 0.02 * other.hidden)
    known = loss != "uniform"
    results = []
    for by_itself in (True, False):
        if by_itself:
            monkeypatch.setattr(_chunk, "_differentiated", lambda *_: pytest.fail("went through autograd"))
        else:
            monkeypatch.undo()
            loss = replace(gs.losses.as_row_loss(loss), in_place=None)
        tensors = [tensor.to(dtype).requires_grad_() for tensor in (inputs.hidden, inputs.weight)]
        reference = {"reference": Reference(other.hidden.to(dtype))} if known else {}
        values = linear(*tensors, inputs.labels, loss, chunk_size=5, **reference, **options)
        (values @ WEIGHTS["one for each token"].to(values.dtype)).backward()
        results.append([values.detach(), *(tensor.grad for tensor in tensors)])
    agree(*results, dtype)


def test_what_a_divergence_would_refuse_is_refused_within_linear_too() -> None:
    inputs = case()
    for loss, error in (
        (partial(gs.losses.undial, beta=-1.0), ValueError),
        (partial(gs.losses.kl_divergence, beta=1.0), TypeError),
    ):
        with pytest.raises(error, match="beta"):
            linear(inputs.hidden, inputs.weight, inputs.labels, loss, reference=Reference(inputs.hidden))


def test_a_loss_that_does_not_return_a_value_for_each_token_is_refused() -> None:
    inputs = case()
    with pytest.raises(ValueError, match="one value per token"):
        linear(inputs.hidden, inputs.weight, inputs.labels, lambda logits, labels: logits.sum())


def test_gradcheck() -> None:
    inputs = case(9, 4, 6, bias=True)
    tensors = [tensor.requires_grad_() for tensor in (inputs.hidden, inputs.weight, inputs.bias)]
    for recompute in (False, True):
        assert torch.autograd.gradcheck(
            lambda h, w, b, recompute=recompute: linear(h, w, inputs.labels, "ceu", b, chunk_size=2, recompute=recompute),
            tensors,
        )  # fmt: skip


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("recompute", [False, True])
def test_a_second_backward_through_a_retained_graph_gives_the_same(recompute: bool, weights: str) -> None:
    inputs = case()
    tensors = inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()
    values = linear(*tensors, inputs.labels, "ceu", recompute=recompute)
    upstream = torch.ones(23) if WEIGHTS[weights] is None else WEIGHTS[weights]
    loss = values @ upstream.double()
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    again = torch.autograd.grad(3 * loss, tensors, retain_graph=True)
    for one, other in zip(first, again, strict=True):
        close(3 * one, other, LINEAR[torch.float64], scale=float(other.norm()))


def test_a_gradient_that_is_changed_in_place_does_not_change_the_next() -> None:
    inputs = case(masked=0.0)
    hidden = inputs.hidden.requires_grad_()
    for weigh in (torch.mean, torch.sum):
        loss = weigh(linear(hidden, inputs.weight, inputs.labels, "ceu"))
        (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
        expected = first.clone()
        first.zero_()
        assert torch.equal(torch.autograd.grad(loss, hidden)[0], expected)


def test_the_weights_gradient_is_not_kept_after_the_backward_pass() -> None:
    for upstream in (torch.full((23,), 1 / 23.0), WEIGHTS["one for each token"]):
        inputs = case()
        values = linear(inputs.hidden.requires_grad_(), inputs.weight.requires_grad_(), inputs.labels, "ceu")
        (values @ upstream.double()).backward()
        assert values.grad_fn.gradients.weight is None


def test_a_second_derivative_is_refused_and_not_dropped() -> None:
    inputs = case()
    loss = linear(inputs.hidden.requires_grad_(), inputs.weight, inputs.labels, "ceu").sum()
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, inputs.hidden, create_graph=True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_none_are_made(mode: Any) -> None:
    inputs = case(200, 64, 300, bias=True)
    tensors = [tensor.clone().requires_grad_() for tensor in (inputs.hidden, inputs.weight, inputs.bias)]
    expected = linear(tensors[0], tensors[1], inputs.labels, "ceu", tensors[2]).detach()
    with mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        found = linear(tensors[0], tensors[1], inputs.labels, "ceu", tensors[2], chunk_size=8)
    close(found.clone(), expected, LINEAR[torch.float64])
    allocated = [event.nbytes() for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max(allocated) < inputs.weight.nbytes


@pytest.mark.parametrize("frozen", [True, False])
def test_activation_checkpointing_sweeps_twice(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradsurgery.losses import _sweep

    calls: list[int] = []
    plain = _sweep._sweep
    monkeypatch.setattr(_sweep, "_sweep", lambda *arguments: calls.append(1) or plain(*arguments))
    inputs = case()
    weight = inputs.weight.requires_grad_(not frozen)
    for loss in ("ceu", lambda logits, labels: logits.logsumexp(-1)):
        calls.clear()
        values = torch.utils.checkpoint.checkpoint(
            lambda h, loss=loss: linear(h.tanh(), weight, inputs.labels, loss),
            inputs.hidden.requires_grad_(),
            use_reentrant=False,
        )
        values.sum().backward()
        assert len(calls) == 2


def test_two_heads_and_a_tied_embedding_add_up() -> None:
    """The weight is also the embedding, and two losses of it are summed, as surgery's two objectives are."""
    inputs = case(masked=0.2)
    grads = []
    for fused in (True, False):
        weight = inputs.weight.clone().requires_grad_()
        hidden = weight[inputs.labels.clamp_min(0)].tanh()
        if fused:
            parts = [linear(hidden, weight, inputs.labels, name) for name in ("ceu", "cross_entropy")]
        else:
            parts = [gs.losses.by_name(name)(hidden @ weight.T, inputs.labels) for name in ("ceu", "cross_entropy")]
        (parts[0].mean() + 2 * parts[1].sum()).backward()
        grads.append(weight.grad)
    close(*grads, LINEAR[torch.float64], scale=float(grads[1].norm()))


def test_under_autocast_products_are_in_its_type_and_gradients_in_the_parameters() -> None:
    inputs = case(bias=True)
    hidden, weight, bias = (tensor.float().requires_grad_() for tensor in (inputs.hidden, inputs.weight, inputs.bias))
    with torch.autocast("cpu", torch.bfloat16):
        values = linear(hidden, weight, inputs.labels, "ceu", bias)
        logits = functional.linear(hidden, weight, bias)
        expected = gs.losses.ceu(logits, inputs.labels)
    assert values.dtype == torch.float32
    grads = torch.autograd.grad(values.sum(), (hidden, weight, bias))
    wanted = torch.autograd.grad(expected.sum(), (hidden, weight, bias))
    assert all(grad.dtype == torch.float32 for grad in grads)
    agree([values.detach(), *grads], [expected.detach(), *wanted], torch.bfloat16)


def test_float16_gradients_are_made_after_the_loss_scale() -> None:
    """A gradient of 1e-9 is 0 in float16; times a loss scale of 2^16 it is not."""
    hidden = torch.zeros(1, 4, dtype=torch.float16)
    hidden[0, 0] = 1
    weight = torch.zeros(8, 4, dtype=torch.float16)
    weight[0, 0] = -20  # p_y of 3e-10
    weight.requires_grad_()
    (linear(hidden, weight, torch.tensor([0]), "ceu") * 2.0**16).sum().backward()
    assert weight.grad[0, 0] > 1e-5


@pytest.mark.parametrize("recompute", [False, True])
def test_activation_checkpointing_and_compiled_callers(recompute: bool) -> None:
    inputs = case()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear(hidden.tanh(), weight, inputs.labels, "ceu", recompute=recompute).sum()

    def gradients(function: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        tensors = [inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()]
        function(*tensors).backward()
        return [tensor.grad for tensor in tensors]

    expected = gradients(loss)
    checkpointed = gradients(lambda h, w: torch.utils.checkpoint.checkpoint(loss, h, w, use_reentrant=False))
    compiled = gradients(torch.compile(loss, backend="eager"))
    for one, other, third in zip(expected, checkpointed, compiled, strict=True):
        assert torch.equal(one, other)
        close(third, one, LINEAR[torch.float64], scale=float(one.norm()))


@pytest.mark.parametrize("trainable", [False, True])
def test_logits_of_all_tokens_are_never_held(trainable: bool) -> None:
    tokens, vocabulary, width = 512, 4096, 8
    hidden, weight = (
        torch.randn(tokens, width).requires_grad_(),
        torch.randn(vocabulary, width).requires_grad_(trainable),
    )
    labels = torch.randint(vocabulary, (tokens,))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        linear(hidden, weight, labels, "ceu", chunk_size=32).mean().backward()
    largest = max(event.nbytes() for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]")
    assert largest <= 32 * vocabulary * 4


def test_a_frozen_head_chooses_64_to_256_rows_and_a_half_precision_one_few_chunks() -> None:
    from gradsurgery.losses._sweep import chunk_rows

    for vocabulary in (50, 32000, 128256, 1_000_000):
        for dtype in (torch.float32, torch.bfloat16):
            weight = torch.empty(vocabulary, 1, dtype=dtype)
            assert 64 <= chunk_rows(weight, trainable=False) <= 256
            assert chunk_rows(weight, trainable=True) * vocabulary * weight.element_size() <= 512 << 20
    assert chunk_rows(torch.empty(128256, 1, dtype=torch.bfloat16), trainable=True) >= 2048
    assert chunk_rows(torch.empty(128256, 1), trainable=False) == 256
    assert chunk_rows(torch.empty(1_000_000, 1), trainable=False) == 64


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"loss": "ceuu"}, ValueError, "ceu"),
        ({"labels": torch.zeros(22, dtype=torch.long)}, ValueError, "labels"),
        ({"labels": torch.zeros(23)}, TypeError, "integers"),
        ({"labels": torch.zeros(23, dtype=torch.uint8)}, TypeError, "signed"),
        ({"labels": torch.full((23,), 37)}, ValueError, "37"),
        ({"labels": torch.full((23,), -1), "loss": "logit_margin"}, ValueError, "-1"),
        ({"loss": "undial"}, ValueError, "reference"),
        ({"reference": Reference(torch.zeros(23, 8, dtype=torch.float64))}, ValueError, "no reference"),
        ({"hidden": torch.zeros(23, 7, dtype=torch.float64)}, ValueError, "hidden"),
        ({"hidden": torch.zeros(2, 23, 8, dtype=torch.float64)}, ValueError, "answer_tokens"),
        ({"hidden": torch.zeros(23, 8)}, TypeError, "one type"),
        ({"bias": torch.zeros(36, dtype=torch.float64)}, ValueError, "bias"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
        ({"softcap": 0.0}, ValueError, "softcap"),
        ({"weight": Head(torch.zeros(37, 8)), "bias": torch.zeros(37)}, ValueError, "beside a Head"),
        ({"loss": "undial", "reference": Reference(torch.zeros(22, 8, dtype=torch.float64))}, ValueError, "reference"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(change: dict[str, Any], error: type[Exception], match: str) -> None:
    inputs = case()
    arguments = {"hidden": inputs.hidden, "weight": inputs.weight, "labels": inputs.labels, "loss": "ceu"} | change
    with pytest.raises(error, match=match):
        linear(**arguments)


def test_a_bias_in_bfloat16_is_rounded_once() -> None:
    """Its gradient is a sum over all chunks, which in bfloat16 stops growing after a few hundred of them."""
    tokens = 2000
    bias = torch.zeros(5, dtype=torch.bfloat16, requires_grad=True)
    hidden, weight = torch.ones(tokens, 2).bfloat16(), torch.zeros(5, 2).bfloat16()
    loss = linear(hidden, weight, torch.zeros(tokens).long(), "cross_entropy", bias=bias, chunk_size=2)
    loss.mean().backward()
    assert bias.grad is not None
    close(bias.grad.float(), torch.tensor([-0.8, 0.2, 0.2, 0.2, 0.2]), LINEAR[torch.bfloat16], scale=0.8)


def test_chunks_of_a_bias_in_bfloat16_that_cancel_are_not_rounded_before() -> None:
    labels = torch.arange(480).gt(240).long()  # 240 tokens of label 0, then one more beside 239 of label 1
    bias = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    hidden, weight = torch.ones(480, 2).bfloat16(), torch.zeros(2, 2).bfloat16()
    linear(hidden, weight, labels, "cross_entropy", bias=bias, chunk_size=240).mean().backward()
    assert bias.grad is not None
    close(bias.grad.float(), torch.tensor([-1.0, 1.0]) / 480, LINEAR[torch.bfloat16], scale=1 / 480)
