"""The ledger: which record a run is entered in, and how what was forgotten before is protected."""

from __future__ import annotations

from dataclasses import dataclass, fields

from lightning_modules.run.options.data import EvaluationOptions
from lightning_modules.run.options.flat import at_least_one, flag, not_negative
from lightning_modules.run.options.method import MethodOptions
from lightning_modules.run.options.training import TrainingOptions


@dataclass(frozen=True)
class LedgerOptions:
    """A record of deletion requests, one after another, each on the model that the last one left.

    Attributes:
        ledger: folder of a ledger, made where there is none: the run is refused if its request was done before, if it
            overlaps what is to be kept, or if its model is not the one that the last entry left; what was forgotten
            before is protected beside the retain set; when the run is whole, an entry is appended
        criteria: YAML file of what the run has to reach, one `name: limit` a line: forget_probability (at most),
            forget_quality (at least, a p-value), relearning_gap (at most, above the reference's), retention (at least,
            as a share of that before the first request), model_utility (at least)
        request: name of the request in the ledger; the first 12 digits of its hash if not given
        ledger_keep_text: keep the request's rows in the ledger, so that later runs can protect and score what they
            forget
        ledger_sketch: keep instead a sketch of the request's gradient, of this rank for each weight matrix, which
            later runs protect; 0 for none
        ledger_rows: so many protected rows at most for earlier requests; where there are more requests, they take turns
        ledger_weight: multiple of each earlier request's gradient to add after the rule
    """

    ledger: str | None = None
    criteria: str | None = None
    request: str | None = None
    ledger_keep_text: bool = False
    ledger_sketch: int = 0
    ledger_rows: int = 4
    ledger_weight: float = 0.0

    def check(self) -> None:
        """Raise ValueError on options outside their domain, or without effect."""
        not_negative(self, "ledger_sketch", "ledger_weight")
        at_least_one(self, "ledger_rows")
        if self.ledger is None:
            said = [flag(entry.name) for entry in fields(self) if getattr(self, entry.name) != entry.default]
            if said:
                raise ValueError(f"expected --ledger FOLDER with {', '.join(said)}, found none")
            return
        if not self.ledger.strip() or "\0" in self.ledger:
            raise ValueError(f"--ledger: expected the name of a folder, found {self.ledger!r}")
        if self.request is not None and (not self.request.strip() or not self.request.isprintable()):
            raise ValueError(f"--request: expected a name in one line, found {self.request!r}")
        if self.ledger_keep_text and self.ledger_sketch:
            raise ValueError(
                "--ledger-keep-text, --ledger-sketch: expected one of them, found both: a sketch is for where the text must be gone"
            )

    def check_requests(self, requests: str | None) -> None:
        """Raise ValueError where several requests have no ledger, or one name."""
        if requests is not None and self.ledger is None:
            raise ValueError(
                "--requests: expected --ledger FOLDER with it, whose entry says of each request whether it is forgotten, found none; use "
                "--forget for a run without a ledger"
            )
        if requests is not None and self.request is not None:
            raise ValueError("expected either --requests, whose file has the names, or --request, found both")

    def check_beside(
        self, method: MethodOptions, training: TrainingOptions, evaluation: EvaluationOptions, *, cuts_texts: bool
    ) -> None:
        """Raise ValueError on a method, a training, scores or data with which a run is not entered in a ledger."""
        if self.ledger is None:
            return
        if evaluation.autocast:
            raise ValueError(
                "--evaluation-precision: expected 32-true with --ledger, whose scores have to come out again on other machines, found "
                f"{evaluation.evaluation_precision}, which gives two or three digits; leave it out"
            )
        found = {
            "--method uld, whose model is two": method.method == "uld",
            "--best-below, which looks at no request by itself": training.best_below is not None,
            "--save adapter, which leaves no whole model": training.save == "adapter",
            "--muse or --wmdp, whose texts are cut": cuts_texts,
            f"--strategy {training.strategy}": training.strategy != "auto",
            "several devices": training.devices not in ("auto", "1") or training.num_nodes > 1,
            "--lora-rank with --ledger-sketch, which is one of all weights": self.ledger_sketch and training.lora_rank,
        }
        for what, is_there in found.items():
            if is_there:
                raise ValueError(
                    f"--ledger: expected questions and answers, surgery on one device, and a whole model at the end, found {what}; leave "
                    "it out"
                )


@dataclass(frozen=True)
class LedgerVerifyOptions:
    """Check that a record of deletion requests, and everything that it names, is as it was written.

    Attributes:
        rescore: also score every model that is there again, without any code that trains
        head: the hash that the last entry has to have, as it was noted elsewhere
        allow_missing: list runs, models and texts that are gone, and let them pass
    """

    rescore: bool = False
    head: str | None = None
    allow_missing: bool = False
