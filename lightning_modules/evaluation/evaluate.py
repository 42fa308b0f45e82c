"""Scores a model on its splits: what it knows, what it says, and what it has memorised."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_modules.data.tasks import apart
from lightning_modules.data.tokenization import Encoded, padding_id
from lightning_modules.evaluation.continuing import Continuing, Waiting, continues
from lightning_modules.evaluation.drafts import drafted, says_the_likeliest
from lightning_modules.evaluation.generation import Begun, finished_answers, generation_batches, stop_tokens
from lightning_modules.evaluation.likelihood import check_causal, evaluation_mode
from lightning_modules.evaluation.membership import attack_aucs
from lightning_modules.evaluation.memorization import AnswerTokens, answer_tokens, memory_scores, token_statistics
from lightning_modules.evaluation.processes import dealt, portions_of, several
from lightning_modules.evaluation.shared import Read, SharedTexts
from lightning_modules.evaluation.tasks import score_tasks
from lightning_modules.evaluation.texts import Item, Texts, context_length, scored_as, texts_of
from lightning_modules.metrics.functional import answer_probability, has_words, rouge_recall, truth_ratio
from lightning_modules.progress import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

Scores = dict[str, float | int | None]

MEANS = ("probability", "rouge_l_recall", "truth_ratio", "nll", "exact_memorization", "extraction_strength")
"""The numbers of an example that a summary takes the mean of."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How a model is scored.

    Attributes:
        batch_size: texts in a forward pass.
        max_new_tokens: the longest generated answer, in tokens.
        max_length: the longest text, in tokens; longer ones lose their end. The model's own maximum applies too.
        generate: `False` skips generation, and with it ROUGE.
        memorization: `False` skips exact memorization, extraction strength and the membership scores.
        batch_tokens: tokens in a forward pass over answers, padding counted, in place of `batch_size`.
    """

    batch_size: int = 32
    max_new_tokens: int = 64
    max_length: int | None = None
    generate: bool = True
    memorization: bool = True
    batch_tokens: int | None = None


DEFAULT_SETTINGS = EvaluationSettings()


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model.

    Attributes:
        summary: split -> `{"probability", "rouge_l_recall", "truth_ratio", "nll", "exact_memorization",
            "extraction_strength", "n"}`, means over the split. `None` where nothing was measured: ROUGE without
            generation or of texts without a word, the truth ratio without perturbed answers, the last two without
            memorization. The truth ratio is min(R, 1/R) on the split named "forget" and max(0, 1 - R) on the
            others. NaN where the model gives NaN. Where only some examples have a number, "n_truth_ratio" (say) counts
            them.
        examples: split -> one dictionary for each example, in order: `question`, `answer`, `generation`, `nll`,
            `probability`, `rouge_l_recall`, `truth_ratio`, the `paraphrase_nll` and `perturbed_nll` from which the
            truth ratio was computed, what `texts.scored_as` says, and with memorization `memorization.memory_scores`.
            Every aggregate can be computed again. Examples of a task have the scores of `tasks.score_tasks` instead.
    """

    summary: dict[str, Scores]
    examples: dict[str, list[dict[str, Any]]]

    @property
    def membership(self) -> dict[str, float] | None:
        """Attack -> AUC of telling the split "forget" from the split "holdout", see `membership.attack_aucs`.

        `None` without these two splits: an attack needs examples that the model never saw, to compare with.
        """
        return attack_aucs(self.examples)


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    splits: Mapping[str, Sequence[Mapping[str, Any]]],
    settings: EvaluationSettings = DEFAULT_SETTINGS,
    *,
    across_processes: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Scores a model on every split, in one pass over all answers and one over all questions.

    Definitions (TOFU, Maini et al. 2024, section 2.2; formulas in `lightning_modules.metrics.functional`): the
    probability is exp(-nll) of the answer on *every* split. For real authors and world facts TOFU's tables show another
    number under the same name, the answer's share among the options; `utility.utility_inputs` computes it from the
    examples' `nll` and `perturbed_nll`. Where an example has perturbed answers and no paraphrase, the answer takes the
    paraphrase's place, as in TOFU. A plain text (empty question) is generated from its first half and compared with the
    second. Texts that are cut are counted in a warning.

    Cost: all texts that begin alike are read together, each common beginning once (`shared.SharedTexts`), and only what
    an answer's score has not shown is generated (`evaluation.drafts`). Memorization makes a few passes over the
    answers' logits, which are computed anyway.

    Args:
        model: a causal language model, on any device and in any dtype; its train or eval mode is restored.
        tokenizer: the model's tokenizer.
        splits: split -> examples with `question` and `answer`, and optionally `paraphrased_answer` and
            `perturbed_answer`; or examples of a task (`lightning_modules.data.tasks`), which have no summary: they are
            scored by `tasks.score_tasks`, and `benchmarks.benchmark_scores` sums them up.
        settings: how to score.
        across_processes: every process of the `torch.distributed` group calls this, with the same weights and splits.
            Each scores whole batches of its own, and all get every number: the same ones as in one process of the same
            kind. Sharded weights (FSDP, tensor parallelism) are refused, because their processes have to run every
            batch together. Without a group it changes nothing.
        progress: draws a progress bar where standard error is a terminal, and elsewhere writes a line twice a minute.

    Raises:
        ValueError: if there is no split, a split is empty, an example has no question or answer, `max_length` or the
            model's maximum makes an example's wrong answers equal (`texts.texts_of`), or the model is an encoder.
        RuntimeError: across processes, if the weights are sharded, another process failed, or the processes were given
            different splits.
    """
    check_causal(model)
    if across_processes and several():
        _refuse_shards(model)
    splits, tasks = apart(splits)
    if tasks:
        usual = Evaluation({}, {})
        if splits:
            usual = evaluate(model, tokenizer, splits, settings, across_processes=across_processes, progress=progress)
        how: Any = {"batch_size": settings.batch_size, "across_processes": across_processes, "progress": progress}
        return Evaluation(usual.summary, usual.examples | score_tasks(model, tokenizer, tasks, **how))
    found = texts_of(
        tokenizer,
        splits,
        max_length=settings.max_length,
        context=context_length(model),
        max_new_tokens=settings.max_new_tokens,
        generate=settings.generate,
    )
    items, console = found.items, Console(stderr=True)
    bar = Progress(console=console, transient=True, disable=not (progress and console.is_terminal))
    deal = dealt if across_processes else _alone
    shared = SharedTexts(
        model,
        found.encoded,
        [range(item.answer, item.perturbed.stop) for item in items],
        pad_token_id=padding_id(tokenizer),
        batch_size=settings.batch_size,
        batch_tokens=settings.batch_tokens,
    )
    drafts = settings.generate and says_the_likeliest(model)
    stops = stop_tokens(model, tokenizer)
    draft = partial(drafted, stops=stops, max_new_tokens=settings.max_new_tokens)

    def continuing() -> Continuing | None:
        fits = Continuing(lambda: shared.logits, stops, settings.max_new_tokens, settings.batch_size)
        return fits if drafts and continues(model, found.prompts, settings.max_new_tokens) else None

    with bar:
        scoring = _task_of(bar, "Scoring answers", len(found.encoded), lines=progress)
        answers = {item.answer for item in items} if drafts else set[int]()
        portions = portions_of(
            shared.batches, [len(answers.intersection(row)) for row in shared.rows], settings.batch_size
        )
        score = partial(
            _scored_rows,
            shared,
            found,
            {rows[0]: batches for rows, batches in portions},
            memorization=settings.memorization,
            draft=draft if drafts else None,
            continuing=continuing,
            advance=scoring,
        )
        scores = {
            place: score
            for row in deal(shared.lengths, [rows for rows, _ in portions], score)
            for place, score in row.items()
        }
        generations: Sequence[str | None] = [None] * len(items)
        if settings.generate:
            generating = _task_of(bar, "Generating answers", len(items), lines=progress)
            begun = [scores[item.answer].begun for item in items]
            generations = deal(
                [len(answer.prompt) for answer in begun],
                generation_batches(begun, settings.max_new_tokens, settings.batch_size),
                lambda batches: finished_answers(
                    model,
                    tokenizer,
                    [begun[place] for batch in batches for place in batch],
                    max_new_tokens=settings.max_new_tokens,
                    batch_size=settings.batch_size,
                    advance=generating,
                ),
            )
    examples: dict[str, list[dict[str, Any]]] = {split: [] for split in splits}
    for item, generation, how in zip(items, generations, scored_as(found, settings.max_new_tokens), strict=True):
        examples[item.split].append(_scored(item, scores, generation) | how)
    return Evaluation({split: summary(rows) for split, rows in examples.items()}, examples)


def _task_of(bar: Progress, what: str, total: int, *, lines: bool) -> Callable[[int], None]:
    """Returns what a loop calls with its steps: it moves the bar, and writes lines where there is no terminal."""
    task, stage = bar.add_task(what, total=total), Stage(what, total)

    def advance(steps: int) -> None:
        bar.advance(task, steps)
        if lines:
            stage.advance(steps)

    return advance


def _refuse_shards(model: nn.Module) -> None:
    """Raises before the first collective: after it, a process that waits for its part of a weight never returns."""
    sharded = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    if sharded:
        raise RuntimeError(
            f"across_processes: expected whole weights in every process, found {len(sharded)} sharded ones, such as {sharded[0]}; gather "
            "them into a model that is not sharded, or call evaluate in every process without across_processes: each scores everything"
        )


def _alone(
    lengths: Sequence[int], batches: Sequence[Sequence[int]], work: Callable[[list[Sequence[int]]], Sequence[T]]
) -> list[T]:
    """`processes.dealt` for a process that scores everything by itself, whether or not there are others."""
    results = dict(zip((entry for batch in batches for entry in batch), work(list(batches)), strict=True))
    return [results[entry] for entry in range(len(lengths))]


class _Score(NamedTuple):
    """What is known of one text; the last two are of answers only.

    Attributes:
        nll: the mean negative log-likelihood of its labels.
        memory: `memorization.memory_scores`; empty without memorization.
        begun: how the greedy answer begins.
    """

    nll: float
    memory: Mapping[str, float]
    begun: Begun


def _scored_rows(
    shared: SharedTexts,
    found: Texts,
    batches_of: Mapping[int, Sequence[Sequence[int]]],
    portions: Sequence[Sequence[int]],
    *,
    memorization: bool,
    draft: Callable[[Sequence[int], Encoded, Sequence[int]], Begun] | None,
    continuing: Callable[[], Continuing | None],
    advance: Callable[[int], object],
) -> list[dict[int, _Score]]:
    """The scores of the texts in some portions, row by row; their batches are found by their first rows."""
    answers = {item.answer: (item, prompt) for item, prompt in zip(found.items, found.prompts, strict=True)}
    detailed = torch.zeros(len(found.encoded), dtype=torch.bool)
    detailed[list(answers)] = memorization or draft is not None

    def begun(place: int, tokens: AnswerTokens) -> Begun:
        prompt = answers[place][1]
        return Begun(prompt) if draft is None else draft(prompt, found.encoded[place], tokens.predicted.tolist())

    def tokens_of(place: int, columns: Sequence[Tensor]) -> AnswerTokens:
        return answer_tokens(found.encoded[place], columns, detailed=bool(detailed[place]))

    def score(place: int, columns: Sequence[Tensor]) -> _Score:
        tokens = tokens_of(place, columns)
        if place not in answers:
            return _Score(tokens.nll, {}, Begun(()))
        memory = memory_scores(tokens, answers[place][0].spoken) if memorization else {}
        return _Score(tokens.nll, memory, ended.get(place) or begun(place, tokens))

    goes_on = continuing()
    ended: Mapping[int, Begun] = {} if goes_on is None else goes_on.finished

    def read(what: Read) -> None:
        if goes_on is None:
            return
        for place in sorted(what.found.keys() & answers.keys()):
            known = begun(place, tokens_of(place, what.found[place]))
            said = [*known.prompt, *known.said][:-1]
            if not known.ended and said and found.encoded[place].input_ids[: len(said)] == said:
                goes_on.add(place, Waiting(known, what.states(place, len(said))))

    rows: list[dict[int, tuple[Tensor, ...]]] = []
    for portion in portions:
        rows += shared.over(batches_of[portion[0]], token_statistics(detailed, moments=memorization), advance, read)
        if goes_on is not None:
            with evaluation_mode(shared.model):
                goes_on.flush()
    return [{place: score(place, columns) for place, columns in row.items()} for row in rows]


def _scored(item: Item, scores: Mapping[int, _Score], generation: str | None) -> dict[str, Any]:
    answer, memory, _ = scores[item.answer]
    paraphrase = scores[item.paraphrase].nll
    perturbed = [scores[place].nll for place in item.perturbed]
    kind = "forget" if item.split == "forget" else "utility"
    ratio = truth_ratio([paraphrase], [perturbed], kind=kind).item() if perturbed else None
    said = generation if has_words(item.target) else None  # of a target without a word nothing can be recalled
    return {
        "question": item.row["question"],
        "answer": item.row["answer"],
        "generation": generation,
        "nll": answer,
        "probability": answer_probability([answer]).item(),
        "rouge_l_recall": None if said is None else rouge_recall(said, item.target),
        "truth_ratio": ratio,
        "paraphrase_nll": paraphrase if perturbed else None,
        "perturbed_nll": perturbed or None,
        **memory,
    }


def summary(examples: Sequence[Mapping[str, Any]]) -> Scores:
    """Returns the means over the examples of one split, as in `Evaluation.summary`; `None` for what no example has."""
    means, fewer = Scores(), Scores()
    for name in MEANS:
        values = [example[name] for example in examples if example.get(name) is not None]
        means[name] = fmean(values) if values else None
        if 0 < len(values) < len(examples):
            fewer[f"n_{name}"] = len(values)
    return means | {"n": len(examples)} | fewer


def truth_ratios(examples: Sequence[Mapping[str, Any]]) -> list[float]:
    """Returns R of every scored example that has perturbed answers: the sample that forget quality compares."""
    return [
        float(truth_ratio([example["paraphrase_nll"]], [example["perturbed_nll"]], kind="ratio"))
        for example in examples
        if example.get("perturbed_nll")
    ]
