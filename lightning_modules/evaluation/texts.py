"""From splits to the tokens that are scored and the prompts that are continued; what a limit on them would spoil."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_modules.data.examples import asked
from lightning_modules.data.hashes import hashed
from lightning_modules.data.tokenization import IGNORED, Encoded, encode, encode_example, prompt_ids, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Splits = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Item:
    """An example, and the places of its texts in the list of all texts that are scored.

    Attributes:
        split: the example's split.
        row: the example.
        answer: the place of its answer.
        paraphrase: the place of its paraphrased answer; that of the answer where there is no paraphrase.
        perturbed: the places of its wrong answers.
        target: the text that the generation is compared with.
        spoken: everything that the assistant says in the example, as far as it is scored.
    """

    split: str
    row: Mapping[str, Any]
    answer: int
    paraphrase: int
    perturbed: range
    target: str
    spoken: str


@dataclass
class Texts:
    """What is to be scored.

    Attributes:
        encoded: all texts that get a likelihood.
        prompts: the tokens to continue, one list for each item.
        items: the examples.
    """

    encoded: list[Encoded] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)


def context_length(model: nn.Module) -> int | None:
    """Returns how many tokens a model can read, as its configuration has it; None if that says nothing."""
    config: Any = getattr(model, "config", None)
    return getattr(config, "max_position_embeddings", None)


def texts_of(
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    *,
    max_length: int | None,
    context: int | None = None,
    max_new_tokens: int,
    generate: bool = True,
) -> Texts:
    """Tokenizes everything that `evaluate` scores. Of texts that are cut, a warning says how many there are.

    Another one counts the answers that a generation is too short for: the whole answer is what it is compared with.

    An earlier answer of a conversation with turns counts for the answer's likelihood. The truth ratio compares the last
    answers alone, because the earlier ones are the same in all alternatives.

    Args:
        tokenizer: of the model.
        splits: split -> examples.
        max_length: the longest text, in tokens; longer ones lose their end.
        context: how many tokens the model can read, which limits the texts too.
        max_new_tokens: the longest generation, and the longest text that a plain text's second half is compared with.
        generate: whether answers will be generated.

    Raises:
        ValueError: if there is no split, a split is empty, an example has no question or answer or none that is left
            within the limit, or the limit makes wrong answers equal to others: their truth ratio would be 1, that of
            perfect forgetting, whatever the model knows.
    """
    found, cut = Texts(), _Cut(max_length, context)
    lengths: dict[str, list[int]] = {}
    for split, row in _rows(splits):
        first = len(found.encoded)
        wrong = row.get("perturbed_answer") or []
        right = [row["paraphrased_answer"]] if wrong and row.get("paraphrased_answer") else []
        if wrong and not right and row.get("messages"):
            right = [row["answer"]]
        question = asked(row)
        whole = [encode_example(tokenizer, row)]
        whole += [encode(tokenizer, question, text, every_turn=False) for text in (*right, *wrong)]
        kept = [shortened(text, cut.limit, row["question"] or row["answer"]) for text in whole]
        cut.count(split, row, whole, kept, 1 + len(right))
        found.encoded += kept
        prompt, target = _task(tokenizer, row, kept[0], max_new_tokens)
        found.prompts.append(prompt)
        if row["question"]:
            lengths.setdefault(split, []).append(len(whole[0].input_ids) - len(prompt) - 1)  # without its end
        after = first + 1 + len(right)
        spoken = _spoken(row)
        if len(kept[0].input_ids) < len(whole[0].input_ids):
            said = [label for label in kept[0].labels if label != IGNORED]
            spoken = str(tokenizer.decode(said, skip_special_tokens=True))
        found.items.append(Item(split, row, first, after - 1, range(after, len(found.encoded)), target, spoken))
    cut.say()
    if generate:
        _say_unfinished(lengths, max_new_tokens)
    return found


def answers_hash(row: Mapping[str, Any]) -> str:
    """A hash of the answers that the truth ratio compares: where it is another, truth ratios cannot be compared."""
    wrong = row.get("perturbed_answer") or []
    return hashed([row.get("paraphrased_answer"), wrong] if wrong else [])[:12]


def scored_as(found: Texts, max_new_tokens: int) -> list[dict[str, Any]]:
    """What an example's scores depend on beside its question, its answer and the model, by the names that a log has.

    Args:
        found: from `texts_of`.
        max_new_tokens: the longest generated answer, in tokens.

    Returns:
        For each item: `answers_hash`; `tokens_hash` of all its tokens, and with them of the format of the prompt, the
        tokenizer and the limit of a text; and `max_new_tokens`.
    """
    return [
        {
            "answers_hash": answers_hash(item.row),
            "tokens_hash": hashed([prompt, found.encoded[item.answer : item.perturbed.stop]])[:12],
            "max_new_tokens": max_new_tokens,
        }
        for item, prompt in zip(found.items, found.prompts, strict=True)
    ]


class _Cut:
    """Counts the texts that a limit cuts, and the examples whose alternatives it makes equal."""

    def __init__(self, max_length: int | None, context: int | None) -> None:
        self.limit = min((limit for limit in (max_length, context) if limit is not None), default=None)
        self.by_model = context is not None and self.limit == context
        self.counts: dict[tuple[str, str], list[int]] = {}
        self.needed = 0
        self.equal: list[tuple[str, str, int]] = []

    def count(
        self, split: str, row: Mapping[str, Any], whole: Sequence[Encoded], kept: Sequence[Encoded], right: int
    ) -> None:
        kinds = ["answers", *["paraphrased answers"] * (right - 1), *["wrong answers"] * (len(whole) - right)]
        for kind, before, after in zip(kinds, whole, kept, strict=True):
            counts = self.counts.setdefault((split, kind), [0, 0])
            counts[0] += len(before.input_ids) > len(after.input_ids)
            counts[1] += 1
            self.needed = max(self.needed, len(before.input_ids))
        wrong = range(right, len(whole))
        if any(
            kept[one].input_ids == kept[other].input_ids and whole[one].input_ids != whole[other].input_ids
            for one in wrong
            for other in range(one)
        ):
            self.equal.append((split, row["question"] or row["answer"], max(len(text.input_ids) for text in whole)))

    def say(self) -> None:
        """Warn once of all texts that lose their end.

        Raises:
            ValueError: If wrong answers of an example become equal by it.
        """
        if self.equal:
            split, question, _ = self.equal[0]
            needed = max(length for _, _, length in self.equal)
            raise ValueError(
                f"expected wrong answers that differ within the first {self.limit} tokens, found {len(self.equal)} examples whose answers "
                f"are the same there, such as {question!r:.80} ({split}): their truth ratio would be 1 whatever the model knows. "
                + self._advice(needed, "give these examples shorter answers, or no perturbed_answer")
            )
        said = [f"{cut} of {n} {kind} of {split}" for (split, kind), (cut, n) in self.counts.items() if cut]
        if said:
            warnings.warn(
                f"texts are longer than {self.limit} tokens and lose their end, which is not scored: {', '.join(said)}. "
                + self._advice(self.needed, "give shorter texts"),
                stacklevel=4,
            )

    def _advice(self, needed: int, otherwise: str) -> str:
        if self.by_model:
            return f"The model reads no more than {self.limit} tokens, and {needed} are needed: {otherwise}"
        return f"Use max_length={needed} (--max-length {needed}), or {otherwise}"


def _say_unfinished(lengths: Mapping[str, Sequence[int]], max_new_tokens: int) -> None:
    longer = {split: sum(length > max_new_tokens for length in every) for split, every in lengths.items()}
    said = [f"{count} of {len(lengths[split])} answers of {split}" for split, count in longer.items() if count]
    if said:
        needed = max(map(max, lengths.values()))
        warnings.warn(
            f"answers are longer than max_new_tokens={max_new_tokens}, so that their ROUGE-L recall cannot reach 1: {', '.join(said)}. "
            f"max_new_tokens={needed} (--max-new-tokens {needed}) covers them all",
            stacklevel=4,
        )


def _rows(splits: Splits) -> list[tuple[str, Mapping[str, Any]]]:
    rows = [(split, row) for split, examples in splits.items() for row in examples]
    empty = [split for split, examples in splits.items() if not examples]
    if not rows or empty:
        raise ValueError(f"expected examples in every split, found none in {', '.join(empty) or 'an empty mapping'}")
    for split, row in rows:
        if "question" not in row or "answer" not in row:
            raise ValueError(
                f"expected every example of {split} to have question and answer, found {', '.join(row) or 'none'}: "
                "lightning_modules.data.examples.read_examples brings other columns into this shape"
            )
    return rows


def _spoken(row: Mapping[str, Any]) -> str:
    turns = row.get("messages") or ()
    earlier = [turn["content"] for turn in turns[:-1] if turn["role"] == "assistant"]
    return "\n".join([*earlier, row["answer"]])


def _task(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], text: Encoded, max_new_tokens: int
) -> tuple[list[int], str]:
    """Returns the prompt to generate from and the text that the generation is compared with."""
    if row["question"]:
        return prompt_ids(tokenizer, asked(row)), row["answer"]
    half = (len(text.input_ids) + 1) // 2
    following = text.input_ids[half : half + max_new_tokens]
    return text.input_ids[:half], str(tokenizer.decode(following, skip_special_tokens=True)).strip()
