"""Scores that are kept for later runs, under a hash of everything that decides them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_modules.data.examples import Example, numbered
from lightning_modules.data.formats import set_format
from lightning_modules.data.hashes import hashed
from lightning_modules.data.heldout import to_keep
from lightning_modules.data.tasks import apart, prefix_ids
from lightning_modules.evaluation.evaluate import Evaluation, summary
from lightning_modules.evaluation.membership import HOLDOUT
from lightning_modules.evaluation.texts import Texts, answers_hash, scored_as, texts_of
from lightning_modules.folder import cache_folder, read_evaluation, write_evaluation
from lightning_modules.run.identity import content_versions, model_identity
from lightning_modules.run.loading import start_name, tokenizer_texts
from lightning_modules.run.models import Pretrained, load_tokenizer
from lightning_modules.run.options import DataOptions, EvaluationOptions, LoadingOptions, Options, UnlearnOptions
from lightning_modules.run.run import Run, Splits
from lightning_modules.run.scoring import ScoredSplits, score, to_score
from lightning_modules.run.show import say
from lightning_modules.training import scratch

_FORMAT = 3  # raise it when what is scored, or how, changes, so that logs in the cache are not used any more


def path_of(options: Options, splits: Splits, identity: object, tokenizer: tuple[str, LoadingOptions] | None) -> Path:
    """Where a model's scores are kept.

    The file's name is a hash of the model's identity, the examples that are scored and the tokens that its tokenizer
    makes of them, the settings of the scoring, the kind of device, and the versions of gradsurgery, torch and
    transformers.

    Args:
        options: How to score.
        splits: All examples.
        identity: What distinguishes the model from every other one.
        tokenizer: The name by which it is loaded, and how; None where the identity decides it.
    """
    evaluation, examples = options.evaluation, to_score(options.evaluation, splits)
    determining = {
        "format": _FORMAT,
        "versions": content_versions(),
        "reference": identity,
        "splits": examples,
        "tokens": None if tokenizer is None else _tokens(*tokenizer, options, examples),
        "settings": [
            evaluation.max_new_tokens,
            options.data.max_length,
            evaluation.evaluation_batch_size,
            evaluation.evaluation_batch_tokens,
            evaluation.evaluation_precision,
        ],
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    return cache_folder("reference") / f"{hashed(determining)[:24]}.jsonl"


def scores_before(run: Run[UnlearnOptions], model: nn.Module) -> Evaluation:
    """Scores of the model before unlearning, in the process that has it.

    Another run that starts from the same model has them computed already, unless --reference-cache is off.

    Args:
        run: Its options decide the model, and how it is scored.
        model: With its adapters, which change nothing yet.
    """
    options, examples = run.options, to_score(run.options.evaluation, run.splits)
    path = start_path(options, run.splits) if options.evaluation.reference_cache else None
    rows = None if path is None else kept(path, examples, "Before")
    if rows is not None:
        return Evaluation({split: summary(scored) for split, scored in apart(rows)[0].items()}, rows)
    found = score(run, model)
    if path is not None:
        keep(path, found.examples)
    return found


def start_path(options: UnlearnOptions, splits: Splits) -> Path | None:
    """Where the scores of the model before unlearning are kept; None if not everything is known that decides them.

    Those of a model that is the reference of another run are the same file. Adapters decide them too, up to rounding;
    what FILA makes of the weights depends on all examples, so that it is not kept.
    """
    training = options.training
    if training.lora_rank and training.lora_init != "default":
        return None
    if options.model.scratch:
        known, tokenizer = small_identity(options, splits, [*to_keep(splits), *splits["forget"]]), None
    else:
        name = start_name(options, splits)
        loading = options.loading if name == options.model.model else options.loading.of_reference()
        known, tokenizer = model_identity(name, loading), (name, loading)
    if known is None:
        return None
    if training.lora_rank:
        known = {"adapted": known, "by": asdict(training.adapters(options.output.seed))}
    return path_of(options, splits, known, tokenizer)


_SAME = {
    "answers_hash": "the same paraphrased and wrong answers, found others; truth ratios can be compared with the same ones only: score "
    "the reference on these files",
    "tokens_hash": "the same tokens, found others; score the reference with the same --prompt-format, --chat-template-kwargs, --max-length "
    "and tokenizer",
    "max_new_tokens": "at most {ours} tokens of a generated answer, found {theirs}; give the --max-new-tokens of the log, or score the "
    "reference again",
}
"""What has to be the same where scores are compared; earlier logs, and those of other tools, do not say it."""


def matching(
    log: Mapping[str, Sequence[Mapping[str, Any]]],
    examples: Splits,
    name: str,
    scored: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> ScoredSplits:
    """The log's rows about the same questions and answers, in the same order.

    A log without a holdout split is accepted; then the result has none either.

    Args:
        log: Split -> scored examples.
        examples: Split -> examples that are scored here, with their wrong answers, which the truth ratio compares.
        name: What the messages call the log.
        scored: Split -> how each example is scored here, as `texts.scored_as` says it; None where it is not known.

    Raises:
        ValueError: If an example is missing in the log, or was scored with other wrong answers, tokens or lengths.
    """
    found: ScoredSplits = {}
    for split, rows in examples.items():
        if split == HOLDOUT and split not in log:
            continue
        # The same question and answer may occur twice with other wrong answers, so the first one is the first there.
        known = dict(zip(numbered(log.get(split, [])), map(dict, log.get(split, [])), strict=True))
        keys = numbered(rows)
        missing = sum(key not in known for key in keys)
        if missing:
            raise ValueError(
                f"--reference: expected {name} to hold every example of {split}, found {missing} of {len(rows)} missing; two models can "
                "be compared on the same questions only"
            )
        found[split] = [known[key] for key in keys]
        how = (scored or {}).get(split) or [{}] * len(rows)
        for ours, theirs, here in zip(rows, found[split], how, strict=True):
            wanted, scores = (
                len(row.get(key) or ()) for row, key in ((ours, "perturbed_answer"), (theirs, "perturbed_nll"))
            )
            if wanted != scores:
                raise ValueError(
                    f"--reference: expected {name} to score the same {wanted} perturbed answers of {ours['question']!r:.80} ({split}), "
                    f"found {scores}; truth ratios can be compared with the same wrong answers only: score the reference on these files"
                )
            _check_same(
                {"answers_hash": answers_hash(ours), **here}, theirs, f"{ours['question']!r:.80} ({split})", name
            )
    return found


def _check_same(ours: Mapping[str, Any], theirs: Mapping[str, Any], what: str, name: str) -> None:
    for key, said in _SAME.items():
        counts = key != "max_new_tokens" or theirs.get("generation") is not None
        if counts and theirs.get(key) is not None and ours.get(key, theirs[key]) != theirs[key]:
            said = said.format(ours=ours[key], theirs=theirs[key])
            raise ValueError(f"--reference: expected {name} to score of {what} {said}")


def scored_here(
    evaluation: EvaluationOptions, data: DataOptions, known: Pretrained | None, examples: Splits
) -> dict[str, list[dict[str, Any]]] | None:
    """How the examples are scored here, for `matching`; None of the small Llama, which has no tokenizer yet.

    Args:
        evaluation: How to score.
        data: How long a text can be.
        known: Of the model, whose tokenizer has been told its format.
        examples: Those that are scored.
    """
    if known is None:
        return None
    found = _texts(known.tokenizer, evaluation, data, apart(examples)[0], known.config)
    scored: dict[str, list[dict[str, Any]]] = {}
    for item, how in zip(found.items, scored_as(found, evaluation.max_new_tokens), strict=True):
        scored.setdefault(item.split, []).append(how)
    return scored


def _texts(
    tokenizer: Any, evaluation: EvaluationOptions, data: DataOptions, examples: Splits, config: Any = None
) -> Texts:
    if not examples:
        return Texts()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of texts that are cut; it is said when they are scored
        return texts_of(
            tokenizer,
            examples,
            max_length=data.max_length,
            context=getattr(config, "max_position_embeddings", None),
            max_new_tokens=evaluation.max_new_tokens,
        )


def _tokens(name: str, loading: LoadingOptions, options: Options, examples: Splits) -> str | None:
    """A hash of all tokens that the model is scored on; None if its tokenizer cannot be loaded.

    They depend on more than the texts and the tokenizer's files: on the options of its chat template, and on our code.
    """
    try:
        tokenizer = load_tokenizer(name, loading)
    except (OSError, ValueError):  # raised again, with a sentence, when the model is loaded
        return None
    set_format(tokenizer, options.data.chat_template_kwargs, options.data.prompt_format)
    usual, tasks = apart(examples)
    prompts = [[prefix_ids(tokenizer, row.get("prompt", row["answer"])) for row in rows] for rows in tasks.values()]
    found = _texts(tokenizer, options.evaluation, options.data, usual)
    return hashed([found.encoded, found.prompts, *prompts])


def small_identity(options: Options, splits: Splits, rows: Sequence[Example]) -> object:
    """What distinguishes a small Llama that is trained on some rows, with the default `ScratchSettings`."""
    settings = {name: str(value) for name, value in vars(scratch.ScratchSettings()).items()}
    return {
        "scratch": [scratch.FORMAT, scratch.VOCABULARY, settings, options.output.seed],
        "examples": [[row["question"], row["answer"]] for row in rows],
        "texts": tokenizer_texts(options.data, splits),
    }


def kept(path: Path, examples: Splits, whose: str) -> ScoredSplits | None:
    """The scores in a file, in the order of the examples; None if it does not hold them. It says whose it took."""
    try:
        rows = matching(read_evaluation(path)[1], examples, str(path)) if path.is_file() else None
    except (OSError, ValueError):  # broken, or written by somebody else: it is computed again and replaced
        return None
    if rows is not None:
        say(f"{whose}: scores from {path}")
    return rows


def keep(path: Path, rows: ScoredSplits) -> None:
    """Keeps scores; where that is not possible, a line says so."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_evaluation(path, {"reference": rows})
    except OSError as error:
        say(f"The scores could not be cached in {path.parent}: {error}")
