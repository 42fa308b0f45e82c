"""From options to examples, models and tokenizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lightning_modules.data.examples import Example, read_examples
from lightning_modules.data.fictional_authors import fictional_authors, fictional_splits
from lightning_modules.data.files import read_text
from lightning_modules.data.formats import set_format
from lightning_modules.data.heldout import to_keep
from lightning_modules.data.pairs import REFUSALS, SIMILAR, TARGET, ForgetRetainDataModule
from lightning_modules.data.requests import read_requests, together
from lightning_modules.data.tofu import tofu_examples, tofu_split
from lightning_modules.data.tofu_module import TOFUDataModule
from lightning_modules.evaluation.membership import HOLDOUT
from lightning_modules.run.benchmarks import benchmark_data
from lightning_modules.run.compatible import check_examples
from lightning_modules.run.first import identity_to_teach, taught_folder
from lightning_modules.run.models import (
    Pretrained,
    check_pretrained,
    check_rank,
    load_pretrained,
    load_to_train,
    load_tokenizer,
)
from lightning_modules.run.options import DataOptions, MethodOptions, Options, UnlearnOptions
from lightning_modules.run.overlap import check_heldout, check_overlap
from lightning_modules.training import objectives
from lightning_modules.training.scratch import ScratchSettings, scratch_model

_TOKENIZER_AUTHORS = 100


def make_data(options: Options, tokenizer: Any) -> ForgetRetainDataModule:
    """The data module that the options describe.

    Args:
        options: Of a command. `evaluate` trains nothing; its data module is there to be read.
        tokenizer: Of the model; None if only `read()` is called, which gives the splits as text, and cuts none.

    Raises:
        ValueError: If there are too few authors to forget a fifth of them.
    """
    data = options.data
    common: dict[str, Any] = {"seed": options.output.seed, "max_length": data.max_length}
    if isinstance(options, UnlearnOptions):
        training = options.training
        common |= {"batch_size": training.batch_size, "group_by_length": training.group_by_length}
        common |= {"refusals": refusals_of(options.method), "keep_asked_words": options.method.keep_asked_words}
        if options.method.substitute_weight:
            given = options.finish.substitutes
            common["substitutes"] = SIMILAR if given is None else given
        common["target"] = TARGET if objectives.needs_target(objectives.by_name(options.method.forget_loss)) else None
    if data.tofu is not None:
        common |= {
            "num_authors": options.authors,
            "forget_authors": data.forget_authors,
            "general": not options.model.scratch,
        }
        common["heldout_authors"] = data.heldout_authors
        return TOFUDataModule(data.tofu, tokenizer, folder=data.tofu_dir, **common)
    if data.cuts_texts:
        return benchmark_data(data, tokenizer, **common)
    forget = data.forget if data.requests is None else together(read_requests(data.requests))
    if forget is not None and data.retain is not None:
        return ForgetRetainDataModule(forget, data.retain, tokenizer, retain_heldout=data.retain_heldout, **common)
    authors = options.authors or 0
    forgotten = authors // 5 if data.forget_authors is None else data.forget_authors
    if not forgotten:
        raise ValueError(
            f"expected at least 5 authors, so that a fifth of them can be forgotten, or --forget-authors, found {authors}"
        )
    return ForgetRetainDataModule(
        **fictional_splits(authors, forgotten, data.heldout_authors), tokenizer=tokenizer, **common
    )


def read_splits(options: Options) -> dict[str, list[Example]]:
    """The examples to score, by split: those of the data module, and the holdout, on which nothing is trained.

    It warns about rows that are in the forget and in the retain set.

    Raises:
        ValueError: If an example of the holdout is in another split too, a held-out one in the forget or retain set,
            or the whole forget set in the retain set.
        FileNotFoundError: If a file is missing.
    """
    tokenizer = load_tokenizer(options.model.model, options.loading) if options.data.cuts_texts else None
    splits = make_data(options, tokenizer).read()
    check_overlap(splits)
    check_heldout(splits)
    name = options.data.holdout
    if name is None:
        return splits
    holdout = _holdout(name, options.data)
    for split, rows in splits.items():
        seen = {(row["question"], row["answer"]) for row in rows}
        common = sum((row["question"], row["answer"]) in seen for row in holdout)
        if common:
            raise ValueError(
                f"--holdout: expected examples that no model has seen, found {common} of {len(holdout)} that are in {split} too: "
                f"give others than those of {name}"
            )
    return {**splits, HOLDOUT: holdout}


def _holdout(name: str, data: DataOptions) -> list[Example]:
    """The holdout's examples: a file, or with --tofu also a split of TOFU, which has neither a folder nor an ending."""
    if data.tofu is not None and Path(name).name == name and not Path(name).suffix:
        return tofu_split(name, data.tofu_dir)
    return read_examples(name)


def refusals_of(method: MethodOptions) -> Sequence[str] | None:
    """Answers that refuse, one a line of the file; None where the forget loss needs none."""
    if not objectives.needs_refusals(objectives.by_name(method.forget_loss)):
        return None
    if method.refusals is None:
        return REFUSALS
    found = [
        line.strip() for line in read_text(method.refusals, "a text file of refusals").splitlines() if line.strip()
    ]
    if not found:
        raise ValueError(f"--refusals: expected a refusal a line in {method.refusals}, found none")
    return found


def load_model(options: Options, splits: Mapping[str, Sequence[Example]]) -> tuple[nn.Module, Any]:
    """The model that is to forget or to be scored, and its tokenizer, which is told the options of its chat template.

    One that is given as an adapter is merged where it is to be trained: it is the start model, and no adapter of ours.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If the chat template does not read one of its options, or there is none; if the model is to be
            trained, and is an adapter that cannot be merged.
    """
    loaded = _given(options, start_name(options, splits)) if not options.model.scratch else _small(options, splits)
    set_format(loaded[1], options.data.chat_template_kwargs, options.data.prompt_format)
    return loaded


def start_name(options: Options, splits: Mapping[str, Sequence[Example]]) -> str:
    """Folder or hub name of the model before unlearning: --model, or what it became by --finetune-first.

    Raises:
        ValueError: If it has not been taught yet.
    """
    return taught_folder(options, splits, "target") or options.model.model


def reference_name(options: Options, splits: Mapping[str, Sequence[Example]]) -> str | None:
    """Folder, hub name or log of the reference; None without one, and where it is a small Llama.

    Raises:
        ValueError: If it has not been taught yet.
    """
    return options.evaluation.reference or taught_folder(options, splits, "reference")


def _given(options: Options, name: str) -> tuple[nn.Module, Any]:
    loading = options.loading if name == options.model.model else options.loading.of_reference()
    if isinstance(options, UnlearnOptions):
        return load_to_train(name, options.training.save, loading)
    return load_pretrained(name, loading)


def _small(options: Options, splits: Mapping[str, Sequence[Example]]) -> tuple[nn.Module, Any]:
    return scratch_model(
        [*to_keep(splits), *splits["forget"]],
        ScratchSettings(seed=options.output.seed),
        tokenizer_texts=tokenizer_texts(options.data, splits),
        description="Training a small Llama on everything",
    )


def load_reference(options: Options, splits: Mapping[str, Sequence[Example]]) -> tuple[nn.Module, Any] | None:
    """A model that never saw the forget set, and its tokenizer.

    It is the one that is given. Without one, the reference of the small Llama is trained like it, on the retain set
    only, and any other model has none (None).

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If its chat template does not read one of the options, or there is none.
    """
    name = reference_name(options, splits)
    if name is not None:
        loaded = load_pretrained(name, options.loading.of_reference())
        set_format(loaded[1], options.data.chat_template_kwargs, options.data.prompt_format)
        return loaded
    if not options.model.scratch:
        return None
    return scratch_model(
        to_keep(splits),
        ScratchSettings(seed=options.output.seed),
        tokenizer_texts=tokenizer_texts(options.data, splits),
        description="Training the reference, which never sees the forget set",
    )


def tokenizer_texts(data: DataOptions, splits: Mapping[str, Sequence[Example]]) -> list[str]:
    """What the small Llama's tokenizer is trained on.

    That is more text than the model learns where there is more: a tokenizer that is trained on a few answers only turns
    whole answers into single tokens.
    """
    rows: Sequence[Mapping[str, Any]]
    if data.tofu is not None:
        everything = tofu_examples(data.tofu, data.tofu_dir)
        rows = [*everything["retain"], *everything["forget"]]
    elif data.from_files:
        rows = [*to_keep(splits), *splits["forget"]]
    else:
        rows = fictional_authors(_TOKENIZER_AUTHORS)
    return [f"Q: {row['question']}\nA: {row['answer']}" for row in rows]


def check_start(options: Options, splits: Mapping[str, Sequence[Example]]) -> Pretrained | None:
    """See that the model that is to forget can read all examples, without loading its weights.

    Returns:
        What is known of it; None of the small Llama.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it cannot read them; the message names the example.
    """
    if options.model.scratch:
        return None
    sharded = isinstance(options, UnlearnOptions) and options.training.sharded
    known = check_pretrained(options.model.model, options.loading, sharded=sharded)
    set_format(known.tokenizer, options.data.chat_template_kwargs, options.data.prompt_format)
    if isinstance(options, UnlearnOptions) and options.first.finetune_first:
        identity_to_teach(options.model.model, options.loading)
    if isinstance(options, UnlearnOptions) and options.method.method != "uld":
        check_rank(known.config, options.training.lora_rank)
    if isinstance(options, UnlearnOptions):
        _check_teacher(options, known)
    scored = {split: rows[: options.evaluation.evaluation_examples] for split, rows in splits.items()}
    trained = {name: splits[name] for name in ("forget", "retain") if isinstance(options, UnlearnOptions)}
    check_examples(known.tokenizer, {**scored, **trained}, options.data.max_length, known.config)
    return known


def _check_teacher(options: UnlearnOptions, known: Pretrained) -> None:
    name = options.method.teacher
    if name is None:
        return
    vocabulary = check_pretrained(name, options.loading.of_reference()).tokenizer.get_vocab()
    if vocabulary != known.tokenizer.get_vocab():
        raise ValueError(
            f"--teacher: expected a model with the same tokenizer as --model, whose probabilities can be compared token by token, found "
            f"{len(vocabulary)} other tokens in {name!r}; give the model that it was fine-tuned from"
        )
