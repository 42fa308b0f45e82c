"""--finetune-first: which models are taught before unlearning, and where they are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from lightning_modules.data.examples import Example
from lightning_modules.data.formats import set_format
from lightning_modules.data.hashes import hashed
from lightning_modules.data.heldout import RETAIN_HELDOUT
from lightning_modules.data.tokenization import Encoded, encode_example, padding_id
from lightning_modules.folder import cache_folder
from lightning_modules.run.identity import content_versions, model_identity
from lightning_modules.run.models import load_tokenizer
from lightning_modules.run.options import LoadingOptions, Options, UnlearnOptions
from lightning_modules.training.finetuning import FinetuningSettings

FORMAT = 1
"""Raise it when the code changes what is trained, so that models in old caches are not taken for new ones."""
Part = Literal["target", "reference"]
SPLITS: dict[Part, tuple[str, ...]] = {
    "target": ("retain", RETAIN_HELDOUT, "forget"),
    "reference": ("retain", RETAIN_HELDOUT),
}
"""What is taught to whom, where there are such splits."""


@dataclass(frozen=True)
class Lesson:
    """Everything that decides a model that is taught first.

    Attributes:
        model: Folder or hub name of the model that is taught.
        loading: How it is loaded: in float32, because all its weights are trained.
        identity: What distinguishes it from every other one, see `identity.model_identity`.
        encoded: The examples.
        pad_token_id: Fills up shorter rows.
        settings: How it is taught.
        precision: By Lightning's name.
    """

    model: str
    loading: LoadingOptions
    identity: object
    encoded: list[Encoded]
    pad_token_id: int
    settings: FinetuningSettings
    precision: str

    @property
    def folder(self) -> Path:
        """Where the taught model is kept, under a hash of all that."""
        determining = {
            "format": FORMAT,
            "versions": content_versions(),
            "model": self.identity,
            "tokens": self.encoded,
            "settings": asdict(self.settings),
            "precision": self.precision,
            "device": self.device.type,
        }
        return cache_folder("finetuned") / hashed(determining)[:24]

    @property
    def device(self) -> torch.device:
        """Where it is taught."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def lesson(options: Options, splits: Mapping[str, Sequence[Example]], part: Part) -> Lesson | None:
    """What the target or the reference is taught; None without --finetune-first, and for a reference that is given.

    Cost: the examples are tokenized.

    Raises:
        ValueError: If the model has nothing that tells it from others, as an adapter.
    """
    if not isinstance(options, UnlearnOptions) or not options.first.finetune_first:
        return None
    if part == "reference" and options.evaluation.reference is not None:
        return None
    name = options.model.model
    loading = options.loading.in_float32()
    identity = identity_to_teach(name, loading)
    tokenizer = load_tokenizer(name, loading)
    set_format(tokenizer, options.data.chat_template_kwargs, options.data.prompt_format)
    rows = [row for split in SPLITS[part] for row in splits.get(split, ())]
    encoded = [encode_example(tokenizer, row, options.data.max_length) for row in rows]
    precision = options.training.precision or options.resolved().training.precision or "32-true"
    settings = options.first.settings(options.output.seed)
    return Lesson(name, loading, identity, encoded, padding_id(tokenizer), settings, precision)


def identity_to_teach(name: str, loading: LoadingOptions) -> object:
    """What distinguishes a model that is taught first, see `identity.model_identity`.

    Raises:
        ValueError: If there is no such thing.
    """
    identity = model_identity(name, loading.in_float32())
    if identity is None:
        raise ValueError(
            f"--finetune-first: expected a whole model, by whose files the taught one can be kept, found {name!r}, an adapter; merge it "
            "into its model, save that, and give its folder"
        )
    return identity


def is_taught(folder: Path) -> bool:
    """Whether the cache holds this model; a folder takes its place whole or not at all."""
    return (folder / "config.json").is_file()


def taught_folder(options: Options, splits: Mapping[str, Sequence[Example]], part: Part) -> str | None:
    """Where the taught model is; None if none is to be taught.

    Raises:
        ValueError: If it is not there.
    """
    found = lesson(options, splits, part)
    if found is None:
        return None
    if not is_taught(found.folder):
        raise ValueError(
            f"--finetune-first: expected the {part} in {found.folder}, found none: one process teaches it before others are started; start "
            "the command once with --devices 1, or teach it with `gradsurgery finetune` and give its model"
        )
    return str(found.folder)
