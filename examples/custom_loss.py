"""A forget loss of your own: a function of one number a token, the log-odds of its label.

Run it: python examples/custom_loss.py
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import softplus

import gradsurgery as gs


@gs.losses.token_loss
def patient_unlikelihood(odds: Tensor, *, patience: float = 2.0) -> Tensor:
    """Unlikelihood, -log(1 - p) = softplus(odds), but 0 for tokens whose odds are below exp(-patience) already."""
    return softplus(odds) * (odds > -patience)


torch.manual_seed(0)
hidden, labels = torch.randn(64, 32), torch.randint(1000, (64,))
head = torch.nn.Linear(32, 1000, bias=False)
optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
for loss in ("cross_entropy", partial(patient_unlikelihood, patience=3.0)):  # first memorise, then forget
    for _ in range(100):
        optimizer.zero_grad()
        # Like any loss it can be called with logits. With the head inside `linear`, logits [64, 1000] are never held;
        # UnlearningModule(forget_loss=...) does the same.
        gs.losses.linear(hidden, head.weight, labels, loss).mean().backward()
        optimizer.step()
    probability = torch.softmax(head(hidden), -1)[torch.arange(64), labels]
    print(f"largest probability of a label: {probability.max():.3f}")
