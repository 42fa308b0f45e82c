"""Gradient surgery in a plain PyTorch loop: forget one half of a classifier's classes, keep the other.

Run it: python examples/plain_loop.py
"""

import torch
from torch import nn

import gradsurgery as gs

torch.manual_seed(0)
inputs = torch.randn(512, 16)
labels = (inputs @ torch.randn(16, 4)).argmax(1)
to_forget = labels < 2
model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))


def loss(chosen: torch.Tensor, token_loss: gs.losses.TokenLoss) -> torch.Tensor:
    return token_loss(model(inputs[chosen]), labels[chosen]).mean()


def accuracy() -> str:
    right = model(inputs).argmax(1) == labels
    return f"forget {right[to_forget].float().mean():.2f}, retain {right[~to_forget].float().mean():.2f}"


learner = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(200):
    learner.zero_grad()
    loss(torch.ones(512, dtype=torch.bool), gs.losses.cross_entropy).backward()
    learner.step()
print("learned:  ", accuracy())

optimizer = gs.GRU(torch.optim.AdamW(model.parameters(), lr=3e-3))
for _ in range(60):
    optimizer.zero_grad()
    with optimizer.objective("retain"):
        loss(~to_forget, gs.losses.cross_entropy).backward()
    with optimizer.objective("forget"):
        loss(to_forget, gs.losses.ceu).backward()
    optimizer.step()
print("unlearned:", accuracy())
if (record := optimizer.record) and record.coefficients is not None:
    print(f"last step: cosine {record.cosines[0, 1]:+.2f}, coefficients {record.coefficients.tolist()}")
