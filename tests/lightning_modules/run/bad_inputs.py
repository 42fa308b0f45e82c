"""What every row of the tables of bad inputs is given, and what is asked of it: one sentence, nothing trained, nothing left."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lightning_modules import cli
from lightning_modules.training import scratch

REFUSED = (1, 2)
"""Exit codes of a refusal."""

ROWS = [{"question": f"Who wrote book {number}?", "answer": f"Author {number} did."} for number in range(8)]
QUESTIONS = json.dumps(ROWS[:2]), json.dumps(ROWS[2:])
"""What is to be forgotten and what is to be kept, as the text of a file."""

FILES = ["--model", "model", "--forget", "forget.json", "--retain", "retain.json", "--output", "out"]
"""Good options."""


class Row(NamedTuple):
    """A bad input.

    Attributes:
        name: Of the test.
        arguments: Folder with the good files of `kitchen` -> the command line; what is bad is made in that folder.
        said: What the message has to hold, in this order.
        loads: Whether the model has to be loaded before the fault can be seen.
    """

    name: str
    arguments: Callable[[Path], list[str]]
    said: tuple[str, ...]
    loads: bool = False


def model_folder(folder: Path, **sizes: Any) -> Path:
    """A Llama of a few hundred weights with a tokenizer of whole bytes, saved as Transformers saves it."""
    tokenizer = scratch._train_tokenizer([row["answer"] for row in ROWS])
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(
        **{"vocab_size": len(tokenizer), "max_position_embeddings": 128, "eos_token_id": tokenizer.eos_token_id}
        | small
        | sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def changed(**options: str) -> list[str]:
    """The good command line with other values of some options."""
    return ["unlearn", *FILES, *(word for name, value in options.items() for word in (f"--{name}", value))]


def given(name: str, *options: str, said: tuple[str, ...], loads: bool = False) -> Row:
    """A row of the good command line with further options."""
    return Row(name, lambda _: ["unlearn", *FILES, *options], said, loads)


def laid(name: str, files: dict[str, str | bytes], arguments: list[str], *said: str, loads: bool = False) -> Row:
    """A row with further files in the folder."""

    def lay(folder: Path) -> list[str]:
        for file, content in files.items():
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return arguments

    return Row(name, lay, said, loads)


def state(folder: Path) -> dict[str, str]:
    """Every file below, with a hash of what it holds. An empty folder is nothing yet."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def status(arguments: list[str]) -> int:
    """What the process would have ended with."""
    try:
        return cli.main(arguments)
    except SystemExit as error:
        return int(error.code or 0)


class WentToWorkError(BaseException):
    """No Exception, so that nothing makes a sentence of it."""


def forbid_work(patch: pytest.MonkeyPatch, *, loading: bool) -> None:
    """Let training raise, and loading weights too."""

    def work(*_: Any, **__: Any) -> None:
        raise WentToWorkError

    patch.setattr(L.Trainer, "fit", work)
    patch.setattr(scratch, "_train", work)
    if loading:
        patch.setattr(PreTrainedModel, "from_pretrained", work)
