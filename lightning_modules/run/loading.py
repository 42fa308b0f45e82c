"""From options to examples, models and tokenizers."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

import gradsurgery as gs
from lightning_modules.data.examples import Example, read_examples
from lightning_modules.data.fictional_authors import QUESTIONS_PER_AUTHOR, fictional_authors
from lightning_modules.data.pairs import REFUSALS, ForgetRetainDataModule, TOFUDataModule
from lightning_modules.data.tofu import tofu_examples, tofu_split
from lightning_modules.evaluation.membership import HOLDOUT
from lightning_modules.run.options import DataOptions, UnlearnOptions
from lightning_modules.training import objectives
from lightning_modules.training.scratch import ScratchSettings, scratch_model

_TOKENIZER_AUTHORS = 100


def make_data(options: DataOptions, tokenizer: Any, batch_size: int = 8) -> ForgetRetainDataModule:
    """The data module that the options describe; `read()` gives its splits without a tokenizer."""
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "seed": options.seed,
        "max_length": options.max_length,
        "refusals": _refusals(options) if isinstance(options, UnlearnOptions) else None,
    }
    if options.tofu is not None:
        authors = options.authors if options.model == "scratch" else None
        common |= {"num_authors": authors, "forget_authors": options.forget_authors}
        return TOFUDataModule(options.tofu, tokenizer, folder=options.tofu_dir, **common)
    if options.forget is not None and options.retain is not None:
        return ForgetRetainDataModule(options.forget, options.retain, tokenizer, **common)
    forgotten = options.authors // 5 if options.forget_authors is None else options.forget_authors
    if not forgotten:
        raise ValueError(
            f"expected at least 5 authors, so that a fifth of them can be forgotten, or --forget-authors, found {options.authors}"
        )
    rows = fictional_authors(options.authors)
    kept = (options.authors - forgotten) * QUESTIONS_PER_AUTHOR
    return ForgetRetainDataModule(rows[kept:], rows[:kept], tokenizer, **common)


def read_splits(options: DataOptions) -> dict[str, list[Example]]:
    """The examples to score by split: those of the data module, and the holdout, which no training reads.

    Raises:
        ValueError: If the holdout has examples that another split has too.
        FileNotFoundError: If a file is missing.
    """
    splits = make_data(options, None).read()
    if options.holdout is None:
        return splits
    holdout = _holdout(options.holdout, options)
    for split, rows in splits.items():
        seen = {(row["question"], row["answer"]) for row in rows}
        common = sum((row["question"], row["answer"]) in seen for row in holdout)
        if common:
            raise ValueError(
                f"--holdout: expected examples that no model has seen, found {common} of {len(holdout)} that are in {split} too: "
                f"give others than those of {options.holdout}"
            )
    return {**splits, HOLDOUT: holdout}


def _holdout(name: str, options: DataOptions) -> list[Example]:
    """A file, or with TOFU a split of it: a bare name has neither folder nor ending."""
    if options.tofu is not None and Path(name).name == name and not Path(name).suffix:
        return tofu_split(name, options.tofu_dir)
    return read_examples(name)


def _refusals(options: UnlearnOptions) -> Sequence[str] | None:
    if not objectives.needs_refusals(objectives.by_name(options.forget_loss)):
        return None
    if options.refusals is None:
        return REFUSALS
    return [line.strip() for line in Path(options.refusals).read_text(encoding="utf-8").splitlines() if line.strip()]


def load_model(options: DataOptions, splits: Mapping[str, Sequence[Example]]) -> tuple[nn.Module, Any]:
    """The model that is to forget, and its tokenizer.

    Raises:
        FileNotFoundError: If there is no such model.
    """
    if options.model != "scratch":
        return load_pretrained(options.model)
    return scratch_model(
        [*splits["retain"], *splits["forget"]],
        ScratchSettings(seed=options.seed),
        tokenizer_texts=_texts(options, splits),
        description="Training a small Llama on everything",
    )


def load_reference(options: DataOptions, splits: Mapping[str, Sequence[Example]]) -> tuple[nn.Module, Any] | None:
    """A model that never saw the forget set: given, or trained like the small Llama; None if there is none."""
    if options.reference is not None:
        return load_pretrained(options.reference)
    if options.model != "scratch":
        return None
    return scratch_model(
        splits["retain"],
        ScratchSettings(seed=options.seed),
        tokenizer_texts=_texts(options, splits),
        description="Training the reference, which never sees the forget set",
    )


def _texts(options: DataOptions, splits: Mapping[str, Sequence[Example]]) -> list[str]:
    """What the small model's tokenizer is trained on: more than it learns, or whole answers would become single tokens."""
    rows: Sequence[Mapping[str, Any]]
    if options.tofu is not None:
        everything = tofu_examples(options.tofu, options.tofu_dir)
        rows = [*everything["retain"], *everything["forget"]]
    elif options.forget is not None:
        rows = [*splits["retain"], *splits["forget"]]
    else:
        rows = fictional_authors(_TOKENIZER_AUTHORS)
    return [f"Q: {row['question']}\nA: {row['answer']}" for row in rows]


def load_pretrained(name: str) -> tuple[nn.Module, Any]:
    """A causal language model in float32 and its tokenizer, from a folder or the hub.

    Raises:
        FileNotFoundError: If it is neither.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _known(name):
        return AutoModelForCausalLM.from_pretrained(name, dtype="float32"), AutoTokenizer.from_pretrained(name)


def check_pretrained(name: str) -> None:
    """Load what is small of a model, its configuration and tokenizer: most wrong names fail here, before any work.

    Raises:
        FileNotFoundError: As `load_pretrained`.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import find_adapter_config_file

    with _known(name):
        if find_adapter_config_file(name) is None:  # an adapter's folder has no other configuration
            AutoConfig.from_pretrained(name)
        AutoTokenizer.from_pretrained(name)


@contextmanager
def _known(name: str) -> Generator[None]:
    _ = gs.logit_difference.LogitDifferenceModel  # makes its folders loadable
    try:
        yield
    except (OSError, ValueError) as error:
        where = (
            "is a folder without a loadable model"
            if Path(name).is_dir()
            else "is neither a folder nor a model on the hub"
        )
        raise FileNotFoundError(f"--model or --reference: {name!r} {where}: {error}") from error
