r"""ULD, unlearning from logit difference: subtract the logits of a small assistant that knows what is to be forgotten.

    l(Y | X) = l_base(Y | X) - weight * l_assistant(Y | X)

The model itself is never trained. The assistant is its first layers with a LoRA adapter, trained on the *reversed* objectives
(`ULDModule`): to remember the forget set, and to be indifferent, uniform over the vocabulary, about everything
else. Where the assistant is uniform its logits are a constant, and subtracting a constant changes no probability.

Source: "Reversing the Forget-Retain Objectives" (Ji et al., NeurIPS 2024, arXiv 2406.08607), equations 2 to 5 and section 3.2.

The functions here need torch alone; `assistant` needs peft, and `LogitDifferenceModel` transformers, both imported when they are used.
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
    return LogitDifferenceModel
