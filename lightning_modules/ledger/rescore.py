"""The scores of an entry once more, from the saved model and the data: without any code that trains."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_modules.data.examples import Example, read_examples
from lightning_modules.data.fictional_authors import fictional_splits
from lightning_modules.data.files import read_yaml
from lightning_modules.data.formats import set_format
from lightning_modules.data.heldout import RETAIN_HELDOUT
from lightning_modules.data.requests import read_requests, together
from lightning_modules.data.tofu import tofu_examples
from lightning_modules.evaluation.evaluate import Evaluation, EvaluationSettings, evaluate
from lightning_modules.evaluation.likelihood import on_gpu
from lightning_modules.folder import CONFIG, MODEL
from lightning_modules.ledger.batch import PARTS, divided, mean
from lightning_modules.ledger.chain import Entry
from lightning_modules.ledger.hashes import request_hash, row_hash
from lightning_modules.ledger.refusals import FORGOTTEN
from lightning_modules.ledger.verify import Finding

SCORES = ("probability", "nll", "truth_ratio")
"""What is compared: the scores that need no generation."""
TOLERANCE = 1e-3
"""Difference that another machine, or other batches, may make: of a probability, or as a share of a larger number."""


def rescore(folder: Path, entry: Entry) -> Iterator[Finding]:
    """Compare an entry's scores with those that its model has now.

    The rows to forget are those that the ledger kept, or else those of the run's data, if they still are the request's.

    Args:
        folder: Of the ledger.
        entry: One of its entries.

    Yields:
        What differs, and what cannot be scored because it is gone.
    """
    run, number = (folder / entry["run"]).resolve(), entry["number"]
    if entry["kind"] != FORGOTTEN:
        return
    if not (run / MODEL).is_dir() or not (run / CONFIG).is_file():
        yield Finding(
            number, f"{run}: its model or {CONFIG} is not there, without which nothing is scored again", gone=True
        )
        return
    config = read_yaml(run / CONFIG, "the options of a run")
    splits: dict[str, list[Example]] = {}
    try:
        splits = data_of(config)
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        yield Finding(number, f"its data is not there: {error}", gone=True)
    if "text" in entry["kept"] and (kept := folder / entry["kept"]["text"]["file"]).is_file():
        splits["forget"] = read_examples(kept)
    if "forget" in splits and request_hash([row_hash(row) for row in splits["forget"]]) != entry["request"]["sha256"]:
        del splits["forget"]
    if "forget" not in splits:
        yield Finding(number, "the text of the request is gone: its scores cannot be computed again", gone=True)
    expected = entry["metrics"]["after"]
    for split in sorted(set(expected) - set(splits) - {"forget"}):
        yield Finding(number, f"the data of {split} is gone: its scores cannot be computed again", gone=True)
    splits = {split: rows[: int(config["evaluation_examples"])] for split, rows in splits.items() if split in expected}
    if not splits:
        return
    found = _scores(run / MODEL, config, splits)
    if "forget" in splits:
        yield from _of_each(entry, [row_hash(row) for row in splits["forget"]], found.examples["forget"])
    for split, scores in found.summary.items():
        if scores["n"] != expected[split]["n"]:
            yield Finding(
                number, f"{split}: expected {expected[split]['n']} examples, found {scores['n']}: the data is another"
            )
            continue
        for name in SCORES:
            if not alike(scores[name], expected[split][name]):
                yield Finding(
                    number,
                    f"{split}: expected a {name} of {expected[split][name]}, found {scores[name]} by scoring again",
                )


def _of_each(entry: Entry, hashes: list[str], scores: list[dict[str, Any]]) -> Iterator[Finding]:
    """Compare the probability of each request of a batch, whose rows are known by their hashes."""
    parts = entry.get(PARTS, [])
    for part, rows in zip(parts, divided(parts, entry["request"]["rows"]), strict=True):
        found = mean([score["probability"] for row, score in zip(hashes, scores, strict=True) if row in rows])
        if not alike(found, part["after"]):
            yield Finding(
                entry["number"],
                f"request {part['id']!r}: expected a probability of {part['after']}, found {found} by scoring again",
            )


def alike(found: object, expected: object) -> bool:
    """Whether two scores are the same but for rounding; NaN, written as text, is as good as NaN."""
    if found is None or expected is None:
        return found is expected
    one, other = float(str(found)), float(str(expected))
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    return abs(one - other) <= TOLERANCE * max(1.0, abs(other))


def _scores(model: Path, config: Mapping[str, Any], splits: Mapping[str, list[Example]]) -> Evaluation:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    set_format(tokenizer, config["chat_template_kwargs"], config["prompt_format"])
    settings = EvaluationSettings(
        int(config["evaluation_batch_size"]), max_length=config["max_length"], generate=False, memorization=False
    )
    with on_gpu(loaded.eval()):
        return evaluate(loaded, tokenizer, splits, settings, progress=False)


def data_of(config: Mapping[str, Any]) -> dict[str, list[Example]]:
    """The examples of a run by split, as its options say.

    Raises:
        FileNotFoundError: If a file is gone.
        ValueError: If a file is not what it was.
        RuntimeError: If it would come from the hub, which cannot be reached.
    """
    chosen = config["model"] == "scratch" or config.get("finetune_first")
    if config["tofu"] is not None:
        return tofu_examples(
            config["tofu"],
            config["tofu_dir"],
            config["authors"] if chosen else None,
            config["forget_authors"],
            general=config["model"] != "scratch",
            heldout_authors=config["heldout_authors"],
        )
    requests = config.get("requests")  # older runs had none
    if config["forget"] is not None or requests is not None:
        names = {"forget": config["forget"], "retain": config["retain"], RETAIN_HELDOUT: config["retain_heldout"]}
        found = {
            split: read_examples(name) for split, name in names.items() if name is not None and Path(name).exists()
        }
        if requests is not None:
            with suppress(FileNotFoundError):  # the mapping or one of its files, as a deletion may ask
                found["forget"] = together(read_requests(requests))
        return found
    authors = config["authors"]
    forgotten = authors // 5 if config["forget_authors"] is None else config["forget_authors"]
    return fictional_splits(authors, forgotten, config["heldout_authors"])
