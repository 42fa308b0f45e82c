"""One run: one method with one pair of seeds, trained as `unlearn` trains, looked at where it meets the targets."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_modules import outputs
from lightning_modules.ablation.grid import Grid, Run, Scratch, forget_alone, plain
from lightning_modules.ablation.matching import MatchTargets, Target
from lightning_modules.ablation.placebo import Placebo
from lightning_modules.ablation.scoring import Scorer
from lightning_modules.examples import Example
from lightning_modules.loading import _texts, load_model, load_pretrained, make_data
from lightning_modules.module import UnlearningModule
from lightning_modules.objectives import by_name, needs_reference
from lightning_modules.references import SecondModel
from lightning_modules.scratch import scratch_model

RUNS, MODELS = "runs", "models"
Splits = Mapping[str, Sequence[Example]]


def execute(run: Run, folder: Path) -> dict[str, Any]:
    """Train one method until every target is met or its epochs are over, and write what was found to `runs/<id>.json`.

    A target that is not met, and training that diverges, are results and are recorded with the reason.

    Returns:
        What was written: `id`, `method`, seeds, `status`, `targets` (a dictionary each: `target`, `metric`, `value`, `reached`, `reason`,
        and where reached the scores of the model there), `curve`, `backward_passes` (for a step), `seconds`, `config`, `versions`.
    """
    started = time.perf_counter()
    known = prepare(run, folder)
    options = run.options()
    splits = make_data(options, None).read()
    L.seed_everything(options.seed, verbose=False)
    model, tokenizer = load_start(run, splits)
    scorer = Scorer(run.grid, splits, tokenizer, _reference_ratios(known))
    tally = Tally()
    matching = MatchTargets(
        targets(run.grid, known),
        scorer.along,
        scorer.thoroughly,
        every_n_steps=run.grid.train.evaluate_every,
        tolerance=run.grid.evaluate.tolerance,
        progress=tally.shares,
    )
    callbacks: list[Callback] = [tally, matching]
    if run.method.placebo:
        callbacks.append(Placebo(run.method.bound_rule(), seed=run.data_seed))
    diverged = None
    try:
        trainer(run, callbacks).fit(build_module(model, run), make_data(options, tokenizer, options.batch_size))
    except FloatingPointError as error:
        diverged = f"diverged: {error}"
    reached = [_reached(target, **found) for target, found in matching.matches.items()]
    missed = [_missed(target, reason) for target, reason in matching.missed.items()]
    missed += [_missed(target, diverged) for target in matching.open if diverged]
    result = {
        "id": run.id,
        "method": run.method.name,
        "data_seed": run.data_seed,
        "model_seed": run.model_seed,
        "status": "finished",
        "reason": None,
        "targets": reached + missed,
        "backward_passes": run.method.backward_passes,
        "seconds": {"train": matching.curve[-1]["seconds"], "all": time.perf_counter() - started},
        "curve": matching.curve,
        "config": run.config,
        "versions": outputs.versions(),
    }
    write(folder / RUNS / f"{run.id}.json", result)
    return result


def build_module(model: nn.Module, run: Run) -> UnlearningModule:
    """The module that `unlearn` would train; for a placebo without the rule, which `Placebo` then imitates."""
    options = run.options()
    forget_loss, retain_loss = options.bound_loss(), by_name(options.retain_loss)
    surgery: Any = options.surgery()
    if run.method.placebo:
        surgery = partial(surgery, rule=forget_alone)
    return UnlearningModule(
        model.train(),
        forget_loss=forget_loss,
        retain_loss=retain_loss,
        optimizer=partial(options.optimizer_class(), lr=options.lr, weight_decay=options.weight_decay),
        surgery=surgery,
        warmup_steps=options.warmup_steps,
        reference=SecondModel() if needs_reference(forget_loss) or needs_reference(retain_loss) else None,
        retain_inside=options.retain_inside,
    )


def trainer(run: Run, callbacks: Sequence[Callback]) -> L.Trainer:
    """A Lightning Trainer on this process's device, which leaves no files."""
    cuda = torch.cuda.is_available()
    return L.Trainer(
        accelerator="gpu" if cuda else "cpu",
        devices=[torch.cuda.current_device()] if cuda else 1,
        precision=run.grid.train.precision,  # pyright: ignore[reportArgumentType] (Lightning checks the name)
        max_epochs=run.grid.train.max_epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )


class Tally(Callback):
    """Counts the steps whose gradients conflict, and those whose real change raises the retain loss to first order."""

    def __init__(self) -> None:
        self.steps = self.conflicts = self.raising = 0
        self.measured = True

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:  # noqa: ARG002 (Lightning's)
        """Read the step's record."""
        if not isinstance(pl_module, UnlearningModule) or (record := pl_module.surgery.record) is None:
            return
        self.steps += 1
        self.conflicts += record.conflict
        left, made = record.actual_change, record.unguarded_change
        self.measured = self.measured and left is not None
        if left is not None and made is not None:
            # What a guard leaves is rounding: 3e-6 of what it took away, measured, where steps are small.
            self.raising += bool((left > 1e-4 * made.abs()).any())

    def shares(self) -> dict[str, float]:
        """Shares of the steps so far; NaN where nothing was measured (guard: none)."""
        steps = max(1, self.steps)
        return {"conflicts": self.conflicts / steps, "raising": self.raising / steps if self.measured else float("nan")}


def prepare(run: Run, folder: Path) -> dict[str, Any]:
    """Scores of the model that is to forget and of the reference, `models/m<seed>.json`: computed once for each model seed."""
    path = folder / MODELS / f"m{run.model_seed}.json"
    config = {name: run.config[name] for name in ("data", "model", "evaluate", "model_seed")}
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        refuse_other(path, known["config"], config)
        return known
    options = run.options()
    splits = make_data(options, None).read()
    model, tokenizer = load_start(run, splits)
    reference = _load_reference(run, splits)
    scored = None
    if reference is not None:
        scored = Scorer(run.grid, splits, reference[1]).thoroughly(reference[0])
    scorer = Scorer(run.grid, splits, tokenizer, None if scored is None else scored["examples"]["truth_ratio_R"])
    known = {"config": config, "start": scorer.thoroughly(model), "reference": scored}
    write(path, known)
    return known


def targets(grid: Grid, known: Mapping[str, Any]) -> list[Target]:
    """What the grid asks for, with the reference's NLL where it says so.

    Raises:
        ValueError: If there is no reference to take it from.
    """
    found: list[Target] = []
    for metric, values in vars(grid.targets).items():
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
        model, tokenizer = load_model(run.options(), splits)
    else:
        rows = [*splits["retain"], *splits["forget"]]
        model, tokenizer = _scratch(run, run.grid.model, splits, rows, "Training a small Llama on everything")
    return model.to(_device()), tokenizer


def refuse_other(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise ValueError if a file was made with another configuration than this one."""
    wanted = plain(expected)
    other = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
    if other:
        said = "; ".join(f"{name}: {found.get(name)} there, {wanted.get(name)} now" for name in other)
        raise ValueError(
            f"{path}: expected a result of this grid, found one made with other settings ({said}); give another --output, or remove "
            "what is to be done again"
        )


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Strict JSON, whole or not at all, also if two processes write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    outputs.write_json(temporary, value)
    temporary.replace(path)


def _load_reference(run: Run, splits: Splits) -> tuple[nn.Module, Any] | None:
    if run.grid.data.reference is not None:
        model, tokenizer = load_pretrained(run.grid.data.reference)
    elif isinstance(run.grid.model, str):
        return None
    else:
        said = "Training the reference, which never sees the forget set"
        model, tokenizer = _scratch(run, run.grid.model, splits, splits["retain"], said)
    return model.to(_device()), tokenizer


def _scratch(run: Run, sizes: Scratch, splits: Splits, rows: Sequence[Example], said: str) -> tuple[nn.Module, Any]:
    return scratch_model(
        rows, tokenizer_texts=_texts(run.options(), splits), seed=run.model_seed, description=said, **vars(sizes)
    )


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
