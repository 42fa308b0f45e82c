"""Saving a model as it was found: with the tokenizer, chat template and generation settings of its own place."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn

from lightning_modules.files import replacing
from lightning_modules.run.adapter_folders import base_of_adapter, save_adapter, tokenizer_place
from lightning_modules.run.options.loading import LoadingOptions
from lightning_modules.run.places import place_of
from lightning_modules.training.merging import merged

_GENERATION = "generation_config.json"
_TOKENIZER = (
    *("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"),
)


def whole(model: nn.Module) -> Any:
    """The model with its adapters merged; half-precision weights become float32 first, so that nothing is lost."""
    if hasattr(model, "merge_and_unload") and any(weight.element_size() == 2 for weight in model.parameters()):
        model = model.float()
    return merged(model)


def write_model(
    folder: Path,
    model: Any,
    tokenizer: Any,
    start: tuple[str, LoadingOptions] | None,
    *,
    adapter_of: str | None = None,
) -> None:
    """Write a model and its tokenizer, the whole folder or nothing.

    Args:
        folder: Its place, which it takes from another one.
        model: Whole, or with the adapters that are to be saved alone.
        tokenizer: Of the model.
        start: Folder, hub name or GGUF file of the model before the training and how it was loaded, whose files are
            kept, see `keep_files`; None of a small Llama.
        adapter_of: The model that the adapters are for; None saves the whole model.
    """
    with replacing(folder) as temporary:
        if adapter_of is None:
            save_model(model, tokenizer, temporary)
        else:
            save_adapter(model, temporary, base=adapter_of, revision=None if start is None else start[1].revision)
            tokenizer.save_pretrained(temporary)
        if start is not None:
            keep_files(*start, temporary, tokenizer)


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save a whole model with its tokenizer, as Transformers writes both."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def keep_files(name: str, loading: LoadingOptions, folder: Path, tokenizer: Any) -> None:
    """Put a model's own files over what Transformers wrote for its tokenizer and for generation, byte for byte.

    Nothing in them has changed, and Transformers would write its version, its order of keys and its defaults. But
    Transformers may have chosen the tokenizer's class by the kind of model, such as Qwen2's, which splits numbers
    whatever its files say. In a folder of another kind, ULD's or an adapter's, these files would be another tokenizer:
    there its class and its rules are written down.

    Args:
        name: Folder, hub name or GGUF file of the model before the training.
        loading: How it was loaded.
        folder: With the model after it.
        tokenizer: Of the model.
    """
    base = base_of_adapter(name, loading)
    at = {} if base is None else {base.name: base.loading}
    for file in _TOKENIZER:
        there = tokenizer_place(name, None if base is None else base.name)
        _copy(place_of(there)[0], file, at.get(there, loading), folder)
    if (folder / _GENERATION).exists():
        there = name if base is None else base.name
        _copy(place_of(there)[0], _GENERATION, at.get(there, loading), folder)
    if not _is_read_as(type(tokenizer), folder, loading):
        tokenizer.save_pretrained(folder)


def _is_read_as(kind: type, folder: Path, loading: LoadingOptions) -> bool:
    from transformers import AutoTokenizer

    try:
        return type(AutoTokenizer.from_pretrained(folder, trust_remote_code=loading.trust_remote_code)) is kind
    except Exception:  # whatever the files lack: what was trained is not lost for that
        return False


def _copy(place: str, file: str, loading: LoadingOptions, folder: Path) -> None:
    from transformers.utils import cached_file

    found = cached_file(
        place,
        file,
        local_files_only=True,  # what was loaded is here
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
        **loading.at,
    )
    if found is not None:
        shutil.copyfile(found, folder / file)
