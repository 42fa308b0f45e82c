"""The command `ledger plan`: which requests that wait are cheap to do together. Nothing is trained."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from lightning_modules.data.examples import Example, evenly_spaced, read_examples
from lightning_modules.data.formats import set_format
from lightning_modules.data.pairs import encoded_rows
from lightning_modules.data.requests import read_requests
from lightning_modules.data.tokenization import padding_id
from lightning_modules.evaluation.likelihood import on_gpu
from lightning_modules.evaluation.processes import processes_ahead
from lightning_modules.files import write_picture
from lightning_modules.folder import check_writable, write_json
from lightning_modules.ledger.plan_shown import group_table, plan_figure, plan_table
from lightning_modules.ledger.planned import gram_of, plan_of, probabilities, sentences
from lightning_modules.run.compatible import check_examples
from lightning_modules.run.models import check_pretrained, load_to_train
from lightning_modules.run.options.ledger_plan import LedgerPlanOptions
from lightning_modules.run.settling import USUAL_LEVEL

PLAN, PICTURE = "plan.json", "plan.png"
RETAIN_ROWS = 64


def plan_requests(options: LedgerPlanOptions) -> None:
    """Print a plan of the requests that wait, and with --output write it.

    Raises:
        ValueError: If an option or a file is not usable, the model cannot read a row or gives a gradient that is not
            finite, or this is not the only process.
        FileNotFoundError: If a file or model is missing.
        FileExistsError: If the output folder holds a plan.
        PermissionError: If it cannot be written.
    """
    options.check()
    if processes_ahead() > 1:
        raise ValueError(
            "ledger plan: expected one process, found several; start the command once, without srun or torchrun"
        )
    waiting = options.waiting
    folder = None if waiting.output is None else Path(waiting.output)
    if folder is not None:
        _check_free(folder)
    requests, retain = read_requests(str(waiting.requests)), read_examples(str(waiting.retain))
    plan = _planned(options, requests, retain)
    console = Console()
    console.print(plan_table(plan))
    console.print(group_table(plan))
    for sentence in sentences(plan):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    if folder is not None:
        write_json(folder / PLAN, plan)
        write_picture(folder / PICTURE, plan_figure(plan))
        console.print(f"{PLAN} and {PICTURE} are in {folder}", markup=False, highlight=False, soft_wrap=True)


def _planned(
    options: LedgerPlanOptions, requests: dict[str, list[Example]], retain: list[Example]
) -> dict[str, object]:
    waiting, name = options.waiting, str(options.waiting.model)
    known = check_pretrained(name, options.loading)
    set_format(known.tokenizer, waiting.chat_template_kwargs, waiting.prompt_format)
    few = evenly_spaced(retain, RETAIN_ROWS)
    named = {f"request {name}": rows for name, rows in requests.items()}
    check_examples(known.tokenizer, {**named, "retain": few}, waiting.max_length, known.config)
    model, tokenizer = load_to_train(name, loading=options.loading)
    set_format(tokenizer, waiting.chat_template_kwargs, waiting.prompt_format)
    encoded = {
        name: encoded_rows(tokenizer, f"request {name}", rows, waiting.max_length) for name, rows in requests.items()
    }
    kept = encoded_rows(tokenizer, "retain", few, waiting.max_length)
    how = {"pad_token_id": padding_id(tokenizer), "batch_size": waiting.batch_size}
    with on_gpu(model):
        chances = probabilities(model, encoded, **how)
        gram = gram_of(model, encoded, kept, **how)
    return {"model": name, **plan_of(gram, requests, retain, chances, USUAL_LEVEL)}


def _check_free(folder: Path) -> None:
    """Before any work: the folder is there afterwards, and holds no plan."""
    found = [name for name in (PLAN, PICTURE) if (folder / name).exists()]
    if found:
        raise FileExistsError(
            f"--output: expected a folder without a plan, found {' and '.join(found)} in {folder}; choose another, or remove them"
        )
    check_writable(folder)
