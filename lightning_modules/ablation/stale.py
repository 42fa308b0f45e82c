"""Stale retain data: what training sees of the retain set, where it is not what is scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_modules.ablation.grid import Run
from lightning_modules.data.examples import Example, answered
from lightning_modules.data.order import permutation
from lightning_modules.data.pairs import DataSettings, ForgetRetainDataModule
from lightning_modules.data.substitutes import substituted
from lightning_modules.run.loading import make_data


def training_data(run: Run, tokenizer: Any) -> ForgetRetainDataModule:
    """What a method trains on: the data of the grid, with as many stale retain answers as it says.

    Args:
        run: Of the method; its data seed decides which answers are stale.
        tokenizer: Of the model.
    """
    data = make_data(run.options(), tokenizer)
    if not run.grid.data.stale_share:
        return data
    splits = data.read()
    retain = outdated(splits["retain"], run.grid.data.stale_share, run.data_seed)
    settings: Any = {name: getattr(data, name) for name in (*DataSettings.__annotations__, "max_length")}
    return ForgetRetainDataModule(splits["forget"], retain, tokenizer, **settings)


def outdated(retain: Sequence[Example], share: float, seed: int) -> list[Example]:
    """A retain set in which a share of the answers is that of the most similar other question.

    Such an answer has the form that the question asks for, and is wrong: the model knows another one.

    Args:
        retain: m examples.
        share: Of the examples that have another answer, above 0 and up to 1.
        seed: Decides which.

    Returns:
        m examples in the same order.

    Raises:
        ValueError: If there are no other answers.

    Example:
        >>> retain = [{"question": "Where was Ada born?", "answer": "In Ros."}]
        >>> retain += [{"question": "Where was Bo born?", "answer": "In Pel."}]
        >>> [row["answer"] for row in outdated(retain, 1.0, seed=0)]
        ['In Pel.', 'In Ros.']
    """
    stale = set(permutation(len(retain), seed, "stale", 0)[: round(share * len(retain))])
    others = substituted([retain[place] for place in sorted(stale)], retain, 1)
    found = list(retain)
    for place, rows in zip(sorted(stale), others, strict=True):
        found[place] = answered(retain[place], rows[0]["answer"])
    return found
