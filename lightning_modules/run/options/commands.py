"""What the commands are told: the groups of options together, and what must hold between them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lightning_modules.run.options.data import (
    AUTHORS,
    DataOptions,
    EvaluateOutputOptions,
    EvaluationOptions,
    ModelOptions,
    OutputOptions,
)
from lightning_modules.run.options.finetune import FirstOptions
from lightning_modules.run.options.finish import FinishOptions
from lightning_modules.run.options.flat import AUTO, Flat, check_finite, flag
from lightning_modules.run.options.ledger import LedgerOptions
from lightning_modules.run.options.loading import LoadingOptions
from lightning_modules.run.options.machine import by_machine
from lightning_modules.run.options.method import MethodOptions
from lightning_modules.run.options.recipes import RecipeOptions, expanded
from lightning_modules.run.options.sharded import check_whole
from lightning_modules.run.options.shared import FSDP2
from lightning_modules.run.options.training import TrainingOptions, uld_numbers
from lightning_modules.training.uld_settings import ULDSettings

OF_SURGERY = (
    *(option.name for option in fields(MethodOptions) if option.name != "method"),
    *("optimizer", "optimizer_options", "accumulate", "max_norm", "stop_below", "score_every", "collapse_below"),
    *("group_by_length", "gradient_checkpointing", "padding_free", "compile"),
    *("strategy", "devices", "num_nodes"),
)
"""Options without effect under --method uld: they are about losses, rules, steps of surgery or processes."""
HARMLESS = {"accumulate": 1, "devices": "1"}
"""Values of these that say what ULD does anyway."""


@dataclass(frozen=True)
class Options(Flat):
    """What `unlearn` and `evaluate` are told: which model, what it forgets and keeps, how it is scored."""

    model: ModelOptions = field(default_factory=ModelOptions)
    loading: LoadingOptions = field(default_factory=LoadingOptions)
    data: DataOptions = field(default_factory=DataOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    output: OutputOptions = field(default_factory=OutputOptions)

    def check(self) -> None:
        """Raise ValueError on options outside their domain, or that contradict each other."""
        self.check_without_torch()

    def check_without_torch(self) -> None:
        """The part of `check` that needs no function of torch's or of ours, and takes no time."""
        check_finite(self)
        self.data.check()
        self.evaluation.check()
        self.output.check()
        self.loading.check(scratch=self.model.scratch)
        if not (self.model.scratch or self.data.from_files or self.data.benchmark):
            raise ValueError(
                f"expected --forget and --retain, or --tofu, --muse or --wmdp, with --model {self.model.model}: which answers is it to "
                "forget?"
            )
        if self.model.scratch:
            self.data.check_scratch()
        self.check_authors()

    def check_authors(self, *, typed: bool = False) -> None:
        """As `DataOptions.check_authors`."""
        self.data.check_authors(chosen=self.authors is not None, typed=typed)

    @property
    def chooses_authors(self) -> bool:
        """Whether --authors and --forget-authors choose among the authors."""
        return self.model.scratch or (self.data.tofu is not None and self.data.authors is not None)

    @property
    def authors(self) -> int | None:
        """Of how many authors the examples are; None where they are no authors', or all of them."""
        if self.data.from_files or self.data.cuts_texts or not self.chooses_authors:
            return None
        return AUTHORS if self.data.authors is None else self.data.authors


@dataclass(frozen=True)
class EvaluateOptions(Options):
    """Score a model on its splits and write metrics.json."""

    output: EvaluateOutputOptions = field(default_factory=EvaluateOutputOptions)


@dataclass(frozen=True)
class UnlearnOptions(Options):
    """Make a model forget, and measure what it forgot and what it kept.

    Without arguments: a small model and fictional authors.

    The defaults of the model from scratch are the papers' (CE-U, GRU), with --model those that kept most without a
    tuned weight (--recipe balanced). deep lasts longest when answers are taught again, imitate sounds like a model
    without them.
    """

    recipe: RecipeOptions = field(default_factory=RecipeOptions)
    method: MethodOptions = field(default_factory=MethodOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    first: FirstOptions = field(default_factory=FirstOptions)
    finish: FinishOptions = field(default_factory=FinishOptions)
    ledger: LedgerOptions = field(default_factory=LedgerOptions)

    @classmethod
    def of(cls, **values: Any) -> UnlearnOptions:
        """As `Flat.of`; what is not given is as its recipe says."""
        return super().of(**expanded(values))

    def check(self) -> None:
        """Raise ValueError on options outside their domain, or that contradict each other."""
        super().check()
        self._check_functions()

    def check_without_torch(self) -> None:
        """As in `Options`; what is left is whether losses, rule and optimizer take their options."""
        super().check_without_torch()
        for group in (self.recipe, self.method, self.training, self.first, self.finish, self.ledger):
            group.check()
        if self.method.method == "uld" and self.recipe.recipe != "paper":
            raise ValueError(
                f"--recipe {self.recipe.recipe}: expected a run with surgery, found --method uld, which combines no gradients; leave it out"
            )
        self._check_depth()
        self.ledger.check_beside(self.method, self.training, self.evaluation, cuts_texts=self.data.cuts_texts)
        self.ledger.check_requests(self.data.requests)
        self.training.check_compiled(self.method.retain_inside)
        if self.first.finetune_first and self.model.scratch:
            raise ValueError(
                "--finetune-first: expected --model, which is to be taught first, found the model from scratch, which always is; "
                "leave it out"
            )
        if self.first.finetune_first and self.data.cuts_texts:
            raise ValueError(
                f"--finetune-first: expected questions and answers to teach first, found {'--muse' if self.data.muse else '--wmdp'}, whose "
                "scores are of a model that knows more than the texts to forget and to keep; give such a model, or teach one with "
                "`gradsurgery finetune --data FILE`"
            )
        method, training = self.method, self.training
        if method.method == "uld" and (training.probed or training.best_below is not None):
            raise ValueError(
                "--probes, --best-below: expected a run with surgery, found --method uld, whose model they do not know"
            )
        if method.method == "uld" and training.sharded:
            raise ValueError(
                f"--strategy {FSDP2}: expected a run with surgery, found --method uld, which trains a small model beside a whole "
                "one; use --devices 1"
            )
        self._check_adapters()
        if method.method != "uld":
            self.loading.check_training(training)
        if method.start_model == "adapters_off" and (not training.lora_rank or training.lora_init == "fila"):
            raise ValueError(
                "expected --start-model adapters_off with adapters that leave the base as it is (--lora-rank without --lora-init fila), "
                "found none; choose copy or precomputed"
            )
        if method.method == "uld" and training.lr == "auto":
            raise ValueError(
                "--lr auto: expected a run with surgery, found --method uld, which trains no step of the model itself; give a number, or "
                "leave it out"
            )
        if training.uld and method.method != "uld":
            raise ValueError(f"--uld: expected --method uld with it, found --method {method.method}")

    def _check_functions(self) -> None:
        import torch

        import gradsurgery as gs

        method, training = self.method, self.training
        method.check_functions()
        training.optimizer_class()
        try:
            base = training.base_optimizer(1.0)([("weight", torch.nn.Parameter(torch.zeros(1)))])
        except (TypeError, ValueError) as error:  # Muon takes matrices only
            options = f" with {training.optimizer_options}" if training.optimizer_options else ""
            raise ValueError(
                "--optimizer, --optimizer-options: expected an optimizer that can step every parameter of a model, with options that it "
                f"knows, found {training.optimizer}{options}: {error}"
            ) from error
        try:
            method.surgery(max_norm=training.max_norm, accumulate=training.accumulates)(base)
            rule: Any = method.bound_rule()
            rule([[], []] if gs.elementwise.is_elementwise(rule) else torch.eye(2, dtype=torch.float64))
        except TypeError as error:
            raise ValueError(
                f"expected options that {training.optimizer} and the rule {method.rule} know, found: {error}"
            ) from error

    def check_effect(self) -> None:
        """Raise ValueError on options that the method would leave without effect; a grid gives them to all methods."""
        if self.method.method != "uld":
            return
        default, given = UnlearnOptions().flat(), self.flat()
        said = [name for name in OF_SURGERY if given[name] not in (default[name], HARMLESS.get(name, default[name]))]
        if said:
            raise ValueError(
                f"{', '.join(map(flag, said))}: expected a run with surgery, found --method uld, which trains an assistant by AdamW in one "
                "process and combines no gradients; leave it out, and use --devices 1"
            )

    def _check_depth(self) -> None:
        if self.method.keep_asked_words and (self.method.forget_loss == "idk" or self.data.cuts_texts):
            found = "--muse or --wmdp, whose texts answer no question"
            if self.method.forget_loss == "idk":
                found = "--forget-loss idk, which trains on refusals alone"
            raise ValueError(
                f"--keep-asked-words: expected a loss on answers to questions, found {found}; leave it out"
            )
        if self.method.method == "uld":
            given = {
                "radius": self.method.radius,
                "finish_steps": self.finish.finish_steps,
                "lr_schedule": self.training.lr_schedule != "constant",
                "steps": self.training.steps,
            }
            if unused := [flag(name) for name, value in given.items() if value]:
                raise ValueError(f"{', '.join(unused)}: expected a run with surgery, found --method uld")
        self.recipe.check_teacher(self.model, self.method)
        if self.method.teacher is not None and not (self.method.imitates or self.finish.finish_steps):
            raise ValueError(
                f"--teacher: expected --forget-loss kl_divergence or undial, or --finish-steps, which bring the answers to the teacher's "
                f"probabilities, found --forget-loss {self.method.forget_loss} and no finish"
            )
        if self.method.teacher is not None and self.model.scratch:
            raise ValueError(
                "--teacher: expected --model, with whose tokenizer the teacher reads, found the model from scratch; leave it out"
            )
        if self.method.imitates and self.training.lr == AUTO:
            raise ValueError(
                f"--lr auto: expected a loss that brings the forget probability below any target, found --forget-loss "
                f"{self.method.forget_loss}, which ends at a teacher's; give --lr, for example 5e-5"
            )
        if self.training.sharded:
            check_whole(self.method, self.finish)
        taught = self.finish.finish_steps or self.method.substitute_weight
        if self.finish.substitutes is not None and not taught:
            raise ValueError(
                "--substitutes: expected --finish-steps or --substitute-weight, which teach these answers, found neither"
            )
        if self.method.substitute_weight and self.data.cuts_texts:
            raise ValueError(
                "--substitute-weight: expected questions, which other answers fit, found texts of --muse or --wmdp; give 0 (--recipe deep "
                "has 1), and no answer is taught in their place"
            )
        if self.method.teacher is not None and self.finish.substitutes is not None:
            raise ValueError(
                "--substitutes: expected no --teacher with it, found both: whose answers is the finish to teach?"
            )

    def _check_adapters(self) -> None:
        training, uld = self.training, self.method.method == "uld"
        unused = training.without_effect()
        if unused and not training.lora_rank and not uld:
            raise ValueError(
                f"expected --lora-rank with {', '.join(unused)}, for example 8, found 0, which trains all weights"
            )
        if uld and (training.save != "merged" or training.lora_init != "default" or training.lora_kind != "lora"):
            raise ValueError(
                "--save, --lora-init, --lora-kind: expected a run with surgery, found --method uld, whose assistant is plain LoRA and "
                "always saved beside the model"
            )
        if (
            uld
            and training.lora_alpha is not None
            and training.uld.get("lora_alpha", training.lora_alpha) != training.lora_alpha
        ):
            raise ValueError(
                f"--lora-alpha: expected the lora_alpha of --uld, which means the same, {training.uld['lora_alpha']}, found "
                f"{training.lora_alpha}; give one of them"
            )

    @property
    def chooses_authors(self) -> bool:
        """As in `Options`; a model that is taught first learns of so many, too."""
        return super().chooses_authors or self.first.finetune_first

    def resolved(self) -> UnlearnOptions:
        """A copy in which no value depends on another option or on the machine any more: what config.yaml holds."""
        scratch, uld = self.model.scratch, self.method.method == "uld"
        depends: dict[str, Any] = {
            "lr": 5e-5 if scratch else 1e-5,
            "epochs": 20 if scratch else 5,
            "accumulate": None if uld else 1 if scratch else 4,
            "stop_below": 0.05 if scratch and not uld else None,
            "score_every": 1 if scratch and not uld else None,
            "probes": "quick" if scratch and not uld else "none",
            **by_machine(self.training, scratch=scratch),
        }
        if self.training.steps is not None:
            del depends["epochs"]
        always: dict[str, Any] = {} if self.ledger.ledger is None else {"devices": "1"}
        if uld:
            depends |= {"lr": 3e-3, "epochs": 30} if scratch else {"lr": ULDSettings.lr, "epochs": ULDSettings.epochs}
            del depends["padding_free"]
            always["lora_rank"] = self.training.lora_rank or ULDSettings.lora_rank
            always["uld"] = ({"num_layers": 1, "weight": 1.0} if scratch else {}) | self.training.uld
            depends["lora_alpha"] = always["uld"].pop("lora_alpha", ULDSettings.lora_alpha)
        elif self.training.lora_rank:
            depends["lora_alpha"] = 2.0 * self.training.lora_rank
        known = {name: value for name, value in depends.items() if getattr(self.training, name) is None} | always
        training, finish = replace(self.training, **known), self.finish
        if finish.finish_steps and finish.finish_lr is None and isinstance(training.lr, (int, float)):
            finish = replace(finish, finish_lr=training.lr / 2.0)
        name = self.ledger.ledger  # wherever the command is started that goes on with the run
        ledger = self.ledger if name is None else replace(self.ledger, ledger=str(Path(name).resolve()))
        data = replace(self.data, authors=self.authors or self.data.authors)
        return replace(self, data=data, training=training, finish=finish, ledger=ledger)

    def uld_settings(self) -> ULDSettings:
        """How ULD's assistant is trained; counts are whole numbers, even where a YAML file says 8.0."""
        training, kinds = self.training, uld_numbers()
        given: dict[str, Any] = {
            name: int(value) if kinds.get(name) is int else value for name, value in training.uld.items()
        }
        if training.lora_alpha is not None:
            given["lora_alpha"] = training.lora_alpha
        return ULDSettings(
            lora_rank=training.lora_rank or ULDSettings.lora_rank,
            lora_targets=training.lora_targets,
            lora_dropout=training.lora_dropout,
            lr=training.lr if isinstance(training.lr, (int, float)) else ULDSettings.lr,
            weight_decay=training.weight_decay,
            warmup_steps=training.warmup_steps,
            epochs=training.epochs or ULDSettings.epochs,
            batch_size=training.batch_size,
            max_length=self.data.max_length,
            seed=self.output.seed,
            **given,
        )
