"""Every tolerance of the test-suite, with its reason. Tests compare through `close`, and choose none of their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Two numbers agree when they differ by at most ``relative`` times the scale that the test states."""

    relative: float
    reason: str


SAME = Tolerance(
    1e-12, "the same float64 formula in another order of operations, on matrices whose condition is below 1e3"
)
OUT_OF_ORDER = Tolerance(
    1e-9,
    "float64 on badly scaled or dependent rows: a cut-off or a face is met within 1e-12, and amplified by up to 1e3",
)
ILL_CONDITIONED = Tolerance(1e-6, "rows at a cosine of 1 - 1e-9 amplify the rounding of float64 by 1e9")
PSEUDO_INVERSE = Tolerance(
    1e-4, "an eigenvalue of 1e-9 is known to 1e-7 of itself, and weights as large as its inverse cancel"
)
QUADRATIC_PROGRAM = Tolerance(
    1e-9, "the rules accept a solution whose conditions hold to 1e-10, and ease dependent rows by 1e-10"
)
ITERATIVE_ORACLE = Tolerance(
    1e-6, "SLSQP and one-dimensional searches stop near the square root of the float64 rounding"
)
ROUNDED_GRAM = Tolerance(
    3.2e-3, "float32 products are semidefinite up to 1e-7 only; easing by 1e-5 bends a promise by its square root"
)
GRAM: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-14, "products and sums in float64, chunks of at most 2^17"),
    torch.float32: Tolerance(
        1e-6, "products in float32, 2^17 of them summed by torch.dot (1e-7), chunks summed in float64"
    ),
    torch.bfloat16: Tolerance(
        1e-12, "on a CPU products and sums are float64: at most 2^17 roundings of 1.1e-16 a chunk"
    ),
    torch.float16: Tolerance(1e-12, "as bfloat16"),
    torch.complex64: Tolerance(1e-6, "a complex row is its real and imaginary parts, in float32"),
    torch.complex128: Tolerance(1e-14, "a complex row is its real and imaginary parts, in float64"),
}
LARGE_GRAM: dict[torch.dtype, Tolerance] = {
    torch.float32: Tolerance(1e-6, "rounding of a chunk's sum is random in sign, and averages out over 150 chunks"),
    torch.bfloat16: Tolerance(1e-12, "as GRAM, and the chunks' float64 sums add the same again"),
}
KERNEL_GRAM: dict[torch.dtype, Tolerance] = {
    torch.float32: Tolerance(
        1e-7, "float32 sums of 64 products, whose rounding is random in sign; sums of sums in float64"
    ),
    torch.bfloat16: Tolerance(1e-6, "as float32, of products that are exact but whose sums are often ties"),
}
TRITON_GRAM = Tolerance(
    1e-6, "float32 sums of at most 32 products a lane, then over lanes in a tree; sums of chunks in float64"
)
INTERPRETED_BF16 = Tolerance(
    7.9e-3, "as COMBINED, but Triton's interpreter cuts float32 off to 8 bits where a device rounds: 2^-7, and a hair"
)
COMBINED: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-15, "one rounding of float64 (1.1e-16) a row, at most six rows"),
    torch.float32: Tolerance(4e-7, "one rounding of float32 (6e-8) a row, at most six rows"),
    torch.bfloat16: Tolerance(3.92e-3, "float32 arithmetic rounded once to 8 bits: half a unit in the last place, 2^-8, and a hair"),
    torch.float16: Tolerance(4.9e-4, "float32 arithmetic rounded once to 11 bits: half a unit in the last place, 2^-11, and a hair"),
    torch.complex64: Tolerance(4e-7, "as float32, part by part"),
    torch.complex128: Tolerance(1e-15, "as float64, part by part"),
}  # fmt: skip

STEPPED = Tolerance(
    1e-10, "float64 steps of a tiny model on numbers of order 1; twenty steps amplify the rounding by less than 1e5"
)
STEPPED_FLOAT32 = Tolerance(
    2e-5,
    "eight float32 steps of a tiny model on numbers of order 1, each rounding at 6e-8; Adam's first steps amplify most",
)


def off(found: Tensor, expected: Tensor, scale: Tensor | float) -> Tensor:
    """How far ``found`` is off, in units of ``scale``: 0 where both are the same, infinite where either is NaN."""
    difference = (found - expected).abs().double()
    scaled = difference / torch.as_tensor(scale, dtype=torch.float64)
    return torch.where(difference == 0.0, 0.0, scaled).nan_to_num(nan=torch.inf)


def close(
    found: Tensor, expected: Tensor, tolerance: Tolerance, *, scale: Tensor | float = 1.0, names: tuple[str, ...] = ()
) -> None:
    """Assert that ``found`` is ``expected`` within ``tolerance`` of ``scale``; ``names`` label the first dimension in the message."""
    assert found.shape == expected.shape, f"expected shape {list(expected.shape)}, found {list(found.shape)}"
    error = off(found, expected, scale)
    if bool((error <= tolerance.relative).all()):
        return
    worst = error.flatten(1).amax(1) if names else error.reshape(1, -1).amax(1)
    labels = names or ("all",)
    wrong = {
        label: f"{float(value):.1e}"
        for label, value in zip(labels, worst, strict=True)
        if not value <= tolerance.relative
    }
    raise AssertionError(f"off by {wrong}, allowed {tolerance.relative:.1e} ({tolerance.reason})")


LOSS: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(
        1e-12, "a log-odds in float64: rounding of the logits' differences, amplified by their size of up to 200"
    ),
    torch.float32: Tolerance(
        2e-5, "a log-odds in float32: of up to 200, known to 1e-5, and as exact as its exponential"
    ),
    torch.bfloat16: Tolerance(8e-3, "float32 arithmetic, the gradient rounded once to 8 bits"),
    torch.float16: Tolerance(2e-3, "float32 arithmetic, the gradient rounded once to 11 bits"),
}

LINEAR: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-12, "as LOSS, through one more product of at most 40 terms"),
    torch.float32: Tolerance(2e-5, "as LOSS, through one more product of at most 40 terms"),
    torch.bfloat16: Tolerance(1.5e-2, "logits' gradients rounded to 8 bits before the products, and those once more"),
}

AUTOCAST = Tolerance(
    2e-3, "a mean nll of products rounded to 8 bits, 2^-9 each and random in sign; batches and trees round other sums"
)
