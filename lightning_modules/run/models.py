"""Models and tokenizers from a folder, the hub or a GGUF file, checked before their weights are loaded and after."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import gradsurgery as gs
from lightning_modules.run.adapter_folders import base_of_adapter, tokenizer_place, with_saved_adapter
from lightning_modules.run.compatible import check_config, check_tokenizer, check_weights
from lightning_modules.run.memory import check_fits
from lightning_modules.run.options.loading import USUAL, LoadingOptions
from lightning_modules.run.places import is_gguf, place_of
from lightning_modules.training.merging import merged

_LONGEST = 400  # letters of what Transformers says, which can be a list of all its models


def load_pretrained(name: str, loading: LoadingOptions = USUAL) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer, from a folder, the hub or a GGUF file, whose weights are dequantised.

    Nothing in them is executed, unless `loading` allows it. A PEFT adapter is loaded on the model that it names, as a
    `PeftModel`, and its own weights are float32.

    Args:
        name: Folder, hub name, or GGUF file.
        loading: The type of the weights, and how they are found.

    Raises:
        FileNotFoundError: If it is none of these.
        ValueError: If it is no causal language model, or weights are missing, of another shape or not finite.
    """
    from transformers import AutoModelForCausalLM

    from gradsurgery.logit_difference.model import LogitDifferenceConfig

    config, _ = _described(name, loading)
    # A model of two models loads them itself, and says nothing about it.
    single = not isinstance(config, LogitDifferenceConfig)
    reports: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True} if single else {}
    with _known(name):
        base = base_of_adapter(name, loading)
        place, file = place_of(base.name if base else name)
        files = (base.loading if base else loading).files
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place, **loading.weights, **files, **file, **_plain(file), **reports
        )
        tokenizer = _tokenizer(name, loading)
    model, found = loaded if single else (loaded, {})
    check_weights(name, model, found)
    if base is not None:
        with _known(name):
            model = with_saved_adapter(model, name, loading.revision)
    return model, tokenizer


def load_to_train(name: str, save: str = "merged", loading: LoadingOptions = USUAL) -> tuple[nn.Module, Any]:
    """As `load_pretrained`, of a model that is to be trained: an adapter is merged into its model, in float32.

    Args:
        name: Folder, hub name, or GGUF file.
        save: What will be saved, "merged" or "adapter".
        loading: As of `load_pretrained`.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it is an adapter that cannot be merged, or would be saved as another; if an adapter of a GGUF
            file would be saved.
    """
    if save == "adapter" and is_gguf(name):
        raise ValueError(
            f"--save adapter: expected a model that PEFT can load below the adapter, found the GGUF file {name!r}; use --save merged"
        )
    with _known(name):
        adapter = base_of_adapter(name, loading) is not None
    if not adapter:
        return load_pretrained(name, loading)
    if save == "adapter":
        raise ValueError(
            f"--save adapter: expected a whole model as --model, found {name!r}, an adapter; merge it into "
            "its model and save that first, or use --save merged"
        )
    model, tokenizer = load_pretrained(name, loading.in_float32())
    model = merged(model)
    if hasattr(model, "disable_adapter"):
        raise ValueError(
            f"--model: expected a model, or an adapter that can be merged into one, such as LoRA, found another kind in {name!r}"
        )
    model.requires_grad_(True)  # peft had frozen all of it
    return model.to(getattr(torch, loading.dtype)), tokenizer


class Pretrained(NamedTuple):
    """What is known of a model before its weights are loaded.

    Attributes:
        config: Its configuration; that of its base for an adapter.
        tokenizer: Its tokenizer.
        empty: The model itself without numbers, on the meta device; that of its base for an adapter. None where it
            cannot be made without its files.
    """

    config: Any
    tokenizer: Any
    empty: nn.Module | None


def check_pretrained(name: str, loading: LoadingOptions = USUAL, *, sharded: bool = False) -> Pretrained:
    """Load only a model's configuration and tokenizer, so that most wrong names are refused before any work is done.

    Args:
        name: Folder, hub name, or GGUF file.
        loading: As of `load_pretrained`.
        sharded: Whether several devices share the weights.

    Raises:
        FileNotFoundError: As `load_pretrained`.
        ValueError: If it is no causal language model, its tokenizer cannot write an example, its weights do not fit
            into memory, or the options of `loading` are not for it.
    """
    config, tokenizer = _described(name, loading)
    empty = _empty(name, config, loading)
    if empty is not None:
        check_fits(name, empty, sharded=sharded)
    return Pretrained(config, tokenizer, empty)


def _described(name: str, loading: LoadingOptions) -> tuple[Any, Any]:
    """Configuration and tokenizer, checked."""
    from transformers import AutoConfig

    loading.check()
    if loading.revision is not None and Path(name).exists():
        raise ValueError(
            f"--revision: expected a model on the hub, whose files have revisions, found {name!r} on this machine; leave it out"
        )
    if is_gguf(name) and find_spec("gguf") is None:
        raise ValueError(
            f"--model, --reference or --teacher: expected the package that reads {name!r}, found none: pip install 'gradsurgery[gguf]'"
        )
    with _known(name):
        base = base_of_adapter(name, loading)
        place, file = place_of(base.name if base else name)
        config = AutoConfig.from_pretrained(place, **(base.loading if base else loading).files, **file)
    check_config(name, config)
    with _known(name):
        tokenizer = _tokenizer(name, loading)
    check_tokenizer(name, tokenizer)
    return config, tokenizer


def load_tokenizer(name: str, loading: LoadingOptions = USUAL) -> Any:
    """A model's tokenizer alone.

    Raises:
        FileNotFoundError: If there is no such model.
    """
    with _known(name):
        return _tokenizer(name, loading)


def check_rank(config: Any, rank: int) -> None:
    """Raise ValueError if adapters of this rank are wider than the model of this configuration."""
    width = getattr(config.get_text_config(), "hidden_size", None) or math.inf
    if rank > width:
        raise ValueError(
            f"--lora-rank: expected at most the model's width, {width}, found {rank}: such adapters are larger than the weights"
        )


def _tokenizer(name: str, loading: LoadingOptions) -> Any:
    """The tokenizer; of a GGUF file the one beside it, which is exact, or else the one that the file describes."""
    from transformers import AutoTokenizer

    base = base_of_adapter(name, loading)
    there = tokenizer_place(name, None if base is None else base.name)
    place, file = place_of(there)
    if file and (Path(place) / "tokenizer_config.json").exists():
        file = {}
    files = (base.loading if base is not None and there == base.name else loading).files
    return AutoTokenizer.from_pretrained(place, **files, **file)


def _plain(file: dict[str, Any]) -> dict[str, Any]:
    """What makes Transformers dequantise a GGUF file; older versions always do."""
    if not file:
        return {}
    import transformers

    settings: Any = getattr(transformers, "GgufConfig", None)
    return {} if settings is None else {"quantization_config": settings(dequantize=True)}


def _empty(name: str, config: Any, loading: LoadingOptions) -> nn.Module | None:
    from transformers import AutoModelForCausalLM

    from gradsurgery.logit_difference.model import LogitDifferenceConfig

    if isinstance(config, LogitDifferenceConfig):
        return None
    try:
        with torch.device("meta"):
            made: Any = AutoModelForCausalLM.from_config(
                config, **loading.weights, trust_remote_code=loading.trust_remote_code
            )
            return made
    except Exception as error:  # whatever a model's own code makes of it
        if loading.attn_implementation is None:
            return None  # loading says what is wrong
        said = " ".join(str(error).split())
        raise ValueError(
            f"--attn-implementation: expected one that Transformers knows for {name!r} and this machine has, found "
            f"{loading.attn_implementation!r}: {said[:_LONGEST]}"
        ) from error


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
        if is_gguf(name):
            where = (
                "is no GGUF file that can be loaded" if os.path.isfile(name) else "is no GGUF file here or on the hub"
            )
            expected = "one of a causal language model of an architecture that Transformers reads"
        else:
            where = (
                "is a folder without a loadable model"
                if os.path.isdir(name)
                else "is neither a folder nor a model on the hub"
            )
            expected = "config.json, safetensors and a tokenizer"
        raise FileNotFoundError(
            f"--model, --reference or --teacher: {name!r:.200} {where}: expected {expected}, found: "
            f"{said[:_LONGEST]}{'...' if len(said) > _LONGEST else ''}"
        ) from error
