"""The relearning attacks: what is taught to a copy of the model, for how long, and how fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_modules.training.callbacks.relearn_probe import RelearnSettings


@dataclass(frozen=True)
class RelearningAttack:
    """One attack.

    Attributes:
        lessons: What is taught: a share of the forget answers, retain answers, or general knowledge.
        settings: For how long, and how fast.
    """

    lessons: Literal["forget", "retain", "general"]
    settings: RelearnSettings


# name: lessons, steps, learning rates of the small Llama from scratch and of any other model, rank of the adapters.
_TABLE: dict[str, tuple[Literal["forget", "retain", "general"], int, float, float, int]] = {
    "relearn": ("forget", 20, 5e-5, 2e-5, 0),
    "relearn_strong": ("forget", 100, 1e-4, 5e-5, 0),
    "relearn_harsh": ("forget", 200, 3e-4, 1e-4, 0),
    "relearn_lora": ("forget", 100, 1e-3, 2e-4, 16),
    "relearn_general": ("general", 100, 1e-4, 5e-5, 0),
    "relearn_retain": ("retain", 100, 1e-4, 5e-5, 0),
}


def relearning_attacks(*, scratch: bool, batch_size: int = 8, seed: int = 0) -> dict[str, RelearningAttack]:
    """Returns the attacks by name, from mild to harsh, then those that teach adapters or something else.

    | name | lessons | steps | learning rate, from scratch | of a pre-trained model |
    |---|---|--:|--:|--:|
    | `relearn` (mild) | a quarter of the forget answers | 20 | 5e-5 | 2e-5 |
    | `relearn_strong` | the same | 100 | 1e-4 | 5e-5 |
    | `relearn_harsh` | the same | 200 | 3e-4 | 1e-4 |
    | `relearn_lora` | the same, to LoRA of rank 16 | 100 | 1e-3 | 2e-4 |
    | `relearn_general` ("benign") | 40 questions of general knowledge | 100 | 1e-4 | 5e-5 |
    | `relearn_retain` | retain answers | 100 | 1e-4 | 5e-5 |

    A model trained from scratch is small and takes larger steps. Published attacks on pre-trained models use AdamW at
    1e-5 to 2e-5, and 2e-4 with LoRA (2406.13356, 2408.00761, 2409.18025): "mild" is one of those, "harsh" five times as
    fast and ten times as long. None depends on how the model was made to forget.

    Args:
        scratch: Whether it is the small Llama from scratch.
        batch_size: Examples a step.
        seed: Of the order of the batches, and of the adapters.
    """
    return {
        name: RelearningAttack(
            lessons,
            RelearnSettings(
                steps=steps,
                every=max(1, steps // 5),
                lr=small if scratch else other,
                batch_size=batch_size,
                seed=seed,
                lora_rank=rank,
            ),
        )
        for name, (lessons, steps, small, other, rank) in _TABLE.items()
    }
