"""What two processes do whose scores differ; apart, so that processes can import it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_modules as lm
from lightning_modules.run import assembly
from lightning_modules.run.options import UnlearnOptions
from lightning_modules.training.callbacks import BestTradeoff, CollapseAlarm, TradeoffCurve, tradeoff_curve
from lightning_modules.training.references import Precomputed

# Step -> (forget, retain), as the first process and as the second one score them.
SAME = [(0.9, 0.9)] * 9
THEIRS = {
    "only the second sees it forgotten, collapsed and better": (SAME, [(0.9, 0.9), (0.01, 0.01), *SAME]),
    "only the first sees it forgotten": ([(0.9, 0.9), (0.01, 0.9), *SAME], SAME),
}
STOPPED = {name: 1 if name.startswith("only the first") else 4 for name in THEIRS}


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(11, 11, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


def batches() -> list[dict[str, dict[str, Tensor]]]:
    tokens = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(1))
    rows = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    return [{"forget": rows, "retain": {**rows, "labels": tokens.flip(0)}}] * 4


def processes_that_disagree_end_together(rank: int, folder: str) -> None:
    for number, (name, scores) in enumerate(THEIRS.items()):
        seen = iter(scores[rank])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                tradeoff_curve,
                "mean_probabilities",
                lambda *_, seen=seen, **__: dict(zip(("forget", "retain"), next(seen), strict=True)),
            )
            curve = TradeoffCurve({"forget": [], "retain": []}, pad_token_id=0, every_n_steps=1, stop_below=0.05)
            alarm = CollapseAlarm(curve, below=0.5)
            best = BestTradeoff(curve, target=0.5, path=Path(folder) / f"{number}.ckpt", folder=folder)
            module = lm.UnlearningModule(Table(), optimizer=partial(torch.optim.SGD, lr=0.1))
            trainer = L.Trainer(
                accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, callbacks=[curve, alarm, best],
                logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                use_distributed_sampler=False,
            )  # fmt: skip
            trainer.fit(module, DataLoader(batches(), batch_size=None))
        assert trainer.global_step == STOPPED[name], name
        assert [(point["forget"], point["retain"]) for point in curve.points] == scores[0][: len(curve.points)], name
        assert alarm.reason is None
        assert best.best is not None
        assert best.best["step"] == (1 if STOPPED[name] == 1 else 0)


def every_process_finds_the_start_model(rank: int, folder: str) -> None:
    """As under torchrun: all begin at once, and the file of the first is not there when the second looks for it."""
    from tests.lightning_modules.evaluation.evaluation_workers import SPLITS, model_and_tokenizer

    model, tokenizer = model_and_tokenizer()
    options = UnlearnOptions.of(forget_loss="npo", output=str(Path(folder) / str(rank)), start_model="precomputed")
    data = lm.ForgetRetainDataModule(SPLITS["forget"], SPLITS["retain"], tokenizer)
    run: Any = SimpleNamespace(options=options, folder=options.output.folder)
    reference = assembly.start_model(run, model, data)
    assert isinstance(reference, Precomputed)
    assert (options.output.folder / "start_model.safetensors").exists() == (rank == 0)
    everything: list[Any] = [None, None]
    torch.distributed.all_gather_object(everything, reference.tensors)
    assert set(everything[0]) == set(everything[1]) >= {"forget_nll", "retain_nll"}
    for name, values in everything[0].items():
        assert torch.equal(values, everything[1][name]), name
    # Where the first was faster, its numbers are taken.
    torch.distributed.barrier()
    shared: Any = SimpleNamespace(options=options, folder=Path(folder) / "0")
    found = assembly.start_model(shared, model, data)
    assert isinstance(found, Precomputed)
    assert found.path.parent == shared.folder
    assert not list(Path(folder).rglob(".partial*"))
