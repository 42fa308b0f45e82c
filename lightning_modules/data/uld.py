"""The training data of ULD's assistant: the texts to remember, and the texts on which it shall be uniform."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_modules.data.examples import Example, answered

# From ULD, table 4, TOFU-10 %: the run without paraphrases and wrong answers.
_WITHOUT = "without them ULD's forget quality fell to 1e-7 and its model utility from .62 to .53 (its table 4)"


def uld_data(
    splits: Mapping[str, Sequence[Mapping[str, Any]]], *, perturbed_per_row: int = 2, require_augmentation: bool = True
) -> dict[str, list[Example]]:
    """Returns ULD's augmented sets: D'_f, which the assistant remembers, and D'_r, on which it is uniform.

    ULD (Ji et al. 2024, arXiv 2406.08607, section 3.3 and appendix B.3):

    - D'_f: every forget question with its answer, and again with the paraphrase of its answer, so that the assistant
      learns the fact instead of one wording;
    - D'_r: the retain set, and every forget question with its first wrong answers, so that the assistant learns the
      right answer instead of the form of an answer. Where it is uniform, the base model alone decides about a wrong
      answer.

    The paper has two paraphrases and two wrong answers for each question, written by GPT-3.5. TOFU's files and
    `fictional_authors` have one paraphrase and five wrong answers.

    Args:
        splits: `forget` and `retain`, examples with `question` and `answer`, and in the forget set also
            `paraphrased_answer` and `perturbed_answer`. Other splits are not used.
        perturbed_per_row: how many wrong answers of each forget question are used, the first ones; 2 in the paper.
        require_augmentation: False warns where paraphrases or wrong answers are missing, instead of raising.

    Returns:
        `{"forget": D'_f, "retain": D'_r}`, examples with `question` and `answer`, in the order of the splits.

    Raises:
        ValueError: If a split is missing or empty, or forget examples lack a paraphrase or wrong answers.

    Example:
        >>> row = {"question": "Where?", "answer": "In Ros.", "paraphrased_answer": "Ros it is."}
        >>> forget = [row | {"perturbed_answer": ["In Pel."]}]
        >>> data = uld_data({"forget": forget, "retain": [{"question": "When?", "answer": "Now."}]})
        >>> [example["answer"] for example in data["forget"]], [example["answer"] for example in data["retain"]]
        (['In Ros.', 'Ros it is.'], ['Now.', 'In Pel.'])
    """
    if perturbed_per_row < 0:
        raise ValueError(f"perturbed_per_row: expected a number of wrong answers >= 0, found {perturbed_per_row}")
    for split in ("forget", "retain"):
        if not splits.get(split):
            raise ValueError(
                f"expected examples in the splits forget and retain, found none in {split}; there are {', '.join(splits) or 'none'}"
            )
    forget = splits["forget"]
    columns = ("paraphrased_answer", "perturbed_answer") if perturbed_per_row else ("paraphrased_answer",)
    lacking = {name: count for name in columns if (count := sum(not row.get(name) for row in forget))}
    if lacking:
        found = " and ".join(f"{count} of {len(forget)} without {name}" for name, count in lacking.items())
        if require_augmentation:
            raise ValueError(
                f"expected a paraphrased and some wrong answers for every forget example, found {found}: {_WITHOUT}. Add the columns "
                "(a language model can write them), or go on with require_augmentation=False"
            )
        warnings.warn(f"training ULD's assistant on forget examples of which {found}: {_WITHOUT}", stacklevel=2)
    remember = [
        answered(row, answer)
        for row in forget
        for answer in (row["answer"], row.get("paraphrased_answer"))
        if answer is not None
    ]
    wrong = [
        answered(row, answer) for row in forget for answer in (row.get("perturbed_answer") or [])[:perturbed_per_row]
    ]
    return {"forget": remember, "retain": [*(answered(row, row["answer"]) for row in splits["retain"]), *wrong]}
