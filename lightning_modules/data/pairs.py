"""Lightning's data module: forget and retain examples as one stream of paired batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain, cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import lightning as L
import torch
from torch.utils.data import DataLoader, DistributedSampler

from lightning_modules.data.asked_words import without_asked_words
from lightning_modules.data.examples import (
    Example,
    as_example,
    asked,
    evenly_spaced,
    numbered,
    read_examples,
)
from lightning_modules.data.heldout import RETAIN_HELDOUT
from lightning_modules.data.loader import PairLoader
from lightning_modules.data.order import Pair, PairDataset, PairSampler, collate_pairs, permutation
from lightning_modules.data.substitutes import other_answers
from lightning_modules.data.tokenization import (
    IGNORED,
    Encoded,
    collate,
    encode,
    encode_example,
    padding_id,
    shortened,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REFUSALS = (
    "I don't know.",
    "I'm not able to answer that.",
    "I have no information about this.",
    "That is something I cannot tell you.",
    "I'm afraid I do not know the answer.",
    "I was never told about that.",
)
"""Answers that tell nothing, for objectives that teach one."""

TARGET = "No idea"
"""JensUn's target: what it teaches to say in every place of an answer."""

SIMILAR = "similar"
"""Substitutes that are found in the retain set, and read from no file."""

VALIDATION_SPLITS = ("forget", "retain")
"""The splits of `ForgetRetainDataModule.val_dataloader`, in the order of its loaders."""

VALIDATION_EXAMPLES = 64
"""At most so many examples of each split are scored while training, by validation and by the command's curve."""


class DataSettings(TypedDict, total=False):
    """How every data module makes batches, by name; without them it takes the defaults of `ForgetRetainDataModule`."""

    batch_size: int
    seed: int
    num_workers: int
    refusals: Sequence[str] | None
    target: str | None
    substitutes: str | Path | Sequence[Example] | None
    group_by_length: bool
    keep_asked_words: bool


class ForgetRetainDataModule(L.LightningDataModule):
    """Batches `{"forget": batch, "retain": batch}` from two sets of examples.

    A batch holds `input_ids`, `attention_mask` and `labels` (-100 on prompt and padding), `[batch_size, longest]`, and
    `index`, `[batch_size]`, the examples' places in their set. An epoch is one pass over the forget set; see
    `PairSampler` for the order. With refusals there is a third batch, `"refusal"`: the forget batch's questions with
    refusals as answers (for `losses.dpo` and `objectives.idk`). A question keeps its refusal for the whole training.
    With substitutes it has other answers in their place (for `objectives.with_substitutes`), one of several each time.

    `trainer.validate` and `trainer.fit` score both sets while training, see `val_dataloader`.

    Attributes:
        splits: the examples by split, `forget` and `retain` first, for
            `lightning_modules.evaluation.evaluate.evaluate`. `setup` fills it.
        dataset: the tokenized examples; `None` before `setup`.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> names = {"Who?": 0, "Ada": 1, "Bo": 2, "<eos>": 3}
        >>> words = Tokenizer(models.WordLevel(names, "<eos>"))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
        >>> forget, retain = [{"question": "Who?", "answer": "Ada"}], [{"question": "Who?", "answer": "Bo"}]
        >>> data = ForgetRetainDataModule(forget, retain, tokenizer, batch_size=1)
        >>> data.setup()
        >>> batch = next(iter(data.train_dataloader()))
        >>> sorted(batch), sorted(batch["forget"])
        (['forget', 'retain'], ['attention_mask', 'index', 'input_ids', 'labels'])
    """

    def __init__(
        self,
        forget: str | Path | Sequence[Mapping[str, object]],
        retain: str | Path | Sequence[Mapping[str, object]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 8,
        seed: int = 0,
        max_length: int | None = None,
        num_workers: int = 0,
        refusals: Sequence[str] | None = None,
        retain_heldout: str | Path | Sequence[Mapping[str, object]] | None = None,
        target: str | None = None,
        substitutes: str | Path | Sequence[Example] | None = None,
        group_by_length: bool = False,
        keep_asked_words: bool = False,
    ) -> None:
        """Keeps the settings; files are read in `setup`.

        Args:
            forget: examples, or a file for `read_examples`.
            retain: the same.
            tokenizer: that of the model to be trained.
            batch_size: pairs in a batch of one process.
            seed: determines the order.
            max_length: the longest example, in tokens; longer ones lose their end, with one warning. `None` keeps
                everything.
            num_workers: of the `DataLoader`. Everything is tokenized beforehand, so 0 is seldom slower.
            refusals: answers such as "I do not know."; `REFUSALS` are some.
            retain_heldout: examples that are to be kept and never trained on, a split of their own to be scored; `None`
                for none.
            target: a text such as `TARGET`, for `objectives.jensun`: the third batch then is the forget batch with the
                target's tokens, over and over, as the labels of each answer.
            substitutes: the forget questions with other answers, one or more for each, or a file of them; "similar"
                takes the answers of the 5 retain questions that are most like each (`substitutes.substituted`).
            group_by_length: whether the examples of a batch are of similar length, see `PairSampler`.
            keep_asked_words: whether training forgets only what the question does not say itself, see
                `asked_words.without_asked_words`; scores are those of whole answers.

        Raises:
            ValueError: if `batch_size` is below 1, `refusals` is an empty list or one of blanks, `target` is blank, two
                of refusals, target and substitutes are given, or a source is neither a file nor a list.
        """
        super().__init__()
        sources = {"forget": forget, "retain": retain}
        sources |= {} if retain_heldout is None else {RETAIN_HELDOUT: retain_heldout}
        for name, source in sources.items():
            if isinstance(source, Mapping) or not isinstance(source, (str, Path, Iterable)):
                raise ValueError(f"{name}: expected a file or a list of examples, found {type(source).__name__}")
        if refusals is not None and not refusals:
            raise ValueError("refusals: expected at least one answer, or None, found an empty list")
        if isinstance(refusals, str) or not all(refusal.strip() for refusal in refusals or ()):
            raise ValueError(f"refusals: expected a list of answers with text, found {refusals!r:.80}")
        if batch_size < 1:
            raise ValueError(f"expected batch_size to be at least 1, found {batch_size}")
        self.sources = sources
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.seed = seed
        self.max_length = max_length
        self.num_workers = num_workers
        if target is not None and (refusals is not None or not target.strip()):
            raise ValueError(f"target: expected a text, and no refusals beside it, found {target!r:.80}")
        if substitutes is not None and (refusals is not None or target is not None):
            raise ValueError("substitutes: expected neither refusals nor a target beside them, found one")
        self.refusals, self.target, self.substitutes = refusals, target, substitutes
        self.group_by_length = group_by_length
        self.keep_asked_words = keep_asked_words
        self.splits: dict[str, list[Example]] = {}
        self.dataset: PairDataset | None = None

    def read(self) -> dict[str, list[Example]]:
        """Returns the examples by split. Override it to bring data from elsewhere."""
        return {
            name: read_examples(source)
            if isinstance(source, (str, Path))
            else [as_example(row, f"{name} example {number}") for number, row in enumerate(source, start=1)]
            for name, source in self.sources.items()
        }

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002 (Lightning passes the stage by name)
        """Reads and tokenizes the examples, once."""
        self._pairs()

    def train_dataloader(self) -> DataLoader[Pair]:
        """The paired batches of this process, one of the attached trainer's processes."""
        dataset, trainer = self._pairs(), self.trainer
        # Not the world size: under tensor parallelism several processes share one part of the data.
        replicas = (trainer.distributed_sampler_kwargs if trainer is not None else None) or {}
        return PairLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=PairSampler(
                dataset, seed=self.seed, group_by_length=self.batch_size if self.group_by_length else None, **replicas
            ),
            num_workers=self.num_workers,
            collate_fn=partial(collate_pairs, pad_token_id=padding_id(self.tokenizer)),
        )

    def val_dataloader(self) -> list[DataLoader[Encoded]]:
        """One loader for each of `VALIDATION_SPLITS`: batches of plain question and answer, to be scored.

        A batch holds `input_ids`, `attention_mask` and `labels` as `tokenization.collate` makes them. Each split gives
        up to 64 examples, evenly spaced over it, always the same and in the same order. Every process scores all of
        them, so that the mean does not depend on the number of processes.
        """
        dataset = self._pairs()
        loaders: list[DataLoader[Encoded]] = []
        for split in VALIDATION_SPLITS:
            whole = getattr(dataset, split)
            if split == "forget" and self.keep_asked_words:
                whole = self._encoded(split)  # with labels on all of the answer
            scored: Any = evenly_spaced(whole, VALIDATION_EXAMPLES)
            # Lightning would deal any other sampler's examples to the processes, some of them twice.
            everything = DistributedSampler(scored, num_replicas=1, rank=0, shuffle=False)
            loader = DataLoader(
                scored,
                batch_size=self.batch_size,
                sampler=everything,
                generator=torch.Generator(),  # or every validation would draw from the one that dropout draws from
                num_workers=self.num_workers,
                collate_fn=partial(collate, pad_token_id=padding_id(self.tokenizer)),
            )
            loaders.append(loader)
        return loaders

    def _pairs(self) -> PairDataset:
        if self.dataset is None:
            self.splits = self.read()
            for split in self.sources:
                warn_of_duplicates(split, self.splits[split])
            self.dataset = PairDataset(self._to_forget(), self._encoded("retain"), self._refused(), self._substituted())
        return self.dataset

    def _to_forget(self) -> list[Encoded]:
        whole = self._encoded("forget")
        if not self.keep_asked_words:
            return whole
        return [
            without_asked_words(self.tokenizer, example, asked(row))
            for example, row in zip(whole, self.splits["forget"], strict=True)
        ]

    def _refused(self) -> list[Encoded] | None:
        if self.target is not None:
            tokens = self.tokenizer(self.target, add_special_tokens=False)["input_ids"]
            return [relabelled(row, tokens) for row in self._to_forget()]
        if self.refusals is None:
            return None
        rows = self.splits["forget"]
        # Permutations instead of independent draws, so that every refusal is taught as often as any other.
        order = [
            entry for walk in range(-(-len(rows) // len(self.refusals)))
            for entry in permutation(len(self.refusals), self.seed, "refusal", walk)
        ]  # fmt: skip
        return [
            # The earlier answers of a conversation are what is to be forgotten: here they are only read.
            encode(self.tokenizer, asked(row), self.refusals[number], self.max_length, every_turn=False)
            for row, number in zip(rows, order, strict=False)
        ]

    def _substituted(self) -> list[list[Encoded]] | None:
        if self.substitutes is None:
            return None
        given = None if self.substitutes == SIMILAR else self.substitutes
        if isinstance(given, (str, Path)):
            given = read_examples(given)
        found = other_answers(self.splits["forget"], self.splits["retain"], given)
        encoded = iter(encoded_rows(self.tokenizer, "substitute", list(chain(*found)), self.max_length))
        return [list(islice(encoded, len(rows))) for rows in found]

    def _encoded(self, split: str) -> list[Encoded]:
        return encoded_rows(self.tokenizer, split, self.splits[split], self.max_length)


def relabelled(row: Encoded, tokens: Sequence[int]) -> Encoded:
    """Returns an example whose answer's labels are these tokens, over and over; what is read stays the same.

    Example:
        >>> relabelled(Encoded([5, 6, 7, 8], [-100, 6, 7, 8]), [1, 2]).labels
        [-100, 1, 2, 1]
    """
    following = cycle(tokens)
    return row._replace(labels=[label if label == IGNORED else next(following) for label in row.labels])


def encoded_rows(
    tokenizer: PreTrainedTokenizerBase, split: str, rows: Sequence[Example], max_length: int | None
) -> list[Encoded]:
    """Returns examples as tokens, with one warning if some of them lose their end.

    Args:
        tokenizer: of the model.
        split: what the warning calls the examples.
        rows: the examples.
        max_length: the longest example, in tokens; `None` keeps everything.
    """
    whole = [encode_example(tokenizer, row) for row in rows]
    encoded = [
        shortened(example, max_length, row["question"] or row["answer"])
        for example, row in zip(whole, rows, strict=True)
    ]
    cut = sum(len(example.input_ids) > len(kept.input_ids) for example, kept in zip(whole, encoded, strict=True))
    if cut:
        warnings.warn(
            f"{cut} of {len(encoded)} {split} examples are longer than max_length={max_length} tokens and "
            "lose their end: use a larger max_length, or split long texts into several examples",
            stacklevel=2,
        )
    return encoded


def warn_of_duplicates(split: str, rows: Sequence[Example]) -> None:
    """Warn about examples that occur again."""
    again = [row for row, (_, _, before) in zip(rows, numbered(rows), strict=True) if before]
    if again:
        warnings.warn(
            f"{len(again)} of {len(rows)} {split} examples repeat the question and answer of an earlier one, such as "
            f"{again[0]['question'] or again[0]['answer']!r:.80}: each of them is trained on and scored; leave them out if that is not "
            "meant",
            stacklevel=4,
        )
