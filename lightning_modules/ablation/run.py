"""One run: one method with one pair of seeds, trained as `unlearn` trains, and scored where it meets the targets."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from lightning_modules.ablation.grid import Grid, Run, plain
from lightning_modules.ablation.matching import Target
from lightning_modules.ablation.methods import Kind
from lightning_modules.ablation.retention import Ended, equal_retention, own_end
from lightning_modules.ablation.scoring import Scorer
from lightning_modules.ablation.sections import Scratch
from lightning_modules.ablation.training import train
from lightning_modules.ablation.weights import by_assistant, by_rectified, by_task_vector
from lightning_modules.data.chat import set_template_options
from lightning_modules.data.examples import Example
from lightning_modules.data.files import read_json
from lightning_modules.data.heldout import to_keep
from lightning_modules.folder import versions, write_json
from lightning_modules.run.identity import content_versions, examples_hash, model_identity
from lightning_modules.run.loading import load_model, make_data, read_splits, reference_name, tokenizer_texts
from lightning_modules.run.models import load_pretrained
from lightning_modules.run.run import Splits
from lightning_modules.run.teaching import teach_first
from lightning_modules.training.scratch import ScratchSettings, scratch_model

RUNS, MODELS = "runs", "models"

KINDS: dict[Kind, Callable[[Run, nn.Module, Any, Scorer, Sequence[Target]], Ended]] = {
    "surgery": train,
    "uld": by_assistant,
    "task_vector": by_task_vector,
    "rectified_task_vector": by_rectified,
}
"""Kind -> function from run, start model, tokenizer, scorer and targets to what the method leaves."""


def execute(run: Run, folder: Path) -> dict[str, Any]:
    """Let one method forget until every target is met or it cannot go on, and write the result to `runs/<id>.json`.

    If a target is not met, or training diverges, that is a result too, and it is recorded with its reason.

    Returns:
        What was written: `id`, `method`, `data_seed`, `model_seed`, `status`, `targets`, `curve`, `backward_passes` (of
        a step), `extra_backward_passes` (before the first step), `radius` (if it was measured), `seconds`, `config`,
        `content` and `versions`. Each of the targets is a dictionary with `target`, `metric`, `value`, `reached` and
        `reason`; where it was reached, the scores of the model there are in it too.
    """
    started = time.perf_counter()
    known = prepare(run, folder)
    options = run.options()
    splits = make_data(options, None).read()
    L.seed_everything(options.output.seed, verbose=False)
    model, tokenizer = load_start(run, splits)
    scorer = Scorer(run.grid, splits, tokenizer, _reference_ratios(known))
    ended = KINDS[run.method.kind](run, model, tokenizer, scorer, targets(run.grid, known))
    reached = [_reached(target, **found) for target, found in ended.matching.matches.items()]
    missed = [_missed(target, reason) for target, reason in ended.matching.missed.items()]
    for share in run.grid.targets.retained:
        target, found = Target("retained", share, f"retained={share}"), equal_retention(share, ended, scorer)
        if isinstance(found, str):
            missed.append(_missed(target, found))
        else:
            reached.append(_reached(target, **found))
    if run.grid.targets.end:
        target, found = Target("end", 0.0, "end=own"), own_end(ended, scorer)
        if isinstance(found, str):
            missed.append(_missed(target, found) | {"value": None})
        else:
            reached.append(_reached(target, **found) | {"value": None})
    result = {
        "id": run.id,
        "method": run.method.name,
        "data_seed": run.data_seed,
        "model_seed": run.model_seed,
        "status": "finished",
        "reason": None,
        "targets": reached + missed,
        "backward_passes": run.method.backward_passes,
        "extra_backward_passes": ended.extra_backward_passes,
        "radius": ended.radius,
        "seconds": {"train": ended.matching.curve[-1]["seconds"], "all": time.perf_counter() - started},
        "curve": ended.matching.curve,
        "config": run.config,
        "content": content(run.grid, splits),
        "versions": versions(),
    }
    write_json(folder / RUNS / f"{run.id}.json", result)
    return result


def prepare(run: Run, folder: Path) -> dict[str, Any]:
    """The scores of the model that is to forget and of the reference.

    They are computed once for each model seed, and kept in `models_file`.
    """
    path = models_file(folder, run.model_seed)
    options = run.options()
    splits = read_splits(options)
    found = content(run.grid, splits)
    config = {name: run.config[name] for name in ("data", "model", "evaluate", "model_seed")}
    if "first" in run.config:  # they are taught in the precision in which methods train
        config |= {"first": run.config["first"], "precision": run.grid.train.precision}
    if path.exists():
        known = read_result(path, "start", "reference")
        refuse_other(path, known["config"], config)
        refuse_other(path, known.get("content") or {}, found)
        return known
    teach_first(run.start, splits)
    model, tokenizer = load_start(run, splits)
    reference = _load_reference(run, splits)
    scored = None
    if reference is not None:
        attack = bool(run.grid.evaluate.attacks)  # the control of every attack
        scored = Scorer(run.grid, splits, reference[1]).thoroughly(reference[0], attack=attack)
    scorer = Scorer(run.grid, splits, tokenizer, None if scored is None else scored["examples"]["truth_ratio_R"])
    known = {"config": config, "content": found, "start": scorer.thoroughly(model, attack=False), "reference": scored}
    write_json(path, known)
    return known


def models_file(folder: Path, model_seed: int) -> Path:
    """Where the scores of the model that is to forget and of the reference are kept."""
    return folder / MODELS / f"m{model_seed}.json"


def targets(grid: Grid, known: Mapping[str, Any]) -> list[Target]:
    """The grid's targets that are met on the way, with the reference's NLL where the grid says "reference".

    Raises:
        ValueError: If the grid says so and there is no reference.
    """
    found: list[Target] = []
    for metric, values in grid.targets.on_the_way.items():
        for value in values:
            if value == "reference" and known["reference"] is None:
                raise ValueError(
                    f"targets: expected a reference model for {metric}: reference, found none; give data.reference, or a number"
                )
            number = known["reference"][metric] if value == "reference" else value
            found.append(Target(metric, float(number), f"{metric}={value}"))
    return found


def load_start(run: Run, splits: Splits) -> tuple[nn.Module, Any]:
    """The model that is to forget, on this process's device, and its tokenizer."""
    if isinstance(run.grid.model, str):
        model, tokenizer = load_model(run.start, splits)
    else:
        rows = [*to_keep(splits), *splits["forget"]]
        model, tokenizer = _scratch(run, run.grid.model, splits, rows, "Training a small Llama on everything")
    return model.to(_device()), tokenizer


def content(grid: Grid, splits: Splits | None = None) -> dict[str, Any]:
    """What a result depends on besides the settings: the examples themselves, the ready models, and the versions.

    Args:
        grid: Its data and models.
        splits: All examples; None reads them.
    """
    if splits is None:
        splits = make_data(grid.runs()[0].options(), None).read()
    models = {"model": grid.model, "reference": grid.data.reference}
    return {
        "examples": examples_hash(splits),
        **{name: model_identity(model) if isinstance(model, str) else None for name, model in models.items()},
        "versions": content_versions(),
    }


def read_result(path: Path, *keys: str) -> dict[str, Any]:
    """What `write` wrote.

    Raises:
        ValueError: If it is not JSON, or lacks its configuration or one of the keys.
    """
    found = read_json(path, "a result of `gradsurgery ablate`")
    lacking = [key for key in ("config", *keys) if not isinstance(found, Mapping) or key not in found]
    if lacking or not isinstance(found["config"], Mapping):
        raise ValueError(
            f"{path}: expected a result of `gradsurgery ablate`, found something without {', '.join(lacking) or 'its configuration'}; "
            "remove the file, and the same command does that part again"
        )
    return dict(found)


def refuse_other(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise ValueError if a file was written with another configuration than the expected one."""
    wanted = plain(expected)
    other = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
    if other:
        said = "; ".join(f"{name}: {found.get(name)} there, {wanted.get(name)} now" for name in other)
        raise ValueError(
            f"{path}: expected a result of this grid, found one made with other settings ({said}); give another --output, or remove "
            "what is to be done again"
        )


def _load_reference(run: Run, splits: Splits) -> tuple[nn.Module, Any] | None:
    name = reference_name(run.start, splits)
    if name is not None:
        model, tokenizer = load_pretrained(name)
        set_template_options(tokenizer, run.grid.data.chat_template_kwargs)
    elif isinstance(run.grid.model, str):
        return None
    else:
        said = "Training the reference, which never sees the forget set"
        model, tokenizer = _scratch(run, run.grid.model, splits, to_keep(splits), said)
    return model.to(_device()), tokenizer


def _scratch(run: Run, sizes: Scratch, splits: Splits, rows: Sequence[Example], said: str) -> tuple[nn.Module, Any]:
    texts = tokenizer_texts(run.options().data, splits)
    settings = ScratchSettings(seed=run.model_seed, device=_device(), **vars(sizes))
    return scratch_model(rows, settings, tokenizer_texts=texts, description=said)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _reference_ratios(known: Mapping[str, Any]) -> list[float] | None:
    return None if known["reference"] is None else known["reference"]["examples"]["truth_ratio_R"] or None


def _reached(target: Target, **found: Any) -> dict[str, Any]:
    return {
        "target": target.name,
        "metric": target.metric,
        "value": target.value,
        "reached": True,
        "reason": None,
        **found,
    }


def _missed(target: Target, reason: str) -> dict[str, Any]:
    return {"target": target.name, "metric": target.metric, "value": target.value, "reached": False, "reason": reason}
