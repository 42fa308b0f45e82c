"""Attacks on a model that has forgotten: what an adversary gets back who holds its weights, or only asks it.

Every attack leaves the model as it was, and returns what JSON can hold. A result says little without that of a
reference, a model that never saw the forget set, under the same attack. Two more are callbacks too:
`lightning_modules.training.callbacks.relearn_probe` and `quantization_probe`.

| file | content |
|---|---|
| `relearning` | `relearning_attacks`: what is taught, how long and how fast, by name |
| `prompting` | `prompting_probe`: other words, the answer's beginning, examples before the question |
| `sampling` | `sampling_probe`: the best of several sampled answers |
| `lens` | `logit_lens`: how probable an answer is inside, layer by layer |
"""

from __future__ import annotations

from lightning_modules.probes.lens import logit_lens
from lightning_modules.probes.prompting import PromptingSettings, prompting_probe
from lightning_modules.probes.relearning import RelearningAttack, relearning_attacks
from lightning_modules.probes.sampling import SamplingSettings, expected_best, sampling_probe

__all__ = [
    "PromptingSettings",
    "RelearningAttack",
    "SamplingSettings",
    "expected_best",
    "logit_lens",
    "prompting_probe",
    "relearning_attacks",
    "sampling_probe",
]
