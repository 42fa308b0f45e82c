r"""ULD, unlearning from logit difference: subtract the logits of a small assistant that knows what is to be forgotten.

    l(Y | X) = l_base(Y | X) - weight * l_assistant(Y | X)

The model itself is never trained. The assistant is its first layers with a LoRA adapter, trained on the *reversed* objectives
(`ULDModule`): to remember the forget set, and to be indifferent, uniform over the vocabulary, about everything
else. Where the assistant is uniform its logits are a constant, and subtracting a constant changes no probability.

Source: "Reversing the Forget-Retain Objectives" (Ji et al., NeurIPS 2024, arXiv 2406.08607), equations 2 to 5 and section 3.2.

The functions here need torch alone; `assistant` needs peft, and `LogitDifferenceModel` transformers, both imported when they are used.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradsurgery.logit_difference.shared_layers import first_layers, refuse_to_merge

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["assistant", "logit_difference", "top_logit_mask"]


def top_logit_mask(log_probabilities: Tensor, rate: float) -> Tensor:
    r"""Returns which tokens are likely enough under the base model for the assistant to have a say in them.

    A token stays if its probability is at least `rate` times the highest, or if it is among the `int(rate * V)` best (ties with the
    last of them stay too).

    The authors' code is the same but for `rate * V < 1`, where its index of the k-th best is -1 and nothing is filtered; here only the
    first condition counts then, and the best token always stays.

    Args:
        log_probabilities: `[..., V]`, log-softmax of the base model's logits.
        rate: in [0, 1]; 0 keeps every token, and so does 1.

    Returns:
        bool, `[..., V]`, True where a token stays. A row with NaN keeps every token, so that the NaN stays visible.

    Raises:
        ValueError: If `rate` is outside [0, 1].

    Example:
        >>> p = torch.tensor([0.6, 0.25, 0.1, 0.05])
        >>> top_logit_mask(p.log(), 0.3)
        tensor([ True,  True, False, False])
        >>> top_logit_mask(p.log(), 0.75)  # the second is below 0.45, and stays as one of the three best
        tensor([ True,  True,  True, False])
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"top_logit_filter: expected a rate between 0 and 1, found {rate}")
    if rate == 0.0:
        return torch.ones_like(log_probabilities, dtype=torch.bool)
    threshold = log_probabilities.amax(-1, keepdim=True) + math.log(rate)
    best = int(rate * log_probabilities.shape[-1])
    if best:
        threshold = torch.minimum(threshold, log_probabilities.topk(best, dim=-1).values[..., -1:])
    return ~(log_probabilities < threshold)


def logit_difference(
    base_logits: Tensor,
    assistant_logits: Tensor,
    weight: float = 0.75,
    top_logit_filter: float = 0.0,
    *,
    generating: bool = False,
) -> Tensor:
    r"""Returns `base - weight * assistant`, with the top-logit filter.

    ULD, equation 2 and section 3.2. Raw logits are subtracted, as in the paper. The authors' code takes the log-softmax of both first
    where there is no filter: that differs by one constant a row, hence in no probability. With a filter the constant matters, because
    kept and filtered tokens meet in one softmax, and both the code and this function subtract raw logits.

    Filtered tokens (see `top_logit_mask`)

    - keep the base logit when scoring. They are not suppressed: the kept ones lose `weight * assistant`, so a rare token can become
      likelier than it was. Likelihoods with a filter are therefore not those of the sampler;
    - get -inf when generating, so that no sampler chooses them (the authors' greedy loop writes -1e3).

    Args:
        base_logits: `[..., V]`, of the model that is to forget.
        assistant_logits: `[..., V]`, of the assistant.
        weight: how much of the assistant is subtracted. Paper: 0.75 on TOFU, 0.5 on Harry Potter; the authors' code stores it negative
            and adds it (-0.8 in its TOFU script).
        top_logit_filter: rate of `top_logit_mask`; 0 is no filter. Paper: 0.01 (the authors' evaluation runs with 0.1).
        generating: what filtered tokens get.

    Returns:
        `[..., V]`, in float32 (float64 if one of the two is).

    Raises:
        ValueError: If the shapes differ, the weight is negative, or the filter's rate is outside [0, 1].

    Example:
        >>> base, assistant = torch.tensor([2.0, 1.0, -3.0]), torch.tensor([4.0, 0.0, 0.0])
        >>> logit_difference(base, assistant, weight=0.5)
        tensor([ 0.,  1., -3.])
        >>> logit_difference(base, assistant, weight=0.5, top_logit_filter=0.1, generating=True)
        tensor([0., 1., -inf])
    """
    if base_logits.shape != assistant_logits.shape:
        raise ValueError(
            f"expected base and assistant logits of one shape, found {list(base_logits.shape)} and "
            f"{list(assistant_logits.shape)}: both models need the same vocabulary and the same tokens"
        )
    _check_weight(weight)
    # bfloat16 logits of 20 are known to 0.06 only: their difference would be rounding.
    dtype = torch.promote_types(torch.promote_types(base_logits.dtype, assistant_logits.dtype), torch.float32)
    base = base_logits.to(dtype)
    difference = base - weight * assistant_logits.to(dtype)
    kept = top_logit_mask(base.log_softmax(-1), top_logit_filter) if top_logit_filter else None
    if kept is None:
        return difference
    return torch.where(kept, difference, base.new_tensor(-torch.inf) if generating else base)


def assistant(
    model: nn.Module, num_layers: int = 8, lora_rank: int = 32, *, lora_alpha: float = 32.0, lora_dropout: float = 0.0
) -> PeftModel:
    r"""Returns ULD's assistant: the model's embeddings, first layers, final norm and head, frozen, and a trainable LoRA adapter.

    The frozen weights are the model's own storage, not copies: the assistant takes no memory but its adapter's. The model is untouched
    (its parameters, gradients, `requires_grad`, mode and config), and nothing that trains the assistant can change it. What *would*
    write into the shared storage, merging the adapter, is refused.

    The adapter (B = 0 at the start, hence without effect) is on every linear layer but the head. Paper: rank 32, alpha 32; the
    authors' code: rank 16, alpha 32, dropout 0.05. Its first weights are drawn from torch's generator.

    Args:
        model: a Transformers causal language model whose backbone (`model.base_model`) has its decoder layers in `layers` or `h`:
            Llama and all that look like it, GPT-2.
        num_layers: how many of them, K. Paper: 8 of the 32 of Llama-2-7B.
        lora_rank: rank r of the adapter, r * (inputs + outputs) weights a linear layer.
        lora_alpha: the adapter's output is scaled by alpha / rank.
        lora_dropout: on the adapter's input.

    Returns:
        A `peft.PeftModel` that is called like a causal language model.

    Raises:
        ValueError: If `num_layers` or `lora_rank` is not positive, or the model has fewer layers.
        TypeError: If the layers cannot be found, or the model is quantized or has an adapter of its own.
        ImportError: Without peft.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> small = assistant(model, num_layers=1, lora_rank=2)
        >>> sum(p.numel() for p in small.parameters() if p.requires_grad)  # seven linear layers, rank 2, 8 in and 8 out
        224
        >>> small.get_base_model().lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
        True
    """
    if lora_rank < 1:
        raise ValueError(f"lora_rank: expected a rank of at least 1, found {lora_rank}")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(
            f"logit_difference.assistant needs peft ({error}): pip install 'gradsurgery[lightning]'"
        ) from error
    config = LoraConfig(
        r=lora_rank,
        lora_alpha=lora_alpha,  # pyright: ignore[reportArgumentType] (any number will do)
        lora_dropout=lora_dropout,
        target_modules="all-linear",  # which in peft leaves the head out
        task_type="CAUSAL_LM",
    )
    adapted: Any = get_peft_model(first_layers(model, num_layers), config)
    # A loader that goes by the adapter's own config would put it on the whole model: this name stops it, and says why.
    config.base_model_name_or_path = (
        f"the first {num_layers} layers of ../base: load the parent folder with gradsurgery.logit_difference"
    )
    refuse_to_merge(adapted)
    return adapted


def _check_weight(weight: float) -> None:
    if not (weight >= 0.0 and math.isfinite(weight)):
        raise ValueError(
            f"weight: expected a finite number >= 0, found {weight}: the assistant's logits are subtracted (the authors' code stores the "
            "weight negative and adds it)"
        )
