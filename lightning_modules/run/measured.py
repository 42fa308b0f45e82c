"""Which criteria of a ledger a run can speak of: each needs something to be measured with."""

from __future__ import annotations

from lightning_modules.ledger.criteria import Criteria
from lightning_modules.run.options import UnlearnOptions
from lightning_modules.run.places import is_log
from lightning_modules.run.run import Splits


def check_measured(options: UnlearnOptions, splits: Splits, criteria: Criteria) -> None:
    """Refuse a criterion whose number the run would not measure.

    Raises:
        ValueError: If there is one; the message says what is missing.
    """
    reference = options.evaluation.reference
    has_reference = options.model.scratch or options.first.finetune_first or reference is not None
    of_model = has_reference and not (reference is not None and is_log(reference))
    ratios = any("perturbed_answer" in row for row in splits["forget"])
    general = {"real_authors", "world_facts"} <= set(splits)
    needs = {
        "forget_quality": (has_reference and ratios, "--reference, and perturbed answers in the data"),
        "relearning_gap": (options.training.probed and of_model, "--probes quick, and a --reference that is a model"),
        "model_utility": (general, "--tofu with its files about real authors and world facts"),
    }
    for name in criteria.limits:
        there, what = needs.get(name, (True, ""))
        if not there:
            raise ValueError(f"--criteria, {name}: expected {what}, found none, without which it is not measured")
