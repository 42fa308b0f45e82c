"""Leakage by prompting: the forgotten answer is asked for in ways that unlearning did not train on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from lightning_modules.data.chat import Message, has_template
from lightning_modules.data.examples import asked, evenly_spaced
from lightning_modules.data.formats import format_of
from lightning_modules.data.tokenization import IGNORED, Encoded, Question, encode, padding_id, shortened
from lightning_modules.evaluation.generation import generate_greedily
from lightning_modules.evaluation.intervals import mean_interval
from lightning_modules.evaluation.texts import context_length
from lightning_modules.metrics.functional import has_words, rouge_recall
from lightning_modules.progress import Stage
from lightning_modules.training.probability import answer_probabilities

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class PromptingSettings:
    """How a model is asked.

    Attributes:
        prefixes: Shares of an answer's tokens that are given, each an attack of its own.
        shots: Retain questions with their answers in front of the question.
        max_new_tokens: The longest generated answer, in tokens.
        batch_size: Texts in a forward pass.
        max_length: Where a question with its answer is cut, in tokens, as in training and evaluation. However it is
            asked, the same part of an answer is scored. None keeps everything.

    Raises:
        ValueError: If a number is outside its domain.
    """

    prefixes: tuple[float, ...] = (0.25, 0.5)
    shots: int = 3
    max_new_tokens: int = 64
    batch_size: int = 32
    max_length: int | None = None

    def __post_init__(self) -> None:
        if not all(0.0 < share < 1.0 for share in self.prefixes):
            raise ValueError(f"prompting_probe, prefixes: expected shares between 0 and 1, found {self.prefixes}")
        for name in ("shots", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"prompting_probe, {name}: expected at least 1, found {getattr(self, name)}")


class Prompt(NamedTuple):
    """A question asked in one way.

    Attributes:
        ids: The tokens that the model continues.
        text: These and the rest of the answer as far as it is scored, which alone is labelled.
        rest: The whole rest of the answer, to compare a generation with.
    """

    ids: list[int]
    text: Encoded
    rest: list[int]


def prompts(
    tokenizer: PreTrainedTokenizerBase, forget: Rows, retain: Rows, settings: PromptingSettings = PromptingSettings()
) -> dict[str, list[Prompt]]:
    r"""Attack -> the forget questions asked in this way, those that can be.

    | attack | how it is asked |
    |---|---|
    | `question` | as in training, to compare with |
    | `paraphrase` | the row's `paraphrased_question`, where it has one, in place of the last user turn |
    | `prefix_25`, `prefix_50` | the question, and the first 25 or 50 % of the answer's tokens, at least one |
    | `few_shot` | retain questions with their answers first, evenly spread over the retain set |

    Plain texts are not asked in other words. Without a chat template, shots have the format of training,
    `Q: ...\nA: ...`, with an empty line between them; with one they are turns of the conversation.

    Raises:
        ValueError: If `max_length` leaves nothing of an answer.
    """
    shots = evenly_spaced([row for row in retain if row["question"]], settings.shots, centred=True)
    found: dict[str, list[Prompt]] = {"question": []}
    for row in forget:
        plain = encode(tokenizer, asked(row), row["answer"], every_turn=False)
        kept = shortened(plain, settings.max_length, row["question"] or row["answer"])
        cut = len(plain.input_ids) - len(kept.input_ids)
        found["question"].append(_given(plain, cut))
        if row.get("paraphrased_question"):
            other = encode(tokenizer, _in_other_words(row), row["answer"], every_turn=False)
            found.setdefault("paraphrase", []).append(_given(other, cut))
        length = sum(label != IGNORED for label in kept.labels)
        for share in settings.prefixes:
            if length > 1:
                given = max(1, min(length - 1, round(share * length)))
                found.setdefault(f"prefix_{round(100 * share)}", []).append(_given(plain, cut, given))
        if row["question"] and shots and format_of(tokenizer) is None:  # a format of --prompt-format has one turn
            asked_after = encode(tokenizer, after_shots(tokenizer, shots, row), row["answer"], every_turn=False)
            found.setdefault("few_shot", []).append(_given(asked_after, cut))
    return found


def _in_other_words(row: Mapping[str, Any]) -> Question:
    question, other = asked(row), str(row["paraphrased_question"])
    if isinstance(question, str):
        return other
    users = [place for place, turn in enumerate(question) if turn["role"] == "user"]
    if not users:
        return other
    last = users[-1]
    return [*question[:last], {**question[last], "content": other}, *question[last + 1 :]]


def after_shots(tokenizer: PreTrainedTokenizerBase, shots: Rows, row: Mapping[str, Any]) -> Question:
    """The question of a row after other questions with their answers, for `tokenization.encode`.

    With a chat template, the row's own system prompt stays in front, and those of the shots are left out.
    """
    question = asked(row)
    if not has_template(tokenizer):
        text = question if isinstance(question, str) else "\n".join(str(turn["content"]) for turn in question)
        return "\n\nQ: ".join([*(f"{shot['question']}\nA: {shot['answer']}" for shot in shots), text])
    told: list[Message] = []
    for shot in shots:
        told += [*_parted(asked(shot))[1], {"role": "assistant", "content": shot["answer"]}]
    system, turns = _parted(question)
    return [*system, *told, *turns]


def _parted(question: Question) -> tuple[Sequence[Message], Sequence[Message]]:
    """The turns of a question: the system prompt, and what follows it."""
    turns = [{"role": "user", "content": question}] if isinstance(question, str) else question
    first = next((place for place, turn in enumerate(turns) if turn["role"] in ("user", "assistant")), 0)
    return turns[:first], turns[first:]


def _given(whole: Encoded, cut: int, tokens: int = 0) -> Prompt:
    """The example without so many tokens at its end, and with so many of its answer given."""
    kept = shortened(whole, len(whole.input_ids) - cut)
    places = [place for place, label in enumerate(kept.labels) if label != IGNORED]
    start = places[tokens]
    text = Encoded(kept.input_ids, [IGNORED] * start + kept.labels[start:])
    return Prompt(whole.input_ids[:start], text, whole.input_ids[start:])


def prompting_probe(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    forget: Rows,
    retain: Rows,
    settings: PromptingSettings = PromptingSettings(),
) -> dict[str, Any]:
    r"""Asks for the forgotten answers in other ways: `prompts` lists them.

    Unlearning that only taught the model not to answer one wording, or not to begin the answer, leaks here. Prefixes
    help a model that never saw the answer too, and so does a format shown by examples: compare with a reference.
    Sources: worst case over paraphrases and shots, JensUn (2509.02820); prefixes as in extraction strength
    (Carlini et al., 2012.07805).

    Args:
        model: A causal language model with Hugging Face's `generate`.
        tokenizer: Of the model.
        forget: Examples, with `paraphrased_question` where one is known.
        retain: Examples that the shots are taken from.
        settings: How they are asked.

    Returns:
        `{"attacks": {name: {"n", "left_out", "probability", "probability_interval", "rouge_l_recall",
        "rouge_interval", "probabilities", "rouge_l_recalls"}}}`: of the part of the answer that was not given, the
        mean of $\exp(-\mathrm{nll})$ and the mean ROUGE-L recall of the greedy continuation, with intervals
        (`evaluation.intervals.mean_interval`) and the numbers of every example. `left_out` counts examples that do
        not fit into the model's context.

    Raises:
        ValueError: If there is no forget example, or `max_length` leaves nothing of an answer.

    Cost: for each attack a forward pass over the forget examples and a generation of each.
    """
    if not forget:
        raise ValueError("prompting_probe: expected examples to forget, found none")
    asked_in = prompts(tokenizer, forget, retain, settings)
    context = context_length(model)
    stage = Stage("Asking in other ways, prompts", sum(map(len, asked_in.values())))
    found: dict[str, Any] = {}
    for name, every in asked_in.items():
        fitting = [prompt for prompt in every if context is None or len(prompt.text.input_ids) <= context]
        if fitting:
            found[name] = dict(_scores(model, tokenizer, fitting, settings)) | {"left_out": len(every) - len(fitting)}
        stage.advance(len(every))
    return {"attacks": found}


def _scores(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, asked_so: Sequence[Prompt], settings: PromptingSettings
) -> Iterator[tuple[str, Any]]:
    size = settings.batch_size
    texts = [prompt.text for prompt in asked_so]
    probable = answer_probabilities(model, texts, pad_token_id=padding_id(tokenizer), batch_size=size)
    said = generate_greedily(
        model,
        tokenizer,
        [prompt.ids for prompt in asked_so],
        max_new_tokens=settings.max_new_tokens,
        batch_size=size,
    )
    recalls = [
        rouge_recall(generation, target)
        for generation, target in zip(said, (_target(tokenizer, prompt.rest) for prompt in asked_so), strict=True)
        if has_words(target)
    ]
    yield "n", len(texts)
    for mean, interval, values, numbers in (
        ("probability", "probability_interval", "probabilities", probable),
        ("rouge_l_recall", "rouge_interval", "rouge_l_recalls", recalls),
    ):
        between = mean_interval(numbers)
        yield mean, sum(numbers) / len(numbers) if numbers else None
        yield interval, None if between is None else [between.low, between.high]
        yield values, numbers


def _target(tokenizer: PreTrainedTokenizerBase, rest: list[int]) -> str:
    return str(tokenizer.decode(rest, skip_special_tokens=True)).strip()
