"""gradsurgery: a PyTorch optimizer that keeps the gradients of several objectives apart and combines them by a rule.

Example:
    >>> import torch, gradsurgery as gs
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = gs.GRU(torch.optim.AdamW(model.parameters(), lr=1e-2))
    >>> retain, forget = torch.randn(8, 2), torch.randn(8, 2)
    >>> with optimizer.objective("retain"):
    ...     model(retain).square().mean().backward()
    >>> with optimizer.objective("forget"):
    ...     (-model(forget).square().mean()).backward()
    >>> optimizer.step()
    >>> optimizer.zero_grad()
    >>> optimizer.record.applied
    True
"""

from gradsurgery import gram, logit_difference, lora, losses, rules, task_vectors
from gradsurgery.optimizer import scope
from gradsurgery.optimizer.anchor import LayerAnchor
from gradsurgery.optimizer.dual import DualOptimizer
from gradsurgery.optimizer.gru import GRU
from gradsurgery.optimizer.perturbation import Perturbed
from gradsurgery.optimizer.record import Record
from gradsurgery.optimizer.surgery import GradientSurgery
from gradsurgery.rules import elementwise

__version__ = "0.1.0"
__all__ = [
    "GRU",
    "DualOptimizer",
    "GradientSurgery",
    "LayerAnchor",
    "Perturbed",
    "Record",
    "__version__",
    "elementwise",
    "gram",
    "logit_difference",
    "lora",
    "losses",
    "rules",
    "scope",
    "task_vectors",
]
