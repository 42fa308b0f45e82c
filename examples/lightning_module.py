"""Gradient surgery in your own LightningModule: wrap the optimizer, and return optimizer.join(...).

Run it: python examples/lightning_module.py
"""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradsurgery as gs


class Forgetter(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))

    def training_step(self, batch: dict[str, list[torch.Tensor]], batch_idx: int) -> torch.Tensor:
        losses = {
            "forget": gs.losses.ceu(self.model(batch["forget"][0]), batch["forget"][1]).mean(),
            "retain": gs.losses.cross_entropy(self.model(batch["retain"][0]), batch["retain"][1]).mean(),
        }
        self.log_dict(losses, prog_bar=True)
        return self.surgery.join(**losses)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # accumulate=True, because the Trainer below accumulates two batches a step.
        self.surgery = gs.GRU(torch.optim.AdamW(self.parameters(), lr=3e-3), accumulate=True)
        return self.surgery


def accuracy(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> str:
    right = model(inputs).argmax(1) == labels
    return f"forget {right[labels < 2].float().mean():.2f}, retain {right[labels >= 2].float().mean():.2f}"


if __name__ == "__main__":
    L.seed_everything(0)
    inputs = torch.randn(512, 16)
    labels = (inputs @ torch.randn(16, 4)).argmax(1)
    halves = {"forget": labels < 2, "retain": labels >= 2}
    loaders = {name: DataLoader(TensorDataset(inputs[half], labels[half]), 32) for name, half in halves.items()}
    trainer = L.Trainer(
        max_epochs=12, accumulate_grad_batches=2, gradient_clip_val=1.0, logger=False, enable_checkpointing=False
    )
    module = Forgetter()
    learner = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for _ in range(200):
        learner.zero_grad()
        gs.losses.cross_entropy(module.model(inputs), labels).mean().backward()
        learner.step()
    learner.zero_grad()
    print("learned:  ", accuracy(module.model, inputs, labels))
    trainer.fit(module, loaders)
    print("unlearned:", accuracy(module.model, inputs, labels))
