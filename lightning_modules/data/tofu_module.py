"""TOFU as a data module. `data.tofu`, which reads the examples, needs no Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from lightning_modules.data.examples import Example
from lightning_modules.data.pairs import DataSettings, ForgetRetainDataModule
from lightning_modules.data.tofu import tofu_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TOFUDataModule(ForgetRetainDataModule):
    """The TOFU benchmark: forget the last authors, keep the others. See `lightning_modules.data.tofu.tofu_examples`."""

    def __init__(
        self,
        split: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        folder: str | Path | None = None,
        num_authors: int | None = None,
        forget_authors: int | None = None,
        general: bool | None = None,
        max_length: int | None = None,
        heldout_authors: int = 0,
        **settings: Unpack[DataSettings],
    ) -> None:
        """Keeps the settings.

        Args:
            split: `"forget01"`, `"forget05"` or `"forget10"`.
            tokenizer: that of the model to be trained.
            folder: holds TOFU's files; `None` loads from the hub. See `tofu_examples`.
            num_authors: the number of authors to keep in the data; `None` for all.
            forget_authors: how many of them are to be forgotten; a fifth by default.
            general: whether questions about real authors and the world are scored too, see `tofu_examples`.
            max_length: the longest example, in tokens.
            heldout_authors: so many of the kept authors are never trained on, see `tofu_examples`.
            settings: as in `ForgetRetainDataModule`, see `DataSettings`.
        """
        super().__init__((), (), tokenizer, max_length=max_length, **settings)
        self.split = split
        self.folder = folder
        self.num_authors = num_authors
        self.forget_authors = forget_authors
        self.general = general
        self.heldout_authors = heldout_authors

    def read(self) -> dict[str, list[Example]]:
        """Returns the forget and retain examples, and without `num_authors` also `real_authors` and `world_facts`."""
        return tofu_examples(
            self.split,
            self.folder,
            self.num_authors,
            self.forget_authors,
            general=self.general,
            heldout_authors=self.heldout_authors,
        )
