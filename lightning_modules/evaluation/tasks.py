"""Scores a model on the tasks of benchmarks: continuations, multiple choice, membership."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_modules.data.tasks import CHOICE, CONTINUATION, MEMBERSHIP, TASK, prefix_ids
from lightning_modules.data.tokenization import IGNORED, Encoded, padding_id
from lightning_modules.evaluation.choices import option_log_likelihoods
from lightning_modules.evaluation.generation import generate_tokens
from lightning_modules.evaluation.memorization import answer_token_statistics
from lightning_modules.evaluation.processes import dealt, several
from lightning_modules.evaluation.texts import context_length
from lightning_modules.metrics.functional import loss_score, min_k_score, multiple_choice_accuracy, rouge_f1
from lightning_modules.progress import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHARE = 0.4  # Min-K% of MUSE

Rows = Sequence[Mapping[str, Any]]
Scored = list[dict[str, Any]]


@dataclass(frozen=True)
class _Scoring:
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    advance: Callable[[int], object] = lambda _: None


def score_tasks(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Rows],
    *,
    batch_size: int = 32,
    across_processes: bool = False,
    progress: bool = True,
) -> dict[str, Scored]:
    """Scores every example of every split by its task, see `lightning_modules.data.tasks`.

    Args:
        model: a causal language model, on any device and in any dtype.
        tokenizer: the model's tokenizer.
        tasks: split -> examples, all of one task.
        batch_size: texts in a forward pass.
        across_processes: as in `evaluate.evaluate`.
        progress: writes lines about where it stands.

    Returns:
        split -> a dictionary for each example, in order: `question`, `answer`, `task`, `generation`, and the score:

        - continuation: `rouge_l_f1`, of the generation and the answer;
        - choice: `correct`, 1 or 0; the generation is the option that was chosen;
        - membership: `min_k_score` (k = 40 %) and `loss_score`; the generation is `None`.

    Raises:
        ValueError: if a task is unknown, or a prompt fills the model's context.
    """
    found: dict[str, Scored] = {}
    context = context_length(model)
    for split, rows in tasks.items():
        kind = rows[0][TASK]
        if kind not in _KINDS:
            raise ValueError(f"{split}: expected the task to be one of {', '.join(_KINDS)}, found {kind!r}")
        stage = Stage(f"Scoring {split}", len(rows))
        scoring = _Scoring(model, tokenizer, batch_size, stage.advance if progress else lambda _: None)
        work = partial(_some, _KINDS[kind], scoring, rows)
        if across_processes and several():
            sizes = [len(prefix_ids(tokenizer, row.get("prompt") or row["answer"])[:context]) for row in rows]
            order = sorted(range(len(rows)), key=sizes.__getitem__, reverse=True)
            batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
            scores = dealt(sizes, batches, lambda share, work=work: work([place for batch in share for place in batch]))
        else:
            scores = work(list(range(len(rows))))
        found[split] = [
            {**{name: row[name] for name in ("question", "answer", TASK)}, **score}
            for row, score in zip(rows, scores, strict=True)
        ]
    return found


def _some(score: Callable[[_Scoring, Rows], Scored], scoring: _Scoring, rows: Rows, places: Sequence[int]) -> Scored:
    return score(scoring, [rows[place] for place in places])


def _continued(scoring: _Scoring, rows: Rows) -> Scored:
    found: Scored = [{} for _ in rows]
    for limit in sorted({row["max_new_tokens"] for row in rows}):
        places = [place for place, row in enumerate(rows) if row["max_new_tokens"] == limit]
        tokens = generate_tokens(
            scoring.model,
            scoring.tokenizer,
            [prefix_ids(scoring.tokenizer, rows[place]["prompt"]) for place in places],
            max_new_tokens=limit,
            batch_size=scoring.batch_size,
            advance=scoring.advance,
        )
        for place, ids in zip(places, tokens, strict=True):
            said = _said(scoring.tokenizer, ids)
            for stop in rows[place]["stops"]:
                said = said.split(stop)[0]
            found[place] = {
                "generation": said,
                "rouge_l_f1": rouge_f1(said, target_text(scoring.tokenizer, rows[place])),
            }
    return found


def target_text(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]) -> str:
    """Returns what a continuation is compared with: the first tokens of the answer, or all of it."""
    if not row["target_tokens"]:
        return row["answer"]
    return _said(tokenizer, prefix_ids(tokenizer, row["answer"])[: row["target_tokens"]])


def _said(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _chosen(scoring: _Scoring, rows: Rows) -> Scored:
    asked = [(row["prompt"], row["options"]) for row in rows]
    likelihoods = option_log_likelihoods(
        scoring.model, scoring.tokenizer, asked, batch_size=scoring.batch_size, advance=scoring.advance
    )
    found: Scored = []
    for row, options in zip(rows, likelihoods, strict=True):
        correct = multiple_choice_accuracy([options], [row["right"]]).item()
        best = None if correct != correct else row["choices"][options.index(max(options))]
        found.append({"generation": best, "correct": correct})
    return found


def _familiar(scoring: _Scoring, rows: Rows) -> Scored:
    context = context_length(scoring.model)
    whole = [prefix_ids(scoring.tokenizer, row["answer"]) for row in rows]
    cut = sum(context is not None and len(ids) > context for ids in whole)
    if cut:
        warnings.warn(
            f"{cut} of {len(rows)} texts are longer than the {context} tokens that the model reads, and lose their end, which an attack "
            "on membership then does not see",
            stacklevel=4,
        )
    encoded = [Encoded(ids[:context], [IGNORED, *ids[1:context]]) for ids in whole]
    statistics = answer_token_statistics(
        scoring.model,
        encoded,
        pad_token_id=padding_id(scoring.tokenizer),
        batch_size=scoring.batch_size,
        detailed=(),
        advance=scoring.advance,
    )
    return [
        {
            "generation": None,
            "min_k_score": min_k_score(tokens.log_probabilities, _SHARE),
            "loss_score": loss_score(tokens.log_probabilities),
        }
        for tokens in statistics
    ]


_KINDS = {CONTINUATION: _continued, CHOICE: _chosen, MEMBERSHIP: _familiar}
