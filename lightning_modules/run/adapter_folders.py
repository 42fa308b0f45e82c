"""Adapters in folders, as PEFT writes and reads them: which model they are for, and how they are put on it."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from lightning_modules.run.options.loading import LoadingOptions
from lightning_modules.run.places import is_gguf


def save_adapter(model: Any, folder: Path, *, base: str, revision: str | None = None) -> None:
    """Save a `PeftModel`'s adapter, so that `PeftModel.from_pretrained(base model, folder)` gives this model.

    Args:
        model: With adapters, also from `gradsurgery.lora.fila_`: then the adapter is for the model before it.
        folder: To write into.
        base: Folder or hub name of the model that was adapted. A folder is written down as a whole path, because the
            adapter does not move with it.
        revision: Of a base on the hub.
    """
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
        config.revision = None if Path(base).is_dir() else revision
        config.task_type = "CAUSAL_LM"
    # Nothing is ever added to the vocabulary: peft would ask the hub whether to save the embeddings.
    model.save_pretrained(folder, save_embedding_layers=False)


class Base(NamedTuple):
    """The model that an adapter is for.

    Attributes:
        name: Folder or hub name.
        loading: How it is loaded.
    """

    name: str
    loading: LoadingOptions


def base_of_adapter(name: str, loading: LoadingOptions) -> Base | None:
    """The model that an adapter in a folder or on the hub is for; None if the name is that of a whole model.

    Args:
        name: Of the adapter, or of the model.
        loading: How it is loaded: the revision is the adapter's, and of its base the one that the adapter names.

    Raises:
        ValueError: If the adapter does not say it.
    """
    from transformers.utils import find_adapter_config_file

    if is_gguf(name) or find_adapter_config_file(name, **loading.at) is None:
        return None
    if (Path(name) / "config.json").exists():
        return Base(name, loading)  # a whole model with an adapter beside it, which is put on it
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(name, **loading.at)
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(
            "its adapter_config.json names no base_model_name_or_path; write the model that it is for there"
        )
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise ValueError(
            f"it is an adapter for the model in {base}, where there is no folder; put the model back, or write its place into "
            "adapter_config.json, base_model_name_or_path"
        )
    return Base(base, replace(loading, revision=config.revision))


def tokenizer_place(name: str, base: str | None) -> str:
    """Where the tokenizer is: beside the adapter, or else with the model that it is for."""
    if base is None or not Path(name).is_dir() or (Path(name) / "tokenizer_config.json").exists():
        return name
    return base


def with_saved_adapter(model: nn.Module, name: str, revision: str | None = None) -> nn.Module:
    """A saved adapter on its model, in evaluation mode and not to be trained.

    Args:
        model: That the adapter is for.
        name: Folder or hub name of the adapter.
        revision: Of it on the hub.

    Raises:
        ValueError: If weights of the adapter are missing in its file. (peft gives a warning, and the model as if they
            were zero.)
    """
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = PeftModel.from_pretrained(model, name, revision=revision)  # pyright: ignore[reportArgumentType]
    for warning in caught:
        if "missing adapter keys" in str(warning.message):
            raise ValueError(f"its adapter is not whole: {warning.message!s:.300}")
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return adapted.eval()
