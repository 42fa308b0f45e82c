"""From options to examples, models and tokenizers."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

import gradsurgery as gs
from lightning_modules.data.chat import set_template_options
from lightning_modules.data.examples import Example, read_examples
from lightning_modules.data.fictional_authors import QUESTIONS_PER_AUTHOR, fictional_authors
from lightning_modules.data.files import read_text
from lightning_modules.data.pairs import REFUSALS, ForgetRetainDataModule, TOFUDataModule
from lightning_modules.data.tofu import tofu_examples, tofu_split
from lightning_modules.evaluation.membership import HOLDOUT
from lightning_modules.run.adapter_folders import base_of_adapter, tokenizer_place, with_saved_adapter
from lightning_modules.run.first import identity_to_teach, taught_folder
from lightning_modules.run.identity import NO_CODE
from lightning_modules.run.options import DataOptions, MethodOptions, Options, UnlearnOptions
from lightning_modules.run.overlap import check_overlap
from lightning_modules.run.soundness import check_config, check_examples, check_tokenizer, check_weights
from lightning_modules.training import objectives
from lightning_modules.training.merging import merged
from lightning_modules.training.scratch import ScratchSettings, scratch_model

_TOKENIZER_AUTHORS = 100
_LONGEST = 400  # letters of what Transformers says, which can be a list of all its models


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
        training = options.training
        common |= {"batch_size": training.batch_size, "group_by_length": training.group_by_length}
        common |= {"refusals": _refusals(options.method)}
    if data.tofu is not None:
        authors = data.authors if options.chooses_authors else None
        common |= {"num_authors": authors, "forget_authors": data.forget_authors, "general": not options.model.scratch}
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
    set_template_options(loaded[1], options.data.chat_template_kwargs)
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
    if isinstance(options, UnlearnOptions):
        return load_to_train(name, options.training.save)
    return load_pretrained(name)


def load_to_train(name: str, save: str = "merged") -> tuple[nn.Module, Any]:
    """As `load_pretrained`, of a model that is to be trained: an adapter is merged into its model.

    Args:
        name: Folder or hub name.
        save: What will be saved, "merged" or "adapter".

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it is an adapter that cannot be merged, or would be saved as another.
    """
    model, tokenizer = load_pretrained(name)
    if base_of_adapter(name) is not None:
        if save == "adapter":
            raise ValueError(
                f"--save adapter: expected a whole model as --model, found {name!r}, an adapter; merge it into "
                "its model and save that first, or use --save merged"
            )
        model = merged(model)
        if hasattr(model, "disable_adapter"):
            raise ValueError(
                f"--model: expected a model, or an adapter that can be merged into one, such as LoRA, found another kind in {name!r}"
            )
        model.requires_grad_(True)  # peft had frozen all of it
    return model, tokenizer


def _small(options: Options, splits: Mapping[str, Sequence[Example]]) -> tuple[nn.Module, Any]:
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
        ValueError: If its chat template does not read one of the options, or there is none.
    """
    name = reference_name(options, splits)
    if name is not None:
        loaded = load_pretrained(name)
        set_template_options(loaded[1], options.data.chat_template_kwargs)
        return loaded
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
    """A causal language model in float32 and its tokenizer, from a folder or the hub. Nothing in them is executed.

    A PEFT adapter is loaded on the model that it names, as a `PeftModel`.

    Raises:
        FileNotFoundError: If it is neither.
        ValueError: If it is no causal language model, or weights are missing, of another shape or not finite.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gradsurgery.logit_difference.model import LogitDifferenceConfig

    config = check_pretrained(name).config
    # A model of two models loads them itself, and says nothing about it.
    single = not isinstance(config, LogitDifferenceConfig)
    reports: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True} if single else {}
    with _known(name):
        base = base_of_adapter(name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(base or name, dtype="float32", **NO_CODE, **reports)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_place(name, base), **NO_CODE)
    model, found = loaded if single else (loaded, {})
    check_weights(name, model, found)
    if base is not None:
        with _known(name):
            model = with_saved_adapter(model, name)
    return model, tokenizer


class Pretrained(NamedTuple):
    """What is known of a model before its weights are loaded.

    Attributes:
        config: Its configuration; that of its base for an adapter.
        tokenizer: Its tokenizer.
    """

    config: Any
    tokenizer: Any


def check_pretrained(name: str, chat_template_kwargs: Mapping[str, Any] | None = None) -> Pretrained:
    """Load only a model's configuration and tokenizer, so that most wrong names are refused before any work is done.

    Raises:
        FileNotFoundError: As `load_pretrained`.
        ValueError: If it is no causal language model, its tokenizer cannot write an example, or its chat template does
            not read one of these options.
    """
    from transformers import AutoConfig, AutoTokenizer

    with _known(name):
        base = base_of_adapter(name)
        config = AutoConfig.from_pretrained(base or name, **NO_CODE)
    check_config(name, config)
    with _known(name):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_place(name, base), **NO_CODE)
    check_tokenizer(name, tokenizer)
    set_template_options(tokenizer, chat_template_kwargs or {})
    return Pretrained(config, tokenizer)


def check_start(options: Options, splits: Mapping[str, Sequence[Example]]) -> None:
    """See that the model that is to forget can read all examples, without loading its weights.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it cannot read them; the message names the example.
    """
    if options.model.scratch:
        return
    known = check_pretrained(options.model.model, options.data.chat_template_kwargs)
    if isinstance(options, UnlearnOptions) and options.first.finetune_first:
        identity_to_teach(options.model.model)
    if isinstance(options, UnlearnOptions) and options.method.method != "uld":
        check_rank(known.config, options.training.lora_rank)
    scored = {split: rows[: options.evaluation.evaluation_examples] for split, rows in splits.items()}
    trained = {name: splits[name] for name in ("forget", "retain") if isinstance(options, UnlearnOptions)}
    check_examples(known.tokenizer, {**scored, **trained}, options.data.max_length, known.config)


def check_rank(config: Any, rank: int) -> None:
    """Raise ValueError if adapters of this rank are wider than the model of this configuration."""
    width = getattr(config.get_text_config(), "hidden_size", None) or math.inf
    if rank > width:
        raise ValueError(
            f"--lora-rank: expected at most the model's width, {width}, found {rank}: such adapters are larger than the weights"
        )


@contextmanager
def _known(name: str) -> Generator[None]:
    """Turn what Transformers raises about a model that it cannot load into a FileNotFoundError with the name in it."""
    _ = gs.logit_difference.LogitDifferenceModel  # importing it registers its configuration with Transformers
    try:
        yield
    # A damaged file can make its reader raise anything; the advice is the same.
    except Exception as error:
        said = " ".join(str(error).split())
        if isinstance(error, pickle.UnpicklingError):
            said = (
                "weights in a pickle that is broken or would run code, which is never done; convert them to safetensors"
            )
        elif not isinstance(error, (OSError, ValueError)):
            said = f"{type(error).__name__}: {said}"
        where = (
            "is a folder without a loadable model"
            if os.path.isdir(name)
            else "is neither a folder nor a model on the hub"
        )
        raise FileNotFoundError(
            f"--model or --reference: {name!r:.200} {where}: expected config.json, safetensors and a tokenizer, found: "
            f"{said[:_LONGEST]}{'...' if len(said) > _LONGEST else ''}"
        ) from error
