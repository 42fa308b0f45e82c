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
from lightning_modules.run.options import DataOptions, MethodOptions, Options, UnlearnOptions
from lightning_modules.run.overlap import check_overlap
from lightning_modules.training import objectives
from lightning_modules.training.scratch import ScratchSettings, scratch_model

_TOKENIZER_AUTHORS = 100
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
"""A model's own Python is never run. Without this, Transformers asks whoever sits at the terminal, and waits."""


def make_data(options: Options, tokenizer: Any) -> ForgetRetainDataModule:
    """The data module that the options describe.

    Args:
        options: Of a command. `evaluate` trains nothing; its data module is there to be read.
        tokenizer: Of the model; None if only `read()` is called, which gives the splits as text.

    Raises:
        ValueError: If there are too few authors to forget a fifth of them.
    """
    data = options.data
    common: dict[str, Any] = {"seed": options.output.seed, "max_length": data.max_length}
    if isinstance(options, UnlearnOptions):
        common |= {"batch_size": options.training.batch_size, "refusals": _refusals(options.method)}
    if data.tofu is not None:
        authors = data.authors if options.model.scratch else None
        common |= {"num_authors": authors, "forget_authors": data.forget_authors}
        return TOFUDataModule(data.tofu, tokenizer, folder=data.tofu_dir, **common)
    if data.forget is not None and data.retain is not None:
        return ForgetRetainDataModule(data.forget, data.retain, tokenizer, **common)
    forgotten = data.authors // 5 if data.forget_authors is None else data.forget_authors
    if not forgotten:
        raise ValueError(
            f"expected at least 5 authors, so that a fifth of them can be forgotten, or --forget-authors, found {data.authors}"
        )
    rows = fictional_authors(data.authors)
    kept = (data.authors - forgotten) * QUESTIONS_PER_AUTHOR
    return ForgetRetainDataModule(rows[kept:], rows[:kept], tokenizer, **common)


def read_splits(options: Options) -> dict[str, list[Example]]:
    """The examples to score, by split: those of the data module, and the holdout, on which nothing is trained.

    It warns about rows that are in the forget and in the retain set.

    Raises:
        ValueError: If an example of the holdout is in another split too, or the whole forget set in the retain set.
        FileNotFoundError: If a file is missing.
    """
    splits = make_data(options, None).read()
    check_overlap(splits)
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


def _refusals(method: MethodOptions) -> Sequence[str] | None:
    """Answers that refuse, one a line of the file; None where the forget loss needs none."""
    if not objectives.needs_refusals(objectives.by_name(method.forget_loss)):
        return None
    if method.refusals is None:
        return REFUSALS
    return [line.strip() for line in Path(method.refusals).read_text(encoding="utf-8").splitlines() if line.strip()]


def load_model(options: Options, splits: Mapping[str, Sequence[Example]]) -> tuple[nn.Module, Any]:
    """The model that is to forget, and its tokenizer.

    Raises:
        FileNotFoundError: If there is no such model.
    """
    if not options.model.scratch:
        return load_pretrained(options.model.model)
    return scratch_model(
        [*splits["retain"], *splits["forget"]],
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
    """
    if options.evaluation.reference is not None:
        return load_pretrained(options.evaluation.reference)
    if not options.model.scratch:
        return None
    return scratch_model(
        splits["retain"],
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
    elif data.forget is not None:
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
        model = AutoModelForCausalLM.from_pretrained(name, dtype="float32", **NO_CODE)
        return model, AutoTokenizer.from_pretrained(name, **NO_CODE)


def check_pretrained(name: str) -> None:
    """Load only a model's configuration and tokenizer, so that most wrong names are refused before any work is done.

    Raises:
        FileNotFoundError: As `load_pretrained`.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import find_adapter_config_file

    with _known(name):
        if find_adapter_config_file(name) is None:  # the folder of an adapter has no configuration of a model
            AutoConfig.from_pretrained(name, **NO_CODE)
        AutoTokenizer.from_pretrained(name, **NO_CODE)


@contextmanager
def _known(name: str) -> Generator[None]:
    """Turn what Transformers raises about a model that it cannot load into a FileNotFoundError with the name in it."""
    _ = gs.logit_difference.LogitDifferenceModel  # importing it registers its configuration with Transformers
    try:
        yield
    except (OSError, ValueError) as error:
        where = (
            "is a folder without a loadable model"
            if Path(name).is_dir()
            else "is neither a folder nor a model on the hub"
        )
        raise FileNotFoundError(f"--model or --reference: {name!r} {where}: {error}") from error
