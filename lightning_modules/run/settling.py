"""What a run finds out before it trains: the forget probability at which it ends, and its learning rate."""

from __future__ import annotations

import time
from dataclasses import replace

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import gradsurgery as gs
from lightning_modules.data.examples import evenly_spaced
from lightning_modules.evaluation.evaluate import Evaluation
from lightning_modules.evaluation.processes import is_first
from lightning_modules.folder import TRAINING
from lightning_modules.report.terminal import shown
from lightning_modules.run.assembly import make_module
from lightning_modules.run.batch import best_known, known_of_each
from lightning_modules.run.loading import make_data
from lightning_modules.run.options import AUTO, UnlearnOptions, most_steps
from lightning_modules.run.reference_log import reference_rows
from lightning_modules.run.run import Run
from lightning_modules.run.scoring import ScoredSplits
from lightning_modules.run.show import say, show_start
from lightning_modules.training.callbacks import AnchorPull, TradeoffCurve
from lightning_modules.training.callbacks.notes import note
from lightning_modules.training.learning_rate import SCORED, Trial, rate_for, same_random_numbers, trial
from lightning_modules.training.references import Reference

USUAL_LEVEL = 0.05
"""The forget probability at which a run ends where nobody names one and there is no reference."""
HIGHEST_LEVEL = 0.1
"""The highest at which it ends where nobody names one: above it an answer can be drawn often, whoever else gives it."""
ROOM = 0.6
"""The share of a ledger's criterion at which a run ends: later requests raise what was forgotten a little."""
USUAL_RATE = 1e-5
"""The learning rate where none can be found: that of the papers, for models of 7 billion weights."""
WHOLE_WAY = 0.5
"""The share of the steps in which the way of the trial steps is to be gone. A run, which feels what holds the kept
answers for longer than the trial, went up to 1.8 times as far on SmolLM2."""


def settle_target(
    run: Run[UnlearnOptions], before: Evaluation, log: ScoredSplits | None, mesh: DeviceMesh | None = None
) -> tuple[Run[UnlearnOptions], ScoredSplits | None]:
    """Say at which forget probability the run ends, if no option does: at the reference's own, or else at 0.05.

    With --ledger a criterion of forget_probability counts as such an option, and the run ends at `ROOM` of it.

    A reference above 0.1 counts as 0.1. It prints to standard error what it found, and if there is little or nothing to
    forget. A target that the model is below already would end the run before its first step; one that nobody asked for
    is then left out.

    Args:
        run: In the first process, or in all where the model is sharded.
        before: Scores of the model before unlearning.
        log: The scores of a reference whose log was given.
        mesh: Over which the reference is sharded.

    Returns:
        The run with --stop-below, and the scores of the reference, if they were needed for it.
    """
    known, asked = float(before.summary["forget"]["probability"] or 0.0), run.options.training.stop_below
    alone = not (each := known_of_each(run))  # of a batch the mean says little
    known = max([known, *each])
    if asked is None and run.request is not None:
        limit = run.request.said["criteria"]["limits"].get("forget_probability")
        asked = None if limit is None else ROOM * limit
    if asked is not None:
        if is_first() and alone:
            show_start(before, asked, "asked")
        return replace(run, options=run.options.but(stop_below=asked)), None
    with same_random_numbers():
        reference = log or reference_rows(run.options, run.splits, across_processes=mesh is not None, mesh=mesh)
    found = [row.get("probability") for row in (reference or {}).get("forget", [])]
    values = [float(value) for value in found if value is not None]
    level, of = USUAL_LEVEL, "usual"
    if values:
        of_reference = sum(values) / len(values)
        level, of = (of_reference, "reference") if of_reference <= HIGHEST_LEVEL else (HIGHEST_LEVEL, "usual")
    nothing = known <= level
    if is_first():
        note(run.folder / TRAINING, "target", {"forget_probability": level, "of": of})
        if alone:
            show_start(before, level, of)
        if not nothing:
            whose = "the reference's own" if of == "reference" else "--stop-below names another"
            say(
                f"The run ends once the mean probability of the forget answers, {shown(known)} now, is below {shown(level)} ({whose})"
            )
    return replace(run, options=run.options.but(stop_below=0.0 if nothing else level)), reference


def settle_rate(
    run: Run[UnlearnOptions],
    model: nn.Module,
    reference: Reference | None,
    curve: TradeoffCurve,
    anchor: gs.LayerAnchor | None = None,
) -> Run[UnlearnOptions]:
    """Find the learning rate where it is "auto"; it prints to standard error what it found, and how long it took.

    The trial steps go until the forget probability is below the target, with rates that double. The sum of the rates is
    about the way that every weight goes. The run is given a rate with which it goes this way in half of its
    steps (`WHOLE_WAY` says why).

    Cost: a trial step takes the batches of all processes in the first one, while the others wait for it.

    Args:
        run: With --stop-below; where it is 0, the way is that to 0.05.
        model: Adapted already; it is left as it is.
        reference: How the losses know the model before unlearning.
        curve: Knows the examples that are scored.
        anchor: That pulls after the trial steps too.
    """
    options = run.options
    if options.training.lr != AUTO:
        return run
    started, training = time.perf_counter(), options.training
    level, steps = training.stop_below or USUAL_LEVEL, most_steps(training, len(run.splits["forget"]))
    # One process takes the trial steps: the batches of all processes, one after the other.
    batches = (training.accumulate or 1) * training.processes
    slow = replace(training, lr=USUAL_RATE, warmup_steps=0, lr_schedule="constant", accumulate=batches)
    tried = trial(
        make_module(model, options.method, slow, reference, loading=options.loading).train(),
        make_data(options, run.tokenizer),
        evenly_spaced(best_known(run, curve), SCORED),
        level=level,
        pad_token_id=curve.pad_token_id,
        callbacks=[] if anchor is None else [AnchorPull(anchor)],
        precision=training.precision,
        accumulate_grad_batches=batches,
    )
    rate = _rate(tried, run, steps)
    rate_found = rate is not None and len(tried.points) > 1
    seconds = f"{len(tried.points) - 1} trial steps, {time.perf_counter() - started:.0f} s"
    last = tried.points[-1]
    if tried.points[0]["forget"] < level:
        rate = USUAL_RATE
        say(f"--lr auto: {rate:g} is taken, because no forget probability can fall to say which is right")
    elif rate is None:
        rate = USUAL_RATE
        say(
            f"Warning: --lr auto: expected trial steps that bring the forget probability below {shown(level)}, found "
            f"{shown(last['forget'])} after the last one ({seconds}); {rate:g} is taken, give --lr for another"
        )
    else:
        say(f"--lr auto: {rate:g} reaches a forget probability of {shown(level)} within the {steps} steps ({seconds})")
    points = [dict(point) for point in tried.points]
    found = {"lr": rate, "level": level, "points": points, "found": rate_found}
    note(run.folder / TRAINING, "learning_rate", found)
    return replace(run, options=options.but(lr=rate).resolved())


def _rate(tried: Trial, run: Run[UnlearnOptions], steps: int) -> float | None:
    """None where the trial did not reach its level."""
    if tried.way is None:
        return None
    training = run.options.training
    schedule, warmup = training.schedule(), training.warmup_steps
    shares = [
        schedule(step, steps) if schedule is not None else min(1.0, (step + 1) / max(1, warmup))
        for step in range(max(1, round(WHOLE_WAY * steps)))
    ]
    return rate_for(tried.way, shares)
