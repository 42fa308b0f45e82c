"""The settings of ULD, without torch: the command line shows them before it is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_modules.training.adapter_settings import ALL_LINEAR


@dataclass(frozen=True)
class ULDSettings:
    """How `uld.train_assistant` trains and subtracts.

    The defaults are the paper's for TOFU (section 3.2 and appendix B.5).

    Attributes:
        num_layers: Layers of the base that the assistant shares, K. Paper: 8 of the 32 of Llama-2-7B.
        lora_rank: Rank of its adapter. Paper: 32; the authors' code: 16.
        lora_alpha: The adapter's output is scaled by alpha / rank. Paper and authors' code: 32.
        retain_weight: Beta of `uld.ULDModule`. Paper: 6.5; the authors' code: 5.
        weight: How much of the assistant's logits is subtracted. Paper: 0.75 on TOFU, 0.5 on Harry Potter; the authors'
            code stores it negative and adds it (-0.8 in its TOFU script).
        top_logit_filter: Rate of `gradsurgery.logit_difference.top_logit_mask`, 0 for no filter. Paper: 0.01; the
            authors' evaluation runs with 0.1.
        lr: AdamW's highest learning rate. Paper: 1e-3 on TOFU, 5e-4 on Harry Potter; the authors' code: 1e-3 and 1e-5.
        weight_decay: AdamW's. Paper and authors' code: 0.01.
        warmup_steps: Steps over which the learning rate rises. Paper: none is mentioned; the authors' code: 10 % of
            training.
        epochs: Passes over D'_f. Paper: 10 on TOFU, 5 on Harry Potter; the authors' code: 10.
        batch_size: Examples of D'_f and of D'_r, a step and process. Paper: 32; the authors' code: 8, two of them
            accumulated, on two GPUs.
        max_length: Tokens an example; longer ones lose their end. None keeps everything.
        perturbed_per_row: Wrong answers that are used of each forget question, see `uld_data`. Paper: 2.
        require_augmentation: Whether a forget example without paraphrase or wrong answers is an error, see `uld_data`.
        all_positions: Whether the uniform term counts every position, see `uld.ULDModule`. The authors' code: True.
        seed: Of the adapter's first weights and of the order of the data.
        lora_targets: Modules with an adapter, see `adapters.AdapterSettings`. Paper and authors' code: every linear
            layer.
        lora_dropout: On the adapter's input while training. Paper: none is mentioned; the authors' code: 0.05.
    """

    num_layers: int = 8
    lora_rank: int = 32
    lora_alpha: float = 32.0
    retain_weight: float = 6.5
    weight: float = 0.75
    top_logit_filter: float = 0.01
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup_steps: int = 0
    epochs: int = 10
    batch_size: int = 32
    max_length: int | None = None
    perturbed_per_row: int = 2
    require_augmentation: bool = True
    all_positions: bool = False
    seed: int = 0
    lora_targets: str | Sequence[str] = ALL_LINEAR
    lora_dropout: float = 0.0


OF_THE_PAPER = ULDSettings()
"""The defaults."""
