"""Going on with an interrupted run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from lightning_modules.data.examples import Example
from lightning_modules.data.files import read_json
from lightning_modules.data.hashes import hashed
from lightning_modules.evaluation.processes import will_be_first
from lightning_modules.folder import CHECKPOINTS, CONFIG, METRICS, TRAINING, check_links, write_config
from lightning_modules.run.finish import substitute_answers
from lightning_modules.run.identity import examples_hash, model_identity
from lightning_modules.run.loading import refusals_of
from lightning_modules.run.options import AUTO, FinetuneOptions, LoadingOptions, UnlearnOptions
from lightning_modules.run.options.flat import NO_PART, flag
from lightning_modules.run.run import Run
from lightning_modules.run.saved import read_options
from lightning_modules.training.callbacks.notes import note

CHOSEN = "chosen"
"""The entry of training.json with the names of options that nobody gave."""

OptionsT = TypeVar("OptionsT", UnlearnOptions, FinetuneOptions)


def only_report_is_missing(folder: Path) -> bool:
    """Whether a run has its scores and no report yet: the checkpoints are removed last."""
    return (folder / METRICS).exists() and (folder / CHECKPOINTS).exists()


def settled(folder: Path) -> list[str]:
    """The options that nobody gave and a run chose or settled itself, see `options.fitted` and `settling`.

    What they came to is in config.yaml.
    """
    if not (folder / TRAINING).exists():
        return []
    notes = read_json(folder / TRAINING, f"the {TRAINING} of a run")
    found = {"learning_rate": "lr", "target": "stop_below", "radius": "radius"}
    return [option for name, option in found.items() if name in notes] + notes.get(CHOSEN, {}).get("options", [])


def write_options(run: Run[UnlearnOptions]) -> None:
    """Write config.yaml, and into training.json which of the options in it nobody gave.

    A run that is resumed has all of them from config.yaml: it says nothing of its own.
    """
    write_config(run.folder, "unlearn", run.options.recorded())
    if run.chosen and not run.options.training.resume:
        note(run.folder / TRAINING, CHOSEN, {"options": list(run.chosen)})


def read_by(run: Run[UnlearnOptions]) -> dict[str, str]:
    """What a run reads, as short hashes, beside the options that name it: the same names may mean other files later.

    A checkpoint has it (`callbacks.Checkpoints`), so that no run goes on with other texts or from another model.
    """
    options, method = run.options, run.options.method
    found: dict[str, object] = {}
    if method.refusals is not None:
        found["the texts in --refusals"] = refusals_of(method)
    if options.finish.substitutes is not None:
        found["the answers in --substitutes"] = substitute_answers(options, run.splits)
    models = {} if options.model.scratch else {"model": (options.model.model, options.loading)}
    if method.teacher is not None:
        models["teacher"] = (method.teacher, options.loading.of_reference())
    examples = {"the examples in these files": examples_hash(run.splits)[:12]}
    return examples | {name: hashed(value)[:12] for name, value in found.items()} | files_of(models)


def taught_by(options: FinetuneOptions, rows: Sequence[Example]) -> dict[str, str]:
    """As `read_by`, of a run of `finetune`."""
    examples = {"the examples": examples_hash({"taught": rows})[:12]}
    return examples | files_of({"model": (str(options.taught.model), options.loading)})


def files_of(models: Mapping[str, tuple[str, LoadingOptions]]) -> dict[str, str]:
    """A short hash of what tells each model from others, where that is known, by name and how it is loaded."""
    known = {option: model_identity(name, loading) for option, (name, loading) in models.items()}
    return {f"the files of {flag(option)}": hashed(found)[:12] for option, found in known.items() if found is not None}


def resumed(given: OptionsT, stated: Collection[str] = ()) -> OptionsT:
    """The options of the interrupted run in `--output`. Those given now may repeat them, but not differ from them.

    Args:
        given: All options, with defaults for those that nobody gave.
        stated: Names of those that somebody gave, which may be equal to their defaults. Without it, options that differ
            from their defaults count as given.

    Raises:
        FileNotFoundError: If there is no run in the folder.
        FileExistsError: If the run in it is finished, and this is the first process.
        PermissionError: If a link leads out of the folder.
        ValueError: If an option is given that the run was not started with.
    """
    folder, kind = given.output.folder, type(given)
    config = folder / CONFIG
    if not config.exists():
        raise FileNotFoundError(f"--resume: expected a run in {folder}, found no {CONFIG}; start it without --resume")
    # Another process of the same run may come here when the first one has ended it already.
    if (folder / METRICS).exists() and not only_report_is_missing(folder) and will_be_first():
        report = f", or draw its report again with `gradsurgery report {folder}`" if kind is UnlearnOptions else ""
        raise FileExistsError(
            f"--resume: expected an interrupted run, found a finished one in {folder}; choose another --output{report}"
        )
    check_links(folder)
    values = read_options(config, kind)
    names = set(kind.names())
    # As versions did that do not say it.
    values = {name: False for name in ("padding_free", "keep_asked_words") if name in names} | values
    place = {"output": given.output.output}
    saved = kind.of(**values | place)
    usual = kind.of(**place | ({"model": given.model.model} if isinstance(given, UnlearnOptions) else {}))
    before, now, default = saved.flat(), given.flat(), usual.flat()
    said = {name: now[name] for name in names - set(NO_PART) if name in stated or now[name] != default[name]}
    for name in settled(folder):
        if name in said and said[name] in (None, AUTO):
            del said[name]  # the run found out what it means
    # config.yaml holds what a default such as null came to, so the options given are resolved as the run's were.
    meant = saved.but(**said).resolved().flat()
    changed = [
        f"{flag(name)} {value} (there it is {before[name]})"
        for name, value in sorted(said.items())
        if meant[name] != before[name]
    ]
    if changed:
        raise ValueError(
            f"--resume: expected the options of {config}, found {', '.join(changed)}; leave them out, or start a new run"
        )
    return saved.but(resume=True)
