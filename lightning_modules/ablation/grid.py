"""The grid: which methods are compared, on what data and over which seeds, and the runs that this takes."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import gradsurgery as gs
from lightning_modules.ablation.attacks import relearn_settings
from lightning_modules.ablation.methods import Method
from lightning_modules.ablation.sections import Data, Evaluate, Scratch, Seeds, Targets, Train
from lightning_modules.run.options import (
    DataOptions,
    EvaluationOptions,
    FinishOptions,
    FirstOptions,
    MethodOptions,
    ModelOptions,
    OutputOptions,
    TrainingOptions,
    UnlearnOptions,
)
from lightning_modules.run.options.data import AUTHORS
from lightning_modules.run.options.names import NO_RULE
from lightning_modules.training.scratch import ScratchSettings


@dataclass(frozen=True)
class Run:
    """One method with one data seed and one model seed."""

    grid: Grid
    method: Method
    data_seed: int
    model_seed: int

    @property
    def id(self) -> str:
        """A readable name, which does not depend on what else is in the grid."""
        return f"{slug(self.method.name)}-m{self.model_seed}-d{self.data_seed}"

    @property
    def config(self) -> dict[str, Any]:
        """Everything that the result depends on, as JSON; not what only names the run or says where the data lies."""
        grid, method = asdict(self.grid), asdict(self.method)
        shared = {name: grid[name] for name in ("data", "model", "train", "evaluate", "targets")}
        shared |= {"first": grid["first"]} if self.grid.first != FirstOptions() else {}
        shared["data"] = {name: value for name, value in grid["data"].items() if name != "tofu_dir"}
        for section, names in _LATER_SECTIONS.items():
            for name in names:
                if not shared[section][name]:
                    del shared[section][name]
        later = {name for name, value in _LATER.items() if method[name] == value}
        method = {name: value for name, value in method.items() if name not in {"name", "baseline", *later}}
        return plain({**shared, "method": method, "data_seed": self.data_seed, "model_seed": self.model_seed})

    @property
    def start(self) -> UnlearnOptions:
        """The options that decide the start model and the reference: with the model's seed instead of the data's."""
        return replace(self.options(), output=OutputOptions(seed=self.model_seed))

    def options(self) -> UnlearnOptions:
        """The options with which `unlearn` would do the same run."""
        grid, method = self.grid, self.method
        data = {name: value for name, value in vars(grid.data).items() if name not in ("reference", "stale_share")}
        if isinstance(grid.model, str) and not grid.first.finetune_first and grid.data.authors == AUTHORS:
            data["authors"] = None  # the default of a grid is for a model that learns so many
        epochs = grid.train.max_epochs if method.epochs is None else method.epochs
        return UnlearnOptions(
            model=ModelOptions(grid.model if isinstance(grid.model, str) else "scratch"),
            data=DataOptions(**data),
            evaluation=EvaluationOptions(
                max_new_tokens=grid.evaluate.max_new_tokens,
                evaluation_batch_size=grid.evaluate.batch_size,
                reference=grid.data.reference,
            ),
            output=OutputOptions(seed=self.data_seed),
            method=MethodOptions(
                method="uld" if method.kind == "uld" else "surgery",
                forget_loss=method.forget_loss,
                loss_options=method.loss_options,
                retain_loss=method.retain_loss,
                retain_inside=method.retain_inside,
                keep_asked_words=method.keep_asked_words,
                substitute_weight=method.substitute_weight,
                rule=method.rule,
                rule_options=method.rule_options,
                ema_decay=method.ema_decay,
                retain_weight=method.retain_weight,
                retain_noise=method.retain_noise,
                retain_anchor=method.retain_anchor,
                guard=method.guard,
                radius=method.radius,
                radius_scale=method.radius_scale,
                scope=method.scope,
                metric=method.metric,
            ),
            training=TrainingOptions(
                optimizer=method.optimizer or grid.train.optimizer,
                optimizer_options=method.optimizer_options,
                lr=grid.train.lr if method.lr is None else method.lr,
                weight_decay=grid.train.weight_decay,
                warmup_steps=grid.train.warmup_steps,
                lr_schedule=method.lr_schedule,
                epochs=epochs if method.steps is None else None,
                steps=method.steps,
                batch_size=grid.train.batch_size if method.batch_size is None else method.batch_size,
                accumulate=1,
                max_norm=grid.train.max_norm if method.max_norm is None else method.max_norm,
                lora_rank=method.lora_rank,
                lora_init=method.lora_init,
                uld=method.uld,
                precision=grid.train.precision,
            ),
            first=grid.first,
            finish=FinishOptions(method.finish_steps, method.finish_lr),
        )


@dataclass(frozen=True)
class Grid:
    """What the YAML file of an ablation holds.

    Attributes:
        methods: The rows of the table.
        targets: Where the methods are compared.
        data: What is to be forgotten and kept.
        model: The small Llama that is trained first, or the folder or hub name of a model.
        train: What all methods share, unless a row says otherwise.
        evaluate: How much is scored.
        seeds: Every method is run with every pair of them.
        first: Whether and how the model is taught first, as the options of `unlearn` with these names.
        baseline: Name of a method that every other is compared with, besides its own baseline.
    """

    methods: tuple[Method, ...]
    targets: Targets
    data: Data = field(default_factory=Data)
    model: Scratch | str = field(default_factory=Scratch)
    train: Train = field(default_factory=Train)
    evaluate: Evaluate = field(default_factory=Evaluate)
    seeds: Seeds = field(default_factory=Seeds)
    first: FirstOptions = field(default_factory=FirstOptions)
    baseline: str | None = None

    def baselines(self, method: Method) -> list[str]:
        """Names of the methods that a method is compared with."""
        return [name for name in dict.fromkeys((method.baseline, self.baseline)) if name not in (None, method.name)]

    def runs(self) -> list[Run]:
        """Every method with every pair of seeds.

        All methods come with the first seeds before any comes with the next, so that an unfinished table is useful
        early.
        """
        pairs = itertools.product(self.seeds.model, self.seeds.data)
        return [Run(self, method, data, model) for model, data in pairs for method in self.methods]

    def check(self) -> None:
        """Raise ValueError on whatever would fail later, or would compare what cannot be compared."""
        names = [method.name for method in self.methods]
        slugs = [slug(name) for name in names]
        if not names or len(set(slugs)) < len(slugs) or not all(slugs):
            raise ValueError(f"methods: expected rows with names that differ in letters and digits, found {names}")
        if self.baseline is not None and self.baseline not in names:
            raise ValueError(f"baseline: expected one of {names}, found {self.baseline!r}")
        if not any(self.targets.on_the_way.values()) and not self.targets.end:
            raise ValueError(
                "targets: expected at least one that is met on the way, such as forget_probability: [0.05], or end: [own], found none"
            )
        if len(self.targets.end) > 1:
            raise ValueError(f"targets, end: expected [own], found {list(self.targets.end)}")
        self._check_attacks()
        if not 0.0 <= self.data.stale_share <= 1.0:
            raise ValueError(f"data: expected a stale_share between 0 and 1, found {self.data.stale_share}")
        if self.evaluate.utility and (self.data.tofu is None or not isinstance(self.model, str)):
            raise ValueError(
                "evaluate, utility: expected data.tofu and a ready model, whose knowledge of real authors and the world can be scored, "
                f"found tofu: {self.data.tofu} and {'a ready model' if isinstance(self.model, str) else 'the small Llama'}"
            )
        if not all(0.0 < share < 1.0 for share in self.targets.retained):
            raise ValueError(
                f"targets, retained: expected shares of the start's retain probability, between 0 and 1, found {self.targets.retained}"
            )
        if not (self.seeds.data and self.seeds.model):
            raise ValueError(f"seeds: expected at least one of data and one of model, found {self.seeds}")
        for name, seeds in vars(self.seeds).items():
            if len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**32 for seed in seeds):
                raise ValueError(
                    f"seeds, {name}: expected different whole numbers between 0 and {2**32 - 1}, found {list(seeds)}"
                )
        for name, values in self.targets.on_the_way.items():
            domain = "above 0" if name == "forget_nll" else "between 0 and 1"
            numbers = [value for value in values if value != "reference"]
            if not all(0.0 < value < (math.inf if name == "forget_nll" else 1.0) for value in numbers):
                raise ValueError(f"targets, {name}: expected numbers {domain}, found {list(values)}")
        if not isinstance(self.model, str):
            try:
                ScratchSettings(**vars(self.model)).check()
            except ValueError as error:
                raise ValueError(f"model: {error}") from error
        if isinstance(self.model, str) and len(self.seeds.model) > 1 and not self.first.finetune_first:
            raise ValueError(
                f"seeds: expected one model seed for the ready model {self.model}, found {self.seeds.model}"
            )
        if not 0.0 < self.evaluate.tolerance < 1.0:
            raise ValueError(f"evaluate: expected a tolerance between 0 and 1, found {self.evaluate.tolerance}")
        for section, name in (("train", "max_epochs"), ("train", "evaluate_every"), *_COUNTS):
            if (value := getattr(getattr(self, section), name)) < 1:
                raise ValueError(f"{section}: expected {name} >= 1, found {value}")
        if self.first.finetune_first and not isinstance(self.model, str):
            raise ValueError(
                "first: expected a ready model with finetune_first, found the small Llama, which always is taught"
            )
        for method in self.methods:
            if self.targets.end and method.kind != "surgery":
                raise ValueError(
                    f"targets, end: expected methods of the kind surgery, found {method.name!r} of the kind {method.kind}, whose weight is "
                    "matched: it has no end of its own"
                )
            if method.own_end and not self.targets.end:
                raise ValueError(
                    f"methods, {method.name!r}: expected targets with end: [own] for {', '.join(method.own_end)}, found none: training "
                    "stops where all targets are met"
                )
            if method.baseline is not None and method.baseline not in names:
                raise ValueError(
                    f"methods: expected the baseline of {method.name!r} to be one of {names}, found {method.baseline!r}"
                )
            by_coordinates = method.rule in gs.elementwise.ELEMENTWISE
            max_norm = self.train.max_norm if method.max_norm is None else method.max_norm
            plain_length = (method.scope, method.metric, max_norm) == ("global", "euclidean", None)
            if method.placebo and (method.rule == NO_RULE or by_coordinates or not plain_length):
                raise ValueError(
                    "methods: expected a rule of the Gram matrix to take the length from, scope: global, metric: euclidean and no max_norm "
                    f"for the placebo {method.name!r}, found rule: {method.rule}, scope: {method.scope}, metric: {method.metric}, "
                    f"max_norm: {max_norm}"
                )
            try:
                method.check()
                Run(self, method, data_seed=0, model_seed=0).options().check()
            except ValueError as error:
                raise ValueError(f"methods, {method.name!r}: {error}") from error

    def _check_attacks(self) -> None:
        for name, settings in self.evaluate.attacks.items():
            try:
                relearn_settings(settings).check(_LEAST)
            except (TypeError, ValueError) as error:
                raise ValueError(f"evaluate, attacks, {name}: {error}") from error
            if not slug(name):
                raise ValueError(f"evaluate, attacks: expected names with letters or digits, found {name!r}")
        if self.evaluate.attack_matches and not self.evaluate.attacks:
            raise ValueError("evaluate: expected attacks with attack_matches, found none")
        if self.evaluate.attacks and not (self.targets.end or self.evaluate.attack_matches):
            raise ValueError(
                "evaluate, attacks: expected targets with end: [own], where they are run, or attack_matches: true, found neither"
            )


# Settings that were added when there were results already. At these values they are left out of a run's config, so that
# the old results stay valid.
_LATER = {
    name: getattr(Method(""), name)
    for name in (
        *("kind", "epochs", "lora_rank", "lora_init", "uld", "max_weight"),
        *("steps", "max_norm", "lr_schedule", "stop_below", "radius", "radius_scale", "adversary"),
        *("retain_rows", "row_examples", "undo", "finish_steps", "finish_lr"),
        *("retain_noise", "optimizer_options", "keep_asked_words", "substitute_weight", "batch_size"),
        "retain_anchor",
    )
}
_LATER_SECTIONS = {
    "data": ("forget_authors", "chat_template_kwargs", "retain_heldout", "heldout_authors", "stale_share"),
    "evaluate": ("attacks", "attack_matches", "utility", "autocast"),
    "targets": ("retained", "end"),
}
_COUNTS = tuple(("evaluate", entry.name) for entry in fields(Evaluate) if entry.type == "int")
_LEAST = 4  # examples, of which a quarter is taught: only the settings are judged here


def slug(name: str) -> str:
    """A name in the form that it has in file names.

    Example:
        >>> slug("GA + GRU, alpha=0.5")
        'ga-gru-alpha-0.5'
    """
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")


def plain(value: Any) -> Any:
    """The value as it comes back from JSON: with lists instead of tuples."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
