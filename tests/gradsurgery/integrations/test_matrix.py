"""Every trainer, in every way that it trains, is one plain `torch.autograd.grad` loop."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gradsurgery.integrations import matrix
from tests.gradsurgery.optimizer import distributed_workers as workers
from tests.problems import values
from tests.tolerances import STEPPED_FLOAT32, close

pytest.importorskip("lightning")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # the trainers', about small loaders and old names
    pytest.mark.supports("A loop by hand", "accumulation, clipping, bf16-mixed, fp16 with a scaler, DDP"),
    pytest.mark.supports(
        "Lightning, automatic optimization", "accumulation, clipping, bf16-mixed, fp16 with a scaler, DDP; with `join`"
    ),
    pytest.mark.supports(
        "Lightning, manual optimization", "accumulation, clipping, bf16-mixed, fp16 with a scaler, DDP; with contexts"
    ),
    pytest.mark.supports(
        "Hugging Face Trainer", "with `SurgeryTrainerMixin`: accumulation, clipping, bf16, fp16 with a scaler, DDP"
    ),
    pytest.mark.supports(
        "Accelerate", "with `unwrap(optimizer)`: `accumulate`, clipping, bf16, fp16 with a scaler, DDP"
    ),
    pytest.mark.refuses(
        "Lightning, manual optimization: `clip_gradients` before `step()` under a scaler",
        "Lightning clips scaled gradients there (its issue 18089): clip in `on_before_optimizer_step`, or by `max_norm=`",
    ),
    pytest.mark.refuses(
        "fp16 on a CPU in Trainer, Accelerate and by Lightning's `precision=`",
        "they give a CPU no scaler and do not say so; set theirs, as the test does",
    ),
]


@pytest.mark.parametrize(("accumulate", "clipped", "precision"), matrix.CELLS)
@pytest.mark.parametrize("trainer", matrix.TRAINERS)
def test_one_process_is_the_oracles_run(
    trainer: str, accumulate: int, clipped: bool, precision: str, tmp_path: Path
) -> None:
    model = matrix.TRAINERS[trainer](matrix.Case(accumulate, clipped, precision), tmp_path)
    close(values(model), matrix.oracle(accumulate, clipped, precision), STEPPED_FLOAT32)


def test_two_processes_are_the_oracles_run_and_hold_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "PROCESS_TIMEOUT", 240)  # they import every trainer, and run sixty cells
    workers.run(matrix.processes, str(tmp_path))
