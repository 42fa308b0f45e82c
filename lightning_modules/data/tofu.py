"""The TOFU splits, from a folder or from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from lightning_modules.data.examples import Example, as_example, numbered, read_examples
from lightning_modules.data.heldout import held_out

HUB_NAME = "locuslab/TOFU"
ROWS_PER_AUTHOR = 20
RETAIN_SPLIT = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
GENERAL = ("real_authors", "world_facts")


def tofu_examples(
    split: str,
    folder: str | Path | None = None,
    num_authors: int | None = None,
    forget_authors: int | None = None,
    *,
    general: bool | None = None,
    heldout_authors: int = 0,
) -> dict[str, list[Example]]:
    """Returns the examples of a TOFU split, with the paraphrased and perturbed answers that the truth ratio needs.

    TOFU (Maini et al. 2024, arXiv 2401.06121) has 200 invented authors with 20 questions each. The forget set is the
    last 1, 5 or 10 % of them, the retain set is the rest. Paraphrased and perturbed answers exist for the whole forget
    set and for the first 400 retain questions.

    Without `num_authors`, the examples of `real_authors` and `world_facts` come too: questions with perturbed answers
    about general knowledge, with which TOFU's model utility is measured. A small model that is trained from scratch on
    some authors cannot know them.

    Args:
        split: `"forget01"`, `"forget05"` or `"forget10"`.
        folder: holds the splits as JSON lines under their hub names (`forget10.json`, `forget10_perturbed.json`, ...);
            `None` loads them from the hub, which needs the `datasets` package.
        num_authors: n, the number of authors to keep in the data for a small model: the first n - m of the retain set
            and the last m of the forget set. 10 authors have 160 questions to keep and 40 to forget. 200 and `None`
            both give the whole forget and retain set.
        forget_authors: m; n // 5 by default. Only with `num_authors`.
        general: whether the examples of `real_authors` and `world_facts` come too; `None`: only without `num_authors`.
        heldout_authors: so many of the kept authors, the last ones, are a split of their own, `retain_heldout`.

    Returns:
        `{"forget": [...], "retain": [...]}`, with `heldout_authors` also `retain_heldout`, and where `general` says so
        also `real_authors` and `world_facts`, if the folder has their files.

    Raises:
        ValueError: for an unknown split or a number of authors that the split cannot give.
        FileNotFoundError: if the folder lacks a split.
        RuntimeError: if the hub cannot be reached.
    """
    if split not in RETAIN_SPLIT:
        raise ValueError(f"expected split to be one of {', '.join(RETAIN_SPLIT)}, found {split!r}")
    forget = _merged(_load(split, folder), _load(f"{split}_perturbed", folder, required=False))
    retain = _merged(_load(RETAIN_SPLIT[split], folder), _load("retain_perturbed", folder, required=False))
    wanted = num_authors is None if general is None else general
    beside = {name: _load(f"{name}_perturbed", folder, required=False) for name in GENERAL if wanted}
    beside = {name: rows for name, rows in beside.items() if rows}
    if num_authors is None:
        if forget_authors is not None:
            raise ValueError(
                f"expected num_authors with forget_authors={forget_authors}, found none: of how many authors?"
            )
        return {"forget": forget, **held_out(retain, heldout_authors, ROWS_PER_AUTHOR)} | beside

    available = len(forget) // ROWS_PER_AUTHOR, len(retain) // ROWS_PER_AUTHOR
    if num_authors == sum(available) and forget_authors in (None, available[0]):
        return {"forget": forget, **held_out(retain, heldout_authors, ROWS_PER_AUTHOR)} | beside
    forgotten = num_authors // 5 if forget_authors is None else forget_authors
    kept = num_authors - forgotten
    if not 1 <= forgotten <= available[0] or not 1 <= kept <= available[1]:
        if forget_authors is not None:
            raise ValueError(
                f"{num_authors} authors of which {forgotten} are to be forgotten leave {kept} to "
                f"keep, and {split} has {available[0]} and {available[1]}"
            )
        raise ValueError(
            f"{num_authors} authors mean {forgotten} to forget and {kept} to keep, and {split} has "
            f"{available[0]} and {available[1]}: use 5 to {min(5 * available[0] + 4, sum(available) - 1)} authors, or "
            f"{sum(available)} for all of them"
        )
    chosen = held_out(retain[: kept * ROWS_PER_AUTHOR], heldout_authors, ROWS_PER_AUTHOR)
    return {"forget": forget[-forgotten * ROWS_PER_AUTHOR :], **chosen} | beside


def tofu_split(name: str, folder: str | Path | None = None) -> list[Example]:
    """Returns the examples of one file of TOFU, such as `"holdout10"`, by its name on the hub.

    Raises:
        FileNotFoundError: if the folder lacks it.
        RuntimeError: if the hub cannot be reached, or lacks it.
    """
    return _load(name, folder)


def _load(name: str, folder: str | Path | None, required: bool = True) -> list[Example]:
    if folder is not None:
        path = Path(folder) / f"{name}.json"
        if path.is_file() or required:
            return read_examples(path)
        return []
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("loading TOFU from the hub needs the datasets package: pip install datasets") from error
    try:
        rows = load_dataset(HUB_NAME, name)["train"]
    # Whatever goes wrong (no network, a proxy, a moved file), the advice is the same.
    except Exception as error:
        raise RuntimeError(
            f"could not load {name} of {HUB_NAME} from the hub ({type(error).__name__}: {error}): go online once, or "
            f"give a folder that holds {name}.json and the other splits"
        ) from error
    return [as_example(row, f"{HUB_NAME}, {name}, row {number}") for number, row in enumerate(rows, start=1)]


def _merged(rows: list[Example], perturbed: list[Example]) -> list[Example]:
    # Matched by question and answer, because one question occurs twice and only some retain rows have paraphrases.
    # Where both occur again, the first row is the first one there, so that each has its own wrong answers.
    extra = dict(zip(numbered(perturbed), perturbed, strict=True))
    return [extra.get(key, row) for key, row in zip(numbered(rows), rows, strict=True)]
