"""How much more each weight matters to the forget set than to the retain set: a ratio of diagonal Fisher matrices."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradsurgery.losses import IGNORED, answer_tokens, cross_entropy

Batches = Iterable[Mapping[str, Tensor]]


def fisher_importance(
    model: nn.Module,
    forget_batches: Batches,
    retain_batches: Batches,
    eps: float = 1e-5,
    *,
    per: Literal["batch", "example"] = "batch",
    parts: int = 1,
    modules: Callable[[str], bool] | None = None,
) -> dict[str, Tensor]:
    r"""The importance of every linear weight for the forget set, relative to the retain set: the weights of `fila_`.

    $$I = \frac{F_f}{F_r + \epsilon}, \qquad F = \frac{\sum_b n_b \, g_b \odot g_b}{\sum_b n_b}$$

    where $g_b$ is the gradient of the mean cross-entropy over the $n_b$ answer tokens of batch b. F is
    the diagonal of the empirical Fisher matrix, of *averaged* gradients. It depends on the batch size, because
    gradients inside a batch cancel; with ``per="example"`` it does not. Note that $\epsilon$ is large beside
    the $F_r$ of a large model, which is 1e-8 or less: the ratio is then $F_f$ times a constant.

    The model is left as it was: parameters, ``.grad``, ``requires_grad``, every module's mode, and the global random
    state. A training run is the same with and without this call.

    Source: LoKU (2408.06621), FILA. The authors' batches hold 2 or 4 examples, with as many retain as forget batches.
    Differences from their code: squares and sums are in float32, theirs in the gradient's own type; no dropout.

    Args:
        model: A causal language model, plain or a ``PeftModel``, called with `input_ids` and `attention_mask`, in any
            floating type.
        forget_batches: Mappings with `input_ids`, `attention_mask` and `labels` (-100 on prompt and padding, not
            shifted), ``[B, T]``. Any iterable, also a generator: it is read once.
        retain_batches: The same for the retain set, as many or not.
        eps: Added to the retain side, > 0.
        per: "batch" as the authors' code, or "example": g is the gradient of each sequence alone, at B backward
            passes a batch.
        parts: A batch is read in so many parts, one after the other, with the memory of one and a further gradient:
            what several processes would do together.
        modules: Plain name of a module -> whether to measure it. None: the modules that have adapters; in a plain model
            every ``nn.Linear`` (and GPT-2's ``Conv1D``) except the output head, as PEFT's "all-linear" chooses.

    Returns:
        ``{"<module>.weight": I}``, float32, in the weight's own shape and on its device, under the plain model's names.

    Raises:
        ValueError: If an argument is outside its domain, there is no batch, no answer token or no module, or a weight
            is not a plain floating-point one (quantised, sharded).
        FloatingPointError: If an importance is not finite.

    Cost: a forward and a backward pass a batch. Memory: two float32 copies of the measured weights, and one gradient
    at a time, because each gradient is squared and freed as soon as it exists.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        >>> def batch(text):
        ...     ids = torch.tensor([text])
        ...     return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> importance = fisher_importance(model, [batch([1, 2, 3])], [batch([4, 5, 6])])
        >>> importance["model.layers.0.mlp.up_proj.weight"].shape
        torch.Size([8, 8])
    """
    if not eps > 0.0:
        raise ValueError(f"eps: expected a number > 0, found {eps}")
    if per not in ("batch", "example"):
        raise ValueError(f"per: expected 'batch' or 'example', found {per!r}")
    if parts < 1:
        raise ValueError(f"parts: expected at least 1, found {parts}")
    divided = _examples if per == "example" else lambda batch: [batch]
    weights = _weights(model, modules)
    with _only(model, weights.values()):
        forget = _fisher(model, weights, forget_batches, divided, parts, "forget_batches")
        retain = _fisher(model, weights, retain_batches, divided, parts, "retain_batches")
    importance = {name: forget.pop(name).div_(retain.pop(name).add_(eps)) for name in weights}
    wrong = [name for name, values in importance.items() if not bool(values.isfinite().all())]
    if wrong:
        raise FloatingPointError(
            f"expected finite importances, found NaN or infinity in {len(wrong)} of {len(importance)} weights, {wrong[0]} the first; "
            "check the model's loss on these batches, and use bfloat16 or float32 instead of float16"
        )
    return importance


def is_plain(weight: Any) -> bool:
    """Whether a weight is an ordinary floating-point parameter: not quantised, sharded, parametrised or meta."""
    return (
        isinstance(weight, nn.Parameter)
        and type(weight.data) is Tensor
        and weight.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        and not weight.is_meta
    )


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by one matrix: ``nn.Linear``, or GPT-2's ``Conv1D``, whose matrix is transposed."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _weights(model: nn.Module, modules: Callable[[str], bool] | None) -> dict[str, nn.Parameter]:
    core: Any = model.get_base_model() if hasattr(model, "peft_config") else model  # pyright: ignore[reportCallIssue]
    head = core.get_output_embeddings() if hasattr(core, "get_output_embeddings") else None
    adapted = {name for name, module in core.named_modules() if _adapted(module)}
    found: dict[str, nn.Parameter] = {}
    for name, module in core.named_modules():
        plain_name = _plain(name, core)
        if plain_name is None:
            continue
        inside = any(name.startswith(f"{layer}.") for layer in _parents(name) & adapted)
        if not is_linear(module) or (inside and plain_name == name):
            continue  # the small matrices of an adapter
        chosen = modules(plain_name) if modules else plain_name in adapted if adapted else module is not head
        if not chosen:
            continue
        weight: Any = module.weight
        if not is_plain(weight):
            raise ValueError(
                f"expected a plain floating-point weight in {plain_name}, found {type(weight).__name__} of {weight.dtype}; measure "
                "the model before it is quantised or sharded, or leave the module out with modules="
            )
        found[f"{plain_name}.weight"] = weight
    if not found:
        raise ValueError(
            f"expected a model with linear modules to measure, found none chosen in {type(core).__name__}; see modules="
        )
    return found


def _plain(name: str, core: nn.Module) -> str | None:
    """The module's name in the plain model; None for the copy that PEFT's `modules_to_save` does not use now."""
    owner, marker, rest = name.partition(".modules_to_save.")
    adapter, _, rest = rest.partition(".")
    if not marker:
        owner, marker, rest = name.partition(".original_module")
        rest = rest.removeprefix(".")
    wrapper = core.get_submodule(owner) if marker else None
    if not hasattr(wrapper, "modules_to_save"):
        return name.removesuffix(".base_layer")
    used = list(getattr(wrapper, "active_adapters", ()))
    if used != ([adapter] if adapter else []):
        return None
    return f"{owner}.{rest}" if rest else owner


def _adapted(module: nn.Module) -> bool:
    return hasattr(module, "base_layer") and hasattr(module, "lora_A")


def _parents(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:number]) for number in range(1, len(parts))}


@contextmanager
def _only(model: nn.Module, weights: Iterable[nn.Parameter]) -> Generator[None]:
    """Switch to evaluation mode and to gradients for these weights only; restore everything afterwards."""
    weights = list(weights)
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    gradients = [(weight, weight.grad) for weight in weights]
    devices = sorted({weight.device.index for weight in weights if weight.device.type == "cuda"})
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
            weight.grad = None
        # A DataLoader draws its seed from the global generator: without the fork, training would draw other numbers.
        with torch.random.fork_rng(devices), torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for weight, gradient in gradients:
            weight.grad = gradient


def _fisher(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Batches,
    divided: Callable[[Mapping[str, Tensor]], Sequence[Mapping[str, Tensor]]],
    parts: int,
    argument: str,
) -> dict[str, Tensor]:
    """The sum of n g^2 divided by the sum of n, over everything that batches are divided into."""
    # By weight and not by name: of two modules that share one, two hooks would find its gradient once.
    sums = {weight: torch.zeros_like(weight, dtype=torch.float32) for weight in weights.values()}
    tokens, number = 0, 0

    def square(total: Tensor) -> Callable[[Tensor], None]:
        def add(weight: Tensor) -> None:
            if weight.grad is not None and whole:
                gradient = weight.grad.float()
                total.addcmul_(gradient, gradient, value=count)
                weight.grad = None

        return add

    count, whole = 0, True
    squares = {weight: square(total) for weight, total in sums.items()}
    handles = [weight.register_post_accumulate_grad_hook(add) for weight, add in squares.items()]
    try:
        for batch in batches:
            number += 1
            for rows in divided(batch):
                counted = [(part, _count(part)) for part in _parts(rows, parts)]
                counted = [(part, found) for part, found in counted if found]
                count = sum(found for _, found in counted)
                tokens += count
                for place, (part, found) in enumerate(counted, start=1):
                    whole = place == len(counted)  # before that the gradient is that of some of the rows
                    (_loss(model, part) * (found / count)).backward()
                for weight, add in squares.items():
                    add(weight)  # of a weight that the last rows do not reach, such as an expert's
    finally:
        for handle in handles:
            handle.remove()
    if not tokens:
        raise ValueError(
            f"{argument}: expected at least one batch with answer tokens (labels that are not -100), found {number} batches with "
            "none; a generator can be read only once"
        )
    first: dict[nn.Parameter, str] = {}
    for name, weight in weights.items():
        if first.setdefault(weight, name) == name:
            sums[weight].div_(tokens)
    return {name: sums[weight] if first[weight] == name else sums[weight].clone() for name, weight in weights.items()}


def _examples(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    return _parts(batch, len(batch["labels"]))


def _parts(batch: Mapping[str, Tensor], number: int) -> list[dict[str, Tensor]]:
    """The rows of a batch as processes share them: every n-th."""
    return [{key: batch[key][first::number] for key in batch} for first in range(min(number, len(batch["labels"])))]


def _count(batch: Mapping[str, Tensor]) -> int:
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def _loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    device = next(model.parameters()).device
    inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
    return cross_entropy(*answer_tokens(model(**inputs).logits, batch["labels"].to(device))).mean()
