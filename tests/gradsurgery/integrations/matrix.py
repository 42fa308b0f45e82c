"""The acceptance matrix: one training, run by every trainer in every way that the issue names, and its oracle.

Micro-batch number n is the same everywhere. A step of the whole run takes ``accumulate * world`` of them in order, and rank r of W gets
number ``W * i + r`` as its i-th, so that one oracle serves both numbers of processes.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery.integrations.accelerate import unwrap
from tests.gradsurgery.optimizer import distributed_workers as workers
from tests.problems import TWO, batch, mlp, values
from tests.reference import training
from tests.tolerances import STEPPED_FLOAT32, close

STEPS = 4
DECAY = 0.7
# By micro-batches in a step: the optimizer's own clipping, and the trainer's. Each bites in some steps and not in others.
MAX_NORM = {1: 0.8, 2: 0.6, 3: 0.55, 6: 0.4}
CLIP = {1: 0.5, 2: 0.4, 3: 0.45, 6: 0.25}
PRECISIONS = {"float32": None, "bf16-mixed": torch.bfloat16, "fp16, scaler": torch.float16}


class Case(NamedTuple):
    """One cell of the matrix, but for the trainer."""

    accumulate: int
    clipped: bool
    precision: str
    rank: int = 0
    world: int = 1

    @property
    def dtype(self) -> torch.dtype | None:
        return PRECISIONS[self.precision]

    @property
    def scaled(self) -> bool:
        return self.dtype is torch.float16

    @property
    def clip(self) -> float | None:
        return CLIP[self.accumulate * self.world] if self.clipped else None

    @property
    def wrap(self) -> Callable[..., gs.GradientSurgery]:
        """Base optimizer -> surgery."""
        return partial(gs.GradientSurgery, ema_decay=DECAY, max_norm=MAX_NORM[self.accumulate * self.world])

    @property
    def micro_batches(self) -> int:
        """Of this process in the whole run."""
        return STEPS * self.accumulate

    def number(self, index: int) -> int:
        """Of this process's micro-batch at ``index``."""
        return self.world * index + self.rank

    def scaler(self) -> torch.amp.GradScaler:
        """Its scale grows within the run. Not enabled, it does nothing."""
        return torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2, enabled=self.scaled)

    def autocast(self) -> Any:
        return nullcontext() if self.dtype is None else torch.autocast("cpu", self.dtype)


CELLS = list(product((1, 3), (False, True), PRECISIONS))


def network() -> nn.Module:
    return mlp(dtype=torch.float32)


def loss_of(model: Callable[[Tensor], Tensor], number: int, name: str) -> Tensor:
    """Some conflict, and their lengths differ several times over."""
    inputs, labels = batch(TWO.index(name), number, dtype=torch.float32)
    loss = nn.functional.cross_entropy(model(inputs * (0.5 + number % 3)).float(), labels)
    return -loss if name == "forget" else loss


def losses(model: Callable[[Tensor], Tensor], number: int) -> dict[str, Tensor]:
    return {name: loss_of(model, number, name) for name in TWO}


def base(parameters: Any) -> torch.optim.Optimizer:
    # Momentum and not Adam, which would hide a gradient of the wrong length.
    return torch.optim.SGD(parameters, lr=0.2, momentum=0.9)


@cache
def oracle(window: int, clipped: bool, precision: str) -> Tensor:
    """The parameters after `STEPS` steps of ``window`` micro-batches, in one process."""
    model, case = network(), Case(window, clipped, precision)
    decay, max_norm = {"retain": DECAY}, MAX_NORM[window]
    reference = training.Surgery(model, base(model.parameters()), TWO, ema_decay=decay, max_norm=max_norm)
    norms: list[float] = []

    def clipping(*_: Any) -> None:
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), case.clip or torch.inf)))

    reference.base.register_step_pre_hook(clipping)
    steps = []
    for step in range(STEPS):
        with case.autocast():
            found = [losses(model, number) for number in range(step * window, (step + 1) * window)]
        steps.append(reference.step(found))
    assert {step.conflict for step in steps} == {True, False}
    assert min(norms) < 0.999 * max_norm < max(norms), "max_norm bites in all steps, or in none"
    assert min(norms) < CLIP[window] < max(norms), "the trainer's clipping bites in all steps, or in none"
    return values(model)


# The trainers: case, folder -> the trained model ---------------------------------------------------------------------------------


def plain(case: Case, folder: Path) -> nn.Module:
    """A loop by hand: contexts, DDP's no_sync, and a scaler in its documented order."""
    model = network()
    wrapped: Any = nn.parallel.DistributedDataParallel(model) if case.world > 1 else model
    optimizer, scaler = case.wrap(base(model.parameters())), case.scaler()
    for index in range(case.micro_batches):
        last = (index + 1) % case.accumulate == 0
        with nullcontext() if last or case.world == 1 else wrapped.no_sync():
            for name in TWO:  # forward and backward of one objective before the forward of the next
                with case.autocast():
                    loss = loss_of(wrapped, case.number(index), name)
                with optimizer.objective(name):
                    scaler.scale(loss / case.accumulate).backward()
        if last:
            optimizer.combine(scale=scaler.get_scale())
            scaler.unscale_(optimizer)
            if case.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), case.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    return model


def lightning(case: Case, folder: Path, *, automatic: bool) -> nn.Module:
    """Lightning: `join` in automatic optimization, contexts in manual."""
    import lightning as L
    from lightning.pytorch.plugins import MixedPrecision
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    model = network()
    optimizer = case.wrap(base(model.parameters()), accumulate=automatic and case.accumulate > 1)
    scaler = case.scaler()

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.automatic_optimization = model, automatic

        def configure_optimizers(self) -> Any:
            return optimizer

        def training_step(self, item: Tensor, index: int) -> Tensor | None:
            proxy: Any = self.optimizers()
            if automatic:
                return proxy.join(**losses(self.model, case.number(index)))
            for name in TWO:
                loss = loss_of(self.model, case.number(index), name)
                with proxy.objective(name):
                    self.manual_backward(loss / case.accumulate)
            if (index + 1) % case.accumulate == 0:
                proxy.combine(scale=scaler.get_scale())
                proxy.step()
                proxy.zero_grad()
            return None

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            # The only place in manual optimization where the scaler has unscaled and nothing has stepped: before
            # proxy.step() clip_gradients would clip scaled gradients (Lightning issue 18089).
            if not automatic and case.clip is not None:
                self.clip_gradients(optimizer, gradient_clip_val=case.clip, gradient_clip_algorithm="norm")

    kind: Any = {torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}.get(case.dtype)  # type: ignore[call-overload]
    options: dict[str, Any] = {}
    if automatic:  # in manual optimization both are the module's business
        options |= {"accumulate_grad_batches": case.accumulate, "gradient_clip_val": case.clip}
    if case.world > 1:
        environment = TorchElasticEnvironment()
        options["strategy"] = DDPStrategy(cluster_environment=environment, process_group_backend="gloo")
    trainer = L.Trainer(
        accelerator="cpu",
        devices=case.world,
        max_epochs=1,
        default_root_dir=folder,
        plugins=[MixedPrecision(kind, "cpu", scaler=scaler if case.scaled else None)] if kind else None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(range(case.micro_batches), batch_size=1))  # type: ignore[arg-type]
    return model


def hf_trainer(case: Case, folder: Path) -> nn.Module:
    """Hugging Face's Trainer with the mixin."""
    import transformers

    from gradsurgery.integrations.transformers import SurgeryTrainerMixin

    class Unlearn(SurgeryTrainerMixin, transformers.Trainer):
        def _get_train_sampler(self, *arguments: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

        def objective_loss(self, name: str, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> Tensor:
            assert num_items_in_batch is None, "the network takes no loss arguments"
            return loss_of(model, int(inputs["number"]), name)

    model = network()
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": case.accumulate,
        "num_train_epochs": 1,
        "max_grad_norm": case.clip or 0.0,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": case.dtype is torch.bfloat16,
        "fp16": case.scaled,
        "ddp_backend": "gloo" if case.world > 1 else None,
        "log_level": "error",
    }
    numbers = [{"number": number} for number in range(case.world * case.micro_batches)]
    trainer = Unlearn(
        model,
        transformers.TrainingArguments(**options),
        train_dataset=dict.fromkeys(TWO, numbers),
        data_collator=lambda rows: {"number": torch.tensor([row["number"] for row in rows])},
        optimizers=(base(model.parameters()), None),
        surgery=case.wrap,
    )
    trainer.args.remove_unused_columns = False
    with_scaler(trainer.accelerator, case)
    trainer.train()
    assert trainer.args.world_size == case.world
    assert trainer.state.global_step == STEPS
    return model


def accelerate(case: Case, folder: Path) -> nn.Module:
    """Accelerate's own loop: prepared loader, model and optimizer, and `join`."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)  # one process has one precision, but not here
    GradientState._reset_state()
    precision: Any = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(case.dtype, "no")  # type: ignore[call-overload]
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=case.accumulate)
    with_scaler(accelerator, case)
    model = network()
    loader = torch.utils.data.DataLoader(range(case.world * case.micro_batches), batch_size=1)  # type: ignore[arg-type]
    made = case.wrap(base(model.parameters()), accumulate=case.accumulate > 1)
    wrapped, optimizer, loader = accelerator.prepare(model, made, loader)
    surgery = unwrap(optimizer)
    for number in loader:
        with accelerator.accumulate(wrapped):
            accelerator.backward(surgery.join(**losses(wrapped, int(number))))
            if accelerator.sync_gradients and case.clip is not None:
                accelerator.clip_grad_norm_(wrapped.parameters(), case.clip)
            optimizer.step()
            optimizer.zero_grad()
    assert accelerator.num_processes == case.world
    return model


def with_scaler(accelerator: Any, case: Case) -> None:
    """Accelerate gives a CPU no scaler and no autocast in fp16, and does not say so; both exist."""
    if case.scaled:
        accelerator.native_amp, accelerator.scaler = True, case.scaler()


TRAINERS: dict[str, Callable[[Case, Path], nn.Module]] = {
    "plain": plain,
    "Lightning, automatic": partial(lightning, automatic=True),
    "Lightning, manual": partial(lightning, automatic=False),
    "Hugging Face Trainer": hf_trainer,
    "Accelerate": accelerate,
}


def processes(rank: int, folder: str) -> None:
    """What one of two processes runs: every cell in turn, and Trainer's means over the tokens of both."""
    # transformers and Lightning read where they are from the environment.
    os.environ.update(LOCAL_WORLD_SIZE=str(workers.WORLD), GROUP_RANK="0", MASTER_PORT="29500")
    gc.freeze()  # as in conftest.py
    for trainer, cell in product(TRAINERS, CELLS):
        case = Case(*cell, rank, workers.WORLD)
        model = TRAINERS[trainer](case, Path(folder))
        expected = oracle(case.accumulate * case.world, case.clipped, case.precision)
        check(model, expected, f"{trainer}, {cell}")
    from tests.gradsurgery.integrations import unlearning

    for accumulate in (1, 2):
        model, window = unlearning.llama(), accumulate * workers.WORLD
        data = unlearning.examples(8)
        unlearning.trainer(Path(folder), model, accumulate=accumulate, data=data, num_train_epochs=1).train()
        windows = [list(range(start, start + window)) for start in range(0, 8, window)]
        check(model, unlearning.oracle(windows), f"means over tokens, accumulation {accumulate}")


def check(model: nn.Module, expected: Tensor, what: str) -> None:
    try:
        close(values(model), expected, STEPPED_FLOAT32)
        workers.assert_ranks_agree(model)
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from error
