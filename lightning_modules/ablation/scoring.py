"""Scores of a model: a few, fast, along the way; all of them at a match, at the start, and for the reference."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import nn

from lightning_modules.ablation.attacks import attacked
from lightning_modules.ablation.grid import Grid
from lightning_modules.data.examples import Example, answered, evenly_spaced
from lightning_modules.data.heldout import RETAIN_HELDOUT
from lightning_modules.data.tokenization import Encoded, encode_example, padding_id
from lightning_modules.evaluation.evaluate import EvaluationSettings, evaluate, truth_ratios
from lightning_modules.evaluation.likelihood import answer_nll, autocasting
from lightning_modules.evaluation.utility import utility_inputs
from lightning_modules.metrics.functional import UTILITY_SPLITS, forget_quality, model_utility
from lightning_modules.progress import Stage
from lightning_modules.report.samples import is_degenerate

GENERAL = tuple(split for split in UTILITY_SPLITS if split != "retain")
"""What model utility asks for besides the retain set."""


class Scorer:
    """Scores models that have the same tokenizer, on one data set.

    Args:
        grid: How much is scored.
        splits: Examples by split, "forget" and "retain" among them.
        tokenizer: Of the models.
        reference: Truth ratios R of a model that never saw the forget set; forget quality compares with them.
    """

    def __init__(
        self,
        grid: Grid,
        splits: Mapping[str, Sequence[Example]],
        tokenizer: Any,
        reference: Sequence[float] | None = None,
    ) -> None:
        self.given, self.tokenizer, self.reference = grid.evaluate, tokenizer, reference
        self.max_length = grid.data.max_length
        self.forget = list(splits["forget"][: self.given.forget_examples])
        # Without their wrong answers, which only the truth ratio needs, and that is asked of the forget set alone.
        self.retain = [
            answered(row, row["answer"]) for row in evenly_spaced(splits["retain"], self.given.retain_examples)
        ]
        heldout = splits.get(RETAIN_HELDOUT, ())
        self.heldout = [
            answered(row, row["answer"])
            for row in evenly_spaced(heldout, min(len(heldout), self.given.retain_examples))
        ]
        curve = (
            self.retain if grid.targets.retain_probability else evenly_spaced(self.retain, self.given.curve_examples)
        )
        self.encoded = {
            split: [encode_example(tokenizer, row, self.max_length) for row in rows]
            for split, rows in (("forget", self.forget), ("retain", curve))
        }

        self.generated = self._generated(splits)
        self.kept = [encode_example(tokenizer, row, self.max_length) for row in self.retain]

    def _generated(self, splits: Mapping[str, Sequence[Example]]) -> dict[str, list[Example]]:
        """The examples whose answers are generated; with their wrong answers only where model utility needs them."""
        given = self.given
        # TOFU has wrong answers to its first 400 retain questions alone.
        kept = [row for row in splits["retain"] if row.get("perturbed_answer") or not given.utility]
        forget, kept = (
            evenly_spaced(rows, given.generated_examples)
            for rows in (self.forget, evenly_spaced(kept, given.retain_examples))
        )
        found = {"forget": [answered(row, row["answer"]) for row in forget]}
        if not given.utility:
            return found | {"retain": [answered(row, row["answer"]) for row in kept]}
        lacking = [split for split in GENERAL if not splits.get(split)]
        if lacking := lacking + ["perturbed answers of retain"] * (not kept):
            raise ValueError(
                f"evaluate, utility: expected what model utility is computed from, found no {' and no '.join(lacking)}: add TOFU's "
                "files real_authors_perturbed.json, world_facts_perturbed.json and retain_perturbed.json to the folder"
            )
        general = {split: evenly_spaced(splits[split], given.generated_examples) for split in GENERAL}
        return found | {"retain": kept} | general

    def along(self, model: nn.Module) -> dict[str, float]:
        """The scores of the curve, which can have targets: `forget_probability`, `forget_nll`, `retain_probability`."""
        nll = {split: self._nll(model, encoded) for split, encoded in self.encoded.items()}
        return {
            "forget_probability": float(torch.exp(-nll["forget"]).mean()),
            "forget_nll": float(nll["forget"].mean()),
            "retain_probability": float(torch.exp(-nll["retain"]).mean()),
        }

    def retention(self, model: nn.Module) -> float:
        """Mean probability of the retain answers, over as many as at a match."""
        return float(torch.exp(-self._nll(model, self.kept)).mean())

    def _nll(self, model: nn.Module, encoded: Sequence[Encoded]) -> torch.Tensor:
        pad, size = padding_id(self.tokenizer), self.given.batch_size
        stage = Stage("Scoring answers", len(encoded))
        with autocasting(model, enabled=self.given.autocast):
            return answer_nll(model, encoded, pad_token_id=pad, batch_size=size, advance=stage.advance)

    def thoroughly(self, model: nn.Module, *, attack: bool | None = None) -> dict[str, Any]:
        """Means over the examples, forget quality, and under `examples` the values behind them, without texts.

        Args:
            model: To score.
            attack: Run the grid's attacks on copies of it too, and put their results under `attacks`; by default if the
                grid asks for them at every target.
        """
        settings = EvaluationSettings(
            batch_size=self.given.batch_size,
            max_new_tokens=self.given.max_new_tokens,
            max_length=self.max_length,
            memorization=False,  # no target and no column shows it
        )
        splits = {"forget": self.forget, "retain": self.retain}
        heldout = {RETAIN_HELDOUT: self.heldout} if self.heldout else {}
        lines = not sys.stderr.isatty()  # a terminal shows the bar of all runs
        with autocasting(model, enabled=self.given.autocast):
            likely = evaluate(
                model, self.tokenizer, splits | heldout, replace(settings, generate=False), progress=lines
            ).examples
            generated = evaluate(model, self.tokenizer, self.generated, settings, progress=lines).examples
        ratios = truth_ratios(likely["forget"])
        found: dict[str, Any] = {}
        for split in ("forget", "retain"):
            found[f"{split}_probability"] = fmean(row["probability"] for row in likely[split])
            found[f"{split}_nll"] = fmean(row["nll"] for row in likely[split])
            recalls = [row["rouge_l_recall"] for row in generated[split] if row["rouge_l_recall"] is not None]
            found[f"{split}_rouge_l_recall"] = fmean(recalls) if recalls else None
            found[f"{split}_n"], found[f"{split}_rouge_n"] = len(likely[split]), len(recalls)
        said = [row["generation"] for row in generated["forget"] if row["generation"] is not None]
        found["forget_degenerate"] = fmean(map(is_degenerate, said)) if said else None
        if nine := utility_inputs(generated):
            found["model_utility"] = model_utility(nine)
            # The retain set's other scores are of more examples.
            found |= {name.replace("retain/", "utility_retain_").replace("/", "_"): nine[name] for name in nine}
            found |= {f"{split}_n": len(generated[split]) for split in GENERAL}
        for split in heldout:
            found[f"{split}_probability"] = fmean(row["probability"] for row in likely[split])
            found[f"{split}_n"] = len(likely[split])
        if self.given.attack_matches if attack is None else attack:
            encoded, pad = self.encoded["forget"], padding_id(self.tokenizer)
            found["attacks"] = attacked(
                model, encoded, self.given.attacks, pad_token_id=pad, autocast=self.given.autocast
            )
        known = [row["truth_ratio"] for row in likely["forget"] if row["truth_ratio"] is not None]
        found["forget_truth_ratio"] = fmean(known) if known else None
        diverged = any(ratio != ratio for ratio in ratios)  # NaN has no rank
        compared = bool(ratios) and self.reference is not None and not diverged
        quality = forget_quality(ratios, self.reference)._asdict() if compared and self.reference else {}
        found |= {f"ks_{name}": quality.get(name) for name in ("statistic", "pvalue", "log10_pvalue", "n")}
        found["examples"] = {
            "forget_nll": [row["nll"] for row in likely["forget"]],
            "retain_nll": [row["nll"] for row in likely["retain"]],
            "forget_rouge_l_recall": [row["rouge_l_recall"] for row in generated["forget"]],
            "retain_rouge_l_recall": [row["rouge_l_recall"] for row in generated["retain"]],
            "truth_ratio_R": ratios,
            **{
                f"{split}_{score}": [row[score] for row in generated[split]]
                for split in GENERAL
                for score in ("nll", "rouge_l_recall")
                if split in generated
            },
            **{f"{split}_nll": [row["nll"] for row in likely[split]] for split in heldout},
        }
        return found
