"""What benchmarks ask beside a question and its answer: examples that say themselves how they are scored.

An example with a `task` is scored by that task (`lightning_modules.evaluation.tasks`) instead of by its answer's
likelihood. Its prompt is the benchmark's own text, letter for letter, without a chat template:

- `"continuation"`: what the model says after `prompt`, at most `max_new_tokens` tokens of it and up to one of `stops`,
  is compared with the first `target_tokens` tokens of `answer` (all of it for 0);
- `"choice"`: which of `options` the model thinks the likeliest after `prompt`; `right` is the place of the right one;
- `"membership"`: how familiar `answer`, a text, is to the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from lightning_modules.data.examples import Example

CONTINUATION, CHOICE, MEMBERSHIP = "continuation", "choice", "membership"
TASK = "task"
"""The key of an example that says how it is scored."""

LETTERS = ("A", "B", "C", "D")

Row = TypeVar("Row", bound=Mapping[str, Any])


def apart(splits: Mapping[str, Sequence[Row]]) -> tuple[dict[str, Sequence[Row]], dict[str, Sequence[Row]]]:
    """Returns the splits of questions and answers, and those of tasks.

    Raises:
        ValueError: if a split holds both, or examples of several tasks.

    Example:
        >>> apart({"forget": [{"question": "", "answer": "a"}], "mmlu": [{"task": "choice"}]})[1]
        {'mmlu': [{'task': 'choice'}]}
    """
    kinds = {split: {row.get(TASK) for row in rows} for split, rows in splits.items()}
    if mixed := [split for split, found in kinds.items() if len(found) > 1]:
        raise ValueError(f"expected examples of one task in each split, found several in {', '.join(mixed)}")
    tasks = {split: rows for split, rows in splits.items() if kinds[split] - {None}}
    return {split: rows for split, rows in splits.items() if split not in tasks}, tasks


def multiple_choice(subject: str, question: str, choices: Sequence[str], right: int) -> Example:
    r"""Returns a question of four answers, as lm-evaluation-harness asks it without examples before it.

    The prompt is `The following are multiple choice questions (with answers) about {subject}.\n\n{question}\nA.
    {choice}\nB. {choice}\nC. {choice}\nD. {choice}\nAnswer:`, and the options are ` A`, ` B`, ` C` and ` D`. So do its
    tasks wmdp_bio, wmdp_cyber and mmlu.

    Args:
        subject: what the question is about.
        question: the question; white space around it is taken off.
        choices: the four answers.
        right: the place of the right one, from 0.
    """
    asked = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
    told = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    return {
        "question": question,
        "answer": choices[right],
        TASK: CHOICE,
        "prompt": f"{told}{question.strip()}{asked}\nAnswer:",
        "options": [f" {letter}" for letter in LETTERS],
        "choices": list(choices),
        "right": right,
    }


def prefix_ids(tokenizer: Any, text: str) -> list[int]:
    """Returns the tokens of a benchmark's own text, with the special tokens that the tokenizer puts in front.

    An eos that a tokenizer puts at the end is left out: the text goes on.
    """
    ids = list(tokenizer(text)["input_ids"])
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token)):
        ids.pop()
    return ids
