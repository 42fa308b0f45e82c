"""The WMDP benchmark: forget hazardous knowledge of cyber or bio, from a folder or from the Hugging Face hub."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, get_args

from lightning_modules.data.examples import Example, read_examples
from lightning_modules.data.pairs import DataSettings, ForgetRetainDataModule
from lightning_modules.data.pieces import pieces
from lightning_modules.data.published import PublishedSplit, WMDPSubject, published_rows, text_of
from lightning_modules.data.tasks import LETTERS, multiple_choice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIELDS: dict[WMDPSubject, str] = {"bio": "biology", "cyber": "cybersecurity"}

_MMLU = PublishedSplit("cais/mmlu", "all", "test", within="mmlu")
_WIKITEXT = PublishedSplit("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
_SHORTEST = 50  # characters: shorter texts, wikitext's titles and empty lines, are left out, as the authors do

_CHARACTERS = 32  # more than a token has on average in any text


def wmdp_questions(subject: WMDPSubject, folder: str | Path | None = None) -> dict[str, list[Example]]:
    r"""Returns the multiple-choice questions of one subject of WMDP, and those of MMLU, by which retention is measured.

    WMDP (Li et al. 2024, arXiv 2403.03218): four answers each, asked without examples before them, in the words of
    lm-evaluation-harness (`tasks.multiple_choice`). They come in an order that is shuffled once and for all, so that
    the first n of them are a sample of all topics.

    Args:
        subject: `"bio"` or `"cyber"`.
        folder: holds `wmdp-cyber/test` or `cyber_questions` (bio likewise), and `mmlu/all/test`, each as `.json`,
            `.jsonl`, `.csv`, `.parquet` or shards `-*.parquet`; `None` loads `cais/wmdp` and `cais/mmlu` from the hub.

    Returns:
        `{"wmdp_<subject>": [...], "mmlu": [...]}`.

    Raises:
        ValueError: for an unknown subject, or rows without question, four choices and the place of the right one.
        FileNotFoundError: if the folder lacks one of them.
        RuntimeError: if the hub cannot be reached.
    """
    _check(subject)
    split = PublishedSplit("cais/wmdp", f"wmdp-{subject}", "test", (f"{subject}_questions",))
    found = {
        f"wmdp_{subject}": [_asked(row, where, _FIELDS[subject]) for where, row in published_rows(split, folder)],
        "mmlu": [
            _asked(row, where, text_of(row, "subject", where).replace("_", " "))
            for where, row in published_rows(_MMLU, folder)
        ],
    }
    for rows in found.values():
        random.Random(0).shuffle(rows)
    return found


def wmdp_texts(subject: WMDPSubject, split: Literal["forget", "retain"], folder: str | Path | None = None) -> list[str]:
    """Returns the texts that are trained on: the subject's forget corpus, or wikitext as what is to be kept.

    Texts of at most 50 characters are left out. The authors' script for cyber takes whole lines of JSON for the texts,
    brackets and `"text"` included; here the texts in them are taken.

    Args:
        subject: `"bio"` or `"cyber"`.
        split: `"forget"` or `"retain"`.
        folder: holds `cyber-forget-corpus` (bio likewise) and `wikitext-2-raw-v1/test`, see `wmdp_questions`; `None`
            loads `cais/wmdp-corpora` and `Salesforce/wikitext` from the hub, where bio's forget corpus is not: its
            authors give it on request.

    Raises:
        ValueError: as `wmdp_questions`, and for bio's forget corpus without a folder.
        FileNotFoundError: if the folder lacks it.
        RuntimeError: if the hub cannot be reached.
    """
    _check(subject)
    if split == "retain":
        return _texts(_WIKITEXT, folder)
    if subject == "bio" and folder is None:
        raise ValueError(
            "--wmdp bio: expected its forget corpus, which its authors give on request only, found neither --forget FILE nor --wmdp-dir "
            "FOLDER with bio-forget-corpus.jsonl in it"
        )
    config = f"{subject}-forget-corpus"
    return _texts(PublishedSplit("cais/wmdp-corpora", config, "train", (config,)), folder)


def _texts(wanted: PublishedSplit, folder: str | Path | None) -> list[str]:
    # Not `text_of`: wikitext has empty lines.
    rows = [(row.get("text"), where) for where, row in published_rows(wanted, folder)]
    for text, where in rows:
        if not isinstance(text, str):
            raise ValueError(f"{where}: expected text, found {text!r:.80}")
    found = [str(text) for text, _ in rows if len(str(text)) > _SHORTEST]
    if not found:
        raise ValueError(
            f"{wanted.config}: expected texts of more than {_SHORTEST} characters, found none in {len(rows)} rows"
        )
    return found


def _check(subject: str) -> None:
    if subject not in get_args(WMDPSubject):
        raise ValueError(f"expected subject to be one of {', '.join(get_args(WMDPSubject))}, found {subject!r}")


def _asked(row: dict[str, Any], where: str, field: str) -> Example:
    choices, right = (_cell(row.get(name)) for name in ("choices", "answer"))
    if not isinstance(choices, Sequence) or isinstance(choices, str) or len(choices) != len(LETTERS):
        raise ValueError(f"{where}: expected choices as a list of {len(LETTERS)} answers, found {choices!r:.80}")
    if isinstance(right, bool) or not isinstance(right, int) or not 0 <= right < len(LETTERS):
        raise ValueError(f"{where}: expected answer as the place of the right choice, 0 to 3, found {right!r:.80}")
    return multiple_choice(field, text_of(row, "question", where), [str(choice) for choice in choices], right)


def _cell(value: object) -> object:
    """What a cell of a CSV file says, where lists and numbers are text."""
    if isinstance(value, str):
        with suppress(json.JSONDecodeError):
            return json.loads(value)
    return value


class WMDPDataModule(ForgetRetainDataModule):
    """The WMDP benchmark: forget texts about hazardous knowledge, keep others, and ask about both.

    Of each text the beginning is trained on, as many tokens as an example may have, as the authors do. See
    `lightning_modules.data.wmdp.wmdp_questions` and `wmdp_texts`.
    """

    def __init__(
        self,
        subject: WMDPSubject,
        tokenizer: PreTrainedTokenizerBase,
        *,
        folder: str | Path | None = None,
        forget: str | Path | None = None,
        retain: str | Path | None = None,
        max_length: int = 512,
        **settings: Unpack[DataSettings],
    ) -> None:
        """Keeps the settings.

        Args:
            subject: `"bio"` or `"cyber"`.
            tokenizer: that of the model to be trained.
            folder: holds the questions and the corpora; `None` loads from the hub.
            forget: a file of texts to forget, for `read_examples`; for bio the only way without a folder.
            retain: a file of texts to keep, instead of wikitext.
            max_length: tokens of each text.
            settings: as in `ForgetRetainDataModule`, see `lightning_modules.data.pairs.DataSettings`.
        """
        super().__init__((), (), tokenizer, max_length=max_length, **settings)
        self.subject: WMDPSubject = subject
        self.folder = folder
        self.files = {"forget": forget, "retain": retain}
        self.longest = max_length

    def read(self) -> dict[str, list[Example]]:
        """Returns the texts to forget and to keep, and the questions."""
        found: dict[str, list[Example]] = {}
        for split in ("forget", "retain"):
            path = self.files[split]
            if path is None:
                rows = [{"question": "", "answer": text} for text in wmdp_texts(self.subject, split, self.folder)]
            else:
                rows = read_examples(path)
            found[split] = [row if row["question"] else self._beginning(row) for row in rows]
        return found | wmdp_questions(self.subject, self.folder)

    def _beginning(self, row: Example) -> Example:
        # Of a text of megabytes only what can be in the first piece is tokenized.
        text = row["answer"][: _CHARACTERS * self.longest]
        return {**row, "answer": pieces(self.tokenizer, text, self.longest)[0]}
