"""A forget loss of your own in ten lines: write what it does to one number, the log-odds of the label; the rest follows.

Run it: python examples/custom_loss.py
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

import gradsurgery as gs


@gs.losses.token_loss
def patient_unlikelihood(odds: Tensor, *, patience: float = 2.0) -> Tensor:
    """-log(1 - p), which stops at tokens that are already `patience` nats less likely than not."""
    return softplus(odds + patience) * (odds > -patience).detach()


torch.manual_seed(0)
hidden, labels = torch.randn(64, 32, requires_grad=True), torch.randint(1000, (64,))
head = torch.nn.Linear(32, 1000, bias=False)

# On logits, as any loss; and on hidden states with a head, without ever holding [64, 1000].
plain = patient_unlikelihood(head(hidden), labels, patience=9.0).mean()
fused = gs.losses.linear(hidden, head.weight, labels, lambda z, y: patient_unlikelihood(z, y, patience=9.0)).mean()
print(f"plain {plain:.6f}, fused {fused:.6f}")
