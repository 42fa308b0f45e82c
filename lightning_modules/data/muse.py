"""The MUSE benchmark: forget news articles or books, from a folder or from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, get_args

from lightning_modules.data.examples import Example
from lightning_modules.data.pairs import DataSettings, ForgetRetainDataModule
from lightning_modules.data.pieces import pieces
from lightning_modules.data.published import MUSECorpus, PublishedSplit, published_rows, text_of
from lightning_modules.data.tasks import CONTINUATION, MEMBERSHIP, TASK

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HUB_NAMES: dict[MUSECorpus, str] = {"news": "muse-bench/MUSE-News", "books": "muse-bench/MUSE-Books"}

_VERBATIM_TOKENS = 128  # of the continuation, and of the right text that it is compared with
_ANSWER_TOKENS = 32
_ANSWER_ENDS = ("\n\n", "\nQuestion", "Question:")


def muse_examples(
    corpus: MUSECorpus, tokenizer: PreTrainedTokenizerBase, folder: str | Path | None = None, max_length: int = 2048
) -> dict[str, list[Example]]:
    r"""Returns MUSE's texts in pieces, and what its authors score a model with.

    MUSE (Shi et al. 2024, arXiv 2407.06460). `forget` and `retain` are trained on: the splits `forget` and `retain1`
    of the configuration `raw`, in pieces of at most `max_length` tokens (`pieces.pieces`). The rest are tasks
    (`lightning_modules.data.tasks`), in the authors' own words:

    - `verbmem_forget`: what follows each `prompt` of `verbmem/forget`, 128 tokens, against the first 128 tokens of
      `gt`; as their code counts, a bos is one of them. The paper prompts with the first 200 tokens of a text, their
      data has the prompts ready, and they are taken as they are.
    - `knowmem_forget`, `knowmem_retain`: the answer to `Question: {question}\nAnswer: `, 32 tokens, up to an empty
      line or the next question, after the ten solved questions of `knowmem/{forget,retain}_qa_icl` in the same form.
    - `privleak_forget`, `privleak_holdout`: the texts that an attack has to tell apart, Min-K% of their tokens, whole
      as far as the model reads, without an eos.

    ROUGE-L is the F1 without stems, as their code has it (`metrics.functional.rouge_f1`); the paper does not say
    which. No chat template is used: their models have none. PrivLeak needs a retrained model; the AUC of the authors'
    own, Llama 2 of 7B, is .523 on news and .461 on books (1 minus theirs, which counts the other way round).

    Pieces are cut between words and end with an eos like every text here; the authors' are cut between tokens and do
    not, and of an article longer than a piece they take the beginning only.

    Args:
        corpus: `"news"` or `"books"`.
        tokenizer: of the model, for the pieces.
        folder: holds `raw/forget.json`, `knowmem/forget_qa.json` and so on, or a clone of the hub's repository; `None`
            loads from the hub, which needs the `datasets` package.
        max_length: the longest piece, in tokens.

    Raises:
        ValueError: for an unknown corpus, or rows without the columns of MUSE.
        FileNotFoundError: if the folder lacks a split.
        RuntimeError: if the hub cannot be reached.
    """
    if corpus not in get_args(MUSECorpus):
        raise ValueError(f"expected corpus to be one of {', '.join(get_args(MUSECorpus))}, found {corpus!r}")

    def rows(config: str, split: str) -> list[tuple[str, dict[str, Any]]]:
        return published_rows(PublishedSplit(HUB_NAMES[corpus], config, split), folder)

    def texts(config: str, split: str) -> list[str]:
        return [text_of(row, "text", where) for where, row in rows(config, split)]

    found: dict[str, list[Example]] = {
        name: [
            {"question": "", "answer": piece}
            for text in texts("raw", split)
            for piece in pieces(tokenizer, text, max_length)
        ]
        for name, split in (("forget", "forget"), ("retain", "retain1"))
    }
    found["verbmem_forget"] = [
        {
            "question": (prompt := text_of(row, "prompt", where)),
            "answer": text_of(row, "gt", where),
            TASK: CONTINUATION,
            "prompt": prompt,
            "max_new_tokens": _VERBATIM_TOKENS,
            "target_tokens": _VERBATIM_TOKENS,
            "stops": [],
        }
        for where, row in rows("verbmem", "forget")
    ]
    for split in ("forget", "retain"):
        asked, solved = (_questions(rows("knowmem", f"{split}_qa{ending}")) for ending in ("", "_icl"))
        shown = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in solved)
        found[f"knowmem_{split}"] = [
            {
                "question": question,
                "answer": answer,
                TASK: CONTINUATION,
                "prompt": f"{shown}Question: {question}\nAnswer: ",
                "max_new_tokens": _ANSWER_TOKENS,
                "target_tokens": 0,
                "stops": list(_ANSWER_ENDS),
            }
            for question, answer in asked
        ]
    for split in ("forget", "holdout"):
        found[f"privleak_{split}"] = [
            {"question": "", "answer": text, TASK: MEMBERSHIP} for text in texts("privleak", split)
        ]
    return found


def _questions(rows: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, str]]:
    return [(text_of(row, "question", where), text_of(row, "answer", where)) for where, row in rows]


class MUSEDataModule(ForgetRetainDataModule):
    """The MUSE benchmark: forget articles or books, keep others. See `lightning_modules.data.muse.muse_examples`."""

    def __init__(
        self,
        corpus: MUSECorpus,
        tokenizer: PreTrainedTokenizerBase,
        *,
        folder: str | Path | None = None,
        max_length: int = 2048,
        **settings: Unpack[DataSettings],
    ) -> None:
        """Keeps the settings.

        Args:
            corpus: `"news"` or `"books"`.
            tokenizer: that of the model to be trained; the texts are cut into pieces of its tokens.
            folder: holds MUSE's files; `None` loads from the hub. See `muse_examples`.
            max_length: the longest piece of a text, in tokens; 2048 are the authors'.
            settings: as in `ForgetRetainDataModule`, see `lightning_modules.data.pairs.DataSettings`.
        """
        super().__init__((), (), tokenizer, max_length=max_length, **settings)
        self.corpus: MUSECorpus = corpus
        self.folder = folder
        self.piece_length = max_length

    def read(self) -> dict[str, list[Example]]:
        """Returns the pieces to forget and to keep, and the benchmark's tasks."""
        return muse_examples(self.corpus, self.tokenizer, self.folder, self.piece_length)
