"""A plan of deletion requests that wait: what each is to the model, to retention and to the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import gradsurgery as gs
from lightning_modules.data.examples import Example
from lightning_modules.data.tokenization import Encoded
from lightning_modules.ledger.request import hashes_of
from lightning_modules.ledger.sketch import request_gradient
from lightning_modules.ledger.together import after_surgery, cosines, groups, saved, steps
from lightning_modules.progress import Stage
from lightning_modules.training.probability import mean_probabilities


def gram_of(
    model: nn.Module,
    requests: Mapping[str, Sequence[Encoded]],
    retain: Sequence[Encoded],
    *,
    pad_token_id: int,
    batch_size: int,
) -> Tensor:
    """The Gram matrix of the requests' gradients and, as the last row, retention's, `[K + 1, K + 1]`, in float64.

    A request's is that of the mean over its answer tokens of CE-U, which forgetting descends by default; retention's is
    that of the mean negative log-likelihood.

    Raises:
        ValueError: If a gradient is not finite; the message names whose.

    Cost: a forward and a backward pass over all rows; K + 1 gradients on the CPU in the type of the weights (10
    requests to a model of 1 B parameters in bfloat16: 22 GB), and while one is computed its sum in float32, beside the
    model. Where that is too much, plan fewer requests at a time.
    """
    stage = Stage("Gradients of requests", len(requests) + 1)
    types = {name: weight.dtype for name, weight in model.named_parameters()}
    kept: list[list[Tensor]] = []
    for name, rows in [*requests.items(), ("", retain)]:
        kind: dict[str, Any] = {} if name else {"loss": gs.losses.cross_entropy, "skip_first": 0}
        found = request_gradient(model, rows, pad_token_id=pad_token_id, batch_size=batch_size, **kind)
        kept.append([gradient.to("cpu", types[key]) for key, gradient in found.items()])
        if not all(bool(part.isfinite().all()) for part in kept[-1]):
            whose = f"request {name!r}" if name else "the retain rows"
            raise ValueError(
                f"{whose}: expected a gradient of finite numbers, found NaN or infinity: the model is damaged, or --dtype is too narrow"
            )
        stage.advance(1)
    return gs.gram.gram(kept)


def plan_of(
    gram: Tensor,
    requests: Mapping[str, Sequence[Example]],
    retain: Sequence[Example],
    known: Sequence[float],
    level: float,
) -> dict[str, Any]:
    """What plan.json holds; no text of the rows.

    A request that the model does not know is a group of its own: there is nothing to forget. Two that share a row are
    in different groups, because one run does not take both.

    Args:
        gram: From `gram_of`.
        requests: Name -> rows.
        retain: All rows to keep.
        known: The mean probability of each request's answers.
        level: At most this much is not known.
    """
    names = list(requests)
    hashes = [hashes_of(rows) for rows in requests.values()]
    different, kept = [set(found["rows"]) for found in hashes], set(hashes_of(retain)["rows"])
    cosine, after = cosines(gram), cosines(after_surgery(gram))
    count = len(names)
    alone = [not probability > level for probability in known]

    def may_join(one: int, other: int) -> bool:
        return not (alone[one] or alone[other] or different[one] & different[other])

    return {
        "version": 1,
        "level": level,
        "requests": [
            {
                "id": name,
                "sha256": hashes[place]["sha256"],
                "rows": len(requests[name]),
                "probability": known[place],
                "known": not alone[place],
                "retain_cosine": float(cosine[place, count]),
                "in_retain": len(different[place] & kept),
                "shared": {
                    names[other]: len(common)
                    for other in range(count)
                    if other != place and (common := different[place] & different[other])
                },
            }
            for place, name in enumerate(names)
        ],
        "cosines": cosine[:count, :count].tolist(),
        "cosines_after_surgery": after.tolist(),
        "saved_by_pair": [[None if i == j else saved(after, [i, j]) for j in range(count)] for i in range(count)],
        "groups": [
            {
                "requests": [names[place] for place in group],
                "steps": steps(after, group),
                "saved": saved(after, group),
            }
            for group in groups(after, may_join)
        ],
        "gram": gram.tolist(),
    }


def probabilities(
    model: nn.Module, requests: Mapping[str, Sequence[Encoded]], *, pad_token_id: int, batch_size: int
) -> list[float]:
    """The mean probability of each request's answers."""
    with torch.no_grad():
        found = mean_probabilities(model, requests, pad_token_id=pad_token_id, batch_size=batch_size)
    return list(found.values())


def sentences(plan: Mapping[str, Any]) -> list[str]:
    """What has to be said of some requests, and what the estimate is."""
    said: list[str] = []
    for request in plan["requests"]:
        name, probability = request["id"], request["probability"]
        if not request["known"]:
            said.append(
                f"{name}: the mean probability of its answers is {probability:.3g}, at most {plan['level']:g}: the model does not know it, "
                "and there is nothing to forget"
            )
        if request["in_retain"]:
            said.append(
                f"{name}: {request['in_retain']} of its rows are in the retain set too, with which no run takes it: take them out there"
            )
    seen: set[str] = set()
    for request in plan["requests"]:
        seen.add(request["id"])
        said += [
            f"{request['id']} and {other} share {count} row{'s' * (count > 1)}: one run does not take both; take them out of one"
            for other, count in request["shared"].items()
            if other not in seen
        ]
    said.append(
        "Steps: estimated to first order from the gradients at the start, in those that one request needs alone. It tells requests about "
        "one thing from others, and promises too much: where it was measured, 40 % became 20 %, and 37 % became 6 % (examples/ledger)"
    )
    return said
