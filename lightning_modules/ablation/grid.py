"""The grid: what is compared, on what, over which seeds; and its runs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import torch

import gradsurgery as gs
from lightning_modules.options import Split, UnlearnOptions


@dataclass(frozen=True)
class Data:
    """What is to be forgotten and kept; the names and meanings are those of `unlearn`."""

    tofu: Split | None = None
    tofu_dir: str | None = None
    authors: int = 10
    forget: str | None = None
    retain: str | None = None
    reference: str | None = None
    max_length: int = 512


@dataclass(frozen=True)
class Scratch:
    """The small Llama that is trained first: arguments of `lightning_modules.scratch.scratch_model`."""

    hidden_size: int = 192
    num_layers: int = 2
    num_heads: int = 4
    epochs: int = 25
    batch_size: int = 8
    lr: float = 2e-3


@dataclass(frozen=True)
class Train:
    """What all methods share, unless a row says otherwise.

    Attributes:
        max_epochs: Passes over the forget set after which a target counts as not reached.
        evaluate_every: Steps between scores; targets are bisected between two of them.
    """

    lr: float = 3e-4
    optimizer: str = "AdamW"
    weight_decay: float = 0.01
    warmup_steps: int = 5
    batch_size: int = 8
    max_norm: float | None = None
    precision: str = "32-true"
    max_epochs: int = 40
    evaluate_every: int = 2


@dataclass(frozen=True)
class Evaluate:
    """How much is scored.

    Attributes:
        tolerance: A match is within this share of its target.
        forget_examples: Forget examples scored everywhere, the first ones.
        curve_examples: Retain examples scored along the way, evenly spread; with a target for them, as many as at a match.
        retain_examples: Retain examples whose probability is scored at a match, evenly spread.
        generated_examples: Examples of each split whose answers are generated at a match, evenly spread.
        max_new_tokens: Of a generated answer.
        batch_size: Texts a forward pass.
    """

    tolerance: float = 0.04
    forget_examples: int = 400
    curve_examples: int = 48
    retain_examples: int = 400
    generated_examples: int = 48
    max_new_tokens: int = 64
    batch_size: int = 64


@dataclass(frozen=True)
class Targets:
    """Where methods are compared: mean forget probability, mean forget NLL ("reference": the retrained model's), retain probability."""

    forget_probability: tuple[float, ...] = ()
    forget_nll: tuple[float | Literal["reference"], ...] = ()
    retain_probability: tuple[float, ...] = ()


@dataclass(frozen=True)
class Seeds:
    """Every method sees every pair of them, so that differences are paired."""

    data: tuple[int, ...] = (0,)
    model: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Method:
    """One row of the table; names and meanings are those of `unlearn`, with a few more.

    Attributes:
        name: Of the row, distinct.
        baseline: Name of the row that it is compared with.
        rule: Also "none": the forget gradient alone.
        placebo: Replace the rule's correction by one of the same length in a random direction.
        guard: By default "measure", which changes nothing and counts the steps that raise the retain loss to first order.
        lr, optimizer: Instead of those of `train`.
    """

    name: str
    baseline: str | None = None
    forget_loss: str = "ceu"
    loss_options: dict[str, float] = field(default_factory=dict)
    retain_loss: str = "cross_entropy"
    rule: str = "gru"
    rule_options: dict[str, float] = field(default_factory=dict)
    ema_decay: float | None = 0.2
    scope: Literal["global", "tensor"] = "global"
    metric: Literal["euclidean", "optimizer"] = "euclidean"
    guard: Literal["none", "measure", "update"] = "measure"
    retain_weight: float = 0.0
    retain_inside: float = 0.0
    placebo: bool = False
    lr: float | None = None
    optimizer: str | None = None

    @property
    def backward_passes(self) -> int:
        """Batches differentiated for a step that the method needs: one, and one for each use of the retain loss."""
        surgery = self.rule != "none" or self.retain_weight != 0.0 or self.guard == "update"
        return 1 + int(self.retain_inside != 0.0) + int(surgery)

    def bound_rule(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Gram matrix -> coefficients, as the row says."""
        options = UnlearnOptions(rule=self.rule, rule_options=self.rule_options)
        return forget_alone if self.rule == "none" else options.bound_rule()


def forget_alone(gram: torch.Tensor) -> torch.Tensor:
    """Coefficients of no surgery: 1 for the first row and 0 for the others, NaN where the Gram matrix is not finite."""
    return gs.rules.gradient_difference(gram, alpha=0.0)


@dataclass(frozen=True)
class Run:
    """One method with one data seed and one model seed."""

    grid: Grid
    method: Method
    data_seed: int
    model_seed: int

    @property
    def id(self) -> str:
        """Readable, and the same whatever else is in the grid."""
        return f"{slug(self.method.name)}-m{self.model_seed}-d{self.data_seed}"

    @property
    def config(self) -> dict[str, Any]:
        """Everything that its result depends on; not what only names it or says where the data lies."""
        grid, method = asdict(self.grid), asdict(self.method)
        shared = {name: grid[name] for name in ("data", "model", "train", "evaluate", "targets")}
        shared["data"] = {name: value for name, value in grid["data"].items() if name != "tofu_dir"}
        method = {name: value for name, value in method.items() if name not in ("name", "baseline")}
        return plain({**shared, "method": method, "data_seed": self.data_seed, "model_seed": self.model_seed})

    def options(self) -> UnlearnOptions:
        """The same run as `unlearn` would be told of it."""
        grid, method = self.grid, self.method
        return UnlearnOptions(
            **{entry.name: getattr(grid.data, entry.name) for entry in fields(Data)},
            model=grid.model if isinstance(grid.model, str) else "scratch",
            max_new_tokens=grid.evaluate.max_new_tokens,
            evaluation_batch_size=grid.evaluate.batch_size,
            seed=self.data_seed,
            forget_loss=method.forget_loss,
            loss_options=method.loss_options,
            retain_loss=method.retain_loss,
            retain_inside=method.retain_inside,
            rule="gradient_difference" if method.rule == "none" else method.rule,
            rule_options={"alpha": 0.0} if method.rule == "none" else method.rule_options,
            ema_decay=method.ema_decay,
            retain_weight=method.retain_weight,
            guard=method.guard,
            scope=method.scope,
            metric=method.metric,
            optimizer=method.optimizer or grid.train.optimizer,
            lr=grid.train.lr if method.lr is None else method.lr,
            weight_decay=grid.train.weight_decay,
            warmup_steps=grid.train.warmup_steps,
            epochs=grid.train.max_epochs,
            batch_size=grid.train.batch_size,
            accumulate=1,
            max_norm=grid.train.max_norm,
            precision=grid.train.precision,
        )


@dataclass(frozen=True)
class Grid:
    """What the YAML file says.

    Attributes:
        baseline: Name of a row that every row is compared with, besides its own baseline.
    """

    methods: tuple[Method, ...]
    targets: Targets
    data: Data = field(default_factory=Data)
    model: Scratch | str = field(default_factory=Scratch)
    train: Train = field(default_factory=Train)
    evaluate: Evaluate = field(default_factory=Evaluate)
    seeds: Seeds = field(default_factory=Seeds)
    baseline: str | None = None

    def baselines(self, method: Method) -> list[str]:
        """Names of the rows that a row is compared with."""
        return [name for name in dict.fromkeys((method.baseline, self.baseline)) if name not in (None, method.name)]

    def runs(self) -> list[Run]:
        """Every method with every pair of seeds; the first seeds of all methods come first, so that a table is soon of use."""
        pairs = itertools.product(self.seeds.model, self.seeds.data)
        return [Run(self, method, data, model) for model, data in pairs for method in self.methods]

    def check(self) -> None:
        """Raise ValueError on whatever would fail later, or compare what cannot be compared."""
        names = [method.name for method in self.methods]
        slugs = [slug(name) for name in names]
        if not names or len(set(slugs)) < len(slugs) or not all(slugs):
            raise ValueError(f"methods: expected rows with names that differ in letters and digits, found {names}")
        if self.baseline is not None and self.baseline not in names:
            raise ValueError(f"baseline: expected one of {names}, found {self.baseline!r}")
        if not (self.targets.forget_probability or self.targets.forget_nll or self.targets.retain_probability):
            raise ValueError("targets: expected at least one, such as forget_probability: [0.05], found none")
        if not (self.seeds.data and self.seeds.model):
            raise ValueError(f"seeds: expected at least one of data and one of model, found {self.seeds}")
        if isinstance(self.model, str) and len(self.seeds.model) > 1:
            raise ValueError(
                f"seeds: expected one model seed for the ready model {self.model}, found {self.seeds.model}"
            )
        if not 0.0 < self.evaluate.tolerance < 1.0:
            raise ValueError(f"evaluate: expected a tolerance between 0 and 1, found {self.evaluate.tolerance}")
        for section, name in (("train", "max_epochs"), ("train", "evaluate_every"), *_COUNTS):
            if (value := getattr(getattr(self, section), name)) < 1:
                raise ValueError(f"{section}: expected {name} >= 1, found {value}")
        for method in self.methods:
            if method.baseline is not None and method.baseline not in names:
                raise ValueError(
                    f"methods: expected the baseline of {method.name!r} to be one of {names}, found {method.baseline!r}"
                )
            if method.placebo and (
                method.rule == "none" or method.scope != "global" or self.train.max_norm is not None
            ):
                raise ValueError(
                    f"methods: expected a rule to take the length from, scope: global and train.max_norm: null for the placebo "
                    f"{method.name!r}, found rule: {method.rule}, scope: {method.scope}, max_norm: {self.train.max_norm}"
                )
            try:
                Run(self, method, data_seed=0, model_seed=0).options().check()
            except ValueError as error:
                raise ValueError(f"methods, {method.name!r}: {error}") from error


_COUNTS = tuple(("evaluate", entry.name) for entry in fields(Evaluate) if entry.name != "tolerance")


def slug(name: str) -> str:
    """A name as part of a file's.

    Example:
        >>> slug("GA + GRU, alpha=0.5")
        'ga-gru-alpha-0.5'
    """
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")


def plain(value: Any) -> Any:
    """The same value as JSON gives it back: lists for tuples."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
