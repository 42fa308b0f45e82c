"""ULD, unlearning from logit difference: subtract the logits of a small assistant that knows what is to be forgotten.

    l(Y | X) = l_base(Y | X) - weight * l_assistant(Y | X)

The model itself is never trained. The assistant is its first layers with a LoRA adapter, trained on the *reversed*
objectives: to remember the forget set, and to be indifferent about everything else, that is, uniform over the
vocabulary. Where the assistant is uniform its logits are a constant, and subtracting a constant changes no probability.

- `assistant` builds the assistant. The Lightning modules' ``ULDModule`` trains it; ``gradsurgery unlearn --method uld``
  does the whole of it.
- `LogitDifferenceModel` is the two models as one. It scores and generates (greedy, sampling and beams, with two
  caches), and is saved and loaded as one model.
- `logit_difference` and `top_logit_mask` are the formulas.

Inference costs both models. With a filter, likelihoods are not those of the sampler: see `logit_difference`.

Source: "Reversing the Forget-Retain Objectives" (Ji et al., NeurIPS 2024,
[2406.08607](https://arxiv.org/abs/2406.08607)), equations 2 to 5 and section 3.2.

The formulas need torch alone; `assistant` needs peft, and `LogitDifferenceModel` needs transformers. Both are imported
when they are used.

Example:
    >>> import gradsurgery as gs, torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2)
    >>> base = LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=None)).eval()
    >>> small = gs.logit_difference.assistant(base, num_layers=1, lora_rank=2)  # to be trained on the forget set
    >>> model = gs.logit_difference.LogitDifferenceModel(base, small, weight=0.75)
    >>> model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).shape
    torch.Size([1, 7])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradsurgery.logit_difference.assistant import assistant
from gradsurgery.logit_difference.logits import logit_difference, top_logit_mask

if TYPE_CHECKING:
    from gradsurgery.logit_difference.model import LogitDifferenceModel

__all__ = ["LogitDifferenceModel", "assistant", "logit_difference", "top_logit_mask"]


def __getattr__(name: str) -> Any:
    if name != "LogitDifferenceModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from gradsurgery.logit_difference.model import LogitDifferenceModel
    except ImportError as error:
        raise ImportError(
            f"LogitDifferenceModel needs transformers ({error}): pip install 'gradsurgery[lightning]'"
        ) from error
    globals()[name] = LogitDifferenceModel  # from now on an ordinary name
    return LogitDifferenceModel
