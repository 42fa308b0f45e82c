"""Oracles of the probes: enumerations and loops that follow the definitions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor


def expected_best(scores: Sequence[float], k: int) -> float:
    """The mean of the best over every choice of k of the scores."""
    best = [max(chosen) for chosen in combinations(scores, k)]
    return sum(best) / len(best)


def llama_lens(model: Any, tokens: Sequence[int], labels: Sequence[int]) -> list[float]:
    """exp(-nll) of the labelled tokens read off after every layer of a Llama, whose layers are run by hand."""
    body = model.model
    ids = torch.tensor([tokens])
    hidden = body.embed_tokens(ids)
    places = torch.arange(len(tokens))[None]
    rotary = body.rotary_emb(hidden, places)
    mask = torch.full((len(tokens), len(tokens)), -math.inf).triu(1)[None, None]
    states = [hidden]
    for layer in body.layers:
        out = layer(states[-1], attention_mask=mask, position_ids=places, position_embeddings=rotary)
        states.append(out[0] if isinstance(out, tuple) else out)
    return [_probability(model.lm_head(body.norm(state))[0], labels) for state in states]


def _probability(logits: Tensor, labels: Sequence[int]) -> float:
    logs = [
        float(torch.log_softmax(logits[place - 1].double(), 0)[label])
        for place, label in enumerate(labels)
        if place and label != -100
    ]
    return math.exp(sum(logs) / len(logs))
