"""The probes of a run: which of --probes are measured, on the model and on the reference, and written down."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

from torch import nn

from lightning_modules.data.examples import Example, evenly_spaced
from lightning_modules.data.general_knowledge import general_knowledge
from lightning_modules.data.pairs import VALIDATION_EXAMPLES
from lightning_modules.data.tokenization import encode
from lightning_modules.evaluation.likelihood import device_of, on_gpu
from lightning_modules.folder import PROBES
from lightning_modules.probes import (
    PromptingSettings,
    SamplingSettings,
    logit_lens,
    prompting_probe,
    relearning_attacks,
    sampling_probe,
)
from lightning_modules.run.loading import load_reference
from lightning_modules.run.options import UnlearnOptions
from lightning_modules.run.places import is_log
from lightning_modules.run.run import Run
from lightning_modules.training.callbacks import RelearnSettings, TradeoffCurve, quantization_probe, relearn_probe
from lightning_modules.training.callbacks.notes import note
from lightning_modules.training.callbacks.probe import plain_copy

Measure = Callable[[nn.Module], dict[str, Any]]
QUICK = ("quantization", "relearn")
"""The names of those that --probes quick measures; all measures every one."""


def check_probes(splits: Mapping[str, Sequence[Example]]) -> None:
    """Refuse a forget set of which no share can be taught again, before the model is trained.

    Raises:
        ValueError: If it has too few examples.
    """
    examples = min(len(splits["forget"]), VALIDATION_EXAMPLES)
    try:
        RelearnSettings().check(examples)
    except ValueError as error:
        raise ValueError(
            f"--probes: expected enough answers to forget to teach a part of them again, found {examples}; give --probes none, or at least "
            "3 answers"
        ) from error


def probe_it(run: Run[UnlearnOptions], model: nn.Module, curve: TradeoffCurve) -> None:
    """Measure how well the forgetting holds, on the curve's examples, and write it to probes.json as it is found.

    The reference is the control of every probe, if there is one with the same tokenizer. A resumed run goes on with
    the probes that it has not written down. A probe that does not fit the model or the data is written down with the
    sentence that says why.
    """

    @cache
    def control() -> nn.Module | None:
        reference = run.options.evaluation.reference
        if reference is not None and is_log(reference):
            return None
        loaded = load_reference(run.options, run.splits)
        alike = loaded is not None and loaded[1].get_vocab() == run.tokenizer.get_vocab()
        return loaded[0].to(device_of(model)) if loaded is not None and alike else None

    path = run.folder / PROBES
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    with on_gpu(model):
        for name, measure in _probes(run, curve).items():
            if name in known:
                continue
            found = _with_control(measure, model, control)
            # Runs of earlier versions have the numbers of rounded weights at the top of their entry.
            if name == "quantization" and "model" in found:
                found = found["model"] | {"control": found["control"]}
            note(path, name, found)


def _with_control(measure: Measure, model: nn.Module, control: Callable[[], nn.Module | None]) -> dict[str, Any]:
    try:
        found = measure(model)
    except ValueError as error:
        return {"refused": str(error)}
    reference = control()
    try:
        beside = None if reference is None else measure(reference)
    except ValueError:  # the reference is of another kind; the model's own numbers are worth as much without it
        beside = None
    return {"model": found, "control": beside}


def _probes(run: Run[UnlearnOptions], curve: TradeoffCurve) -> dict[str, Measure]:
    """Name -> what measures a model, the cheapest first."""
    options, training, pad = run.options, run.options.training, curve.pad_token_id
    rows = {name: evenly_spaced(run.splits[name], VALIDATION_EXAMPLES) for name in ("forget", "retain")}
    forget, retain = curve.encoded["forget"], curve.encoded["retain"]
    lessons = {"forget": None, "retain": retain, "general": []}
    if training.probes == "all":
        taught = general_knowledge()
        lessons["general"] = [encode(run.tokenizer, row["question"], row["answer"]) for row in taught]
    found: dict[str, Measure] = {"quantization": partial(quantization_probe, splits=curve.encoded, pad_token_id=pad)}
    attacks = relearning_attacks(
        scratch=options.model.scratch,
        # The same attack, however many processes trained, and whatever batches, but for those that memory may ask for.
        batch_size=min(RelearnSettings().batch_size, training.batch_size * training.processes),
        seed=options.output.seed,
    )
    for name, attack in attacks.items():
        found[name] = partial(
            relearn_probe,
            forget=forget,
            retain=retain,
            pad_token_id=pad,
            settings=attack.settings,
            lessons=lessons[attack.lessons],
        )
    if training.probes != "all":
        return {name: found[name] for name in QUICK}
    longest = options.evaluation.max_new_tokens
    asked_so = PromptingSettings(max_new_tokens=longest, max_length=options.data.max_length)
    sampled = SamplingSettings(max_new_tokens=longest)
    on_text: dict[str, Measure] = {
        "lens": lambda model: logit_lens(plain_copy(model), forget, pad_token_id=pad),
        "prompts": lambda model: prompting_probe(model, run.tokenizer, rows["forget"], rows["retain"], asked_so),
        "sampling": lambda model: sampling_probe(model, run.tokenizer, rows["forget"], sampled),
    }
    relearned = {name: measure for name, measure in found.items() if name not in QUICK}
    return {name: found[name] for name in QUICK} | on_text | relearned
