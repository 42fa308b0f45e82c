"""Reading the examples to keep into an anchor, which holds the layers of a model in training."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

import gradsurgery as gs
from lightning_modules.data.examples import evenly_spaced
from lightning_modules.data.tokenization import Encoded, collate
from lightning_modules.evaluation.likelihood import device_of, evaluation_mode, on_gpu
from lightning_modules.progress import Stage

WATCHED = 400
"""Examples to keep from whose tokens an anchor knows the inputs of the layers: a few ten thousand tokens."""


def anchored(
    model: nn.Module, strength: float, encoded: Sequence[Encoded], *, pad_token_id: int, batch_size: int = 8
) -> gs.LayerAnchor:
    """An anchor of the model as it is now, which has seen the examples to keep: `WATCHED` of them, evenly spaced.

    Args:
        model: Maps `input_ids` and `attention_mask` to an output. It is read in evaluation mode, on the GPU if there is
            one.
        strength: Of the anchor.
        encoded: Examples to keep.
        pad_token_id: Fills up shorter rows.
        batch_size: Examples in a forward pass.
    """
    anchor, rows = gs.LayerAnchor(model, strength), evenly_spaced(encoded, WATCHED)
    stage = Stage("Reading what is to be kept", len(rows))
    with on_gpu(model), evaluation_mode(model):
        for first in range(0, len(rows), batch_size):
            batch = collate(rows[first : first + batch_size], pad_token_id)
            mask = batch["attention_mask"]
            with anchor.watch(mask):
                model(input_ids=batch["input_ids"].to(device_of(model)), attention_mask=mask.to(device_of(model)))
            stage.advance(len(mask))
        anchor.prepare()  # on the GPU, and where all processes are: trial steps are the first one's alone
    return anchor
