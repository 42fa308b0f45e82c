"""Mistakes at the border of the backward pass: clipping before combine(), the base's own step, and terms added to what join returns."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_

import gradsurgery as gs
from tests.gradsurgery.optimizer.distributed_workers import of_rank, run, sharded, surgeon
from tests.problems import assert_same, classification, joined, mlp, snapshot, values

LOSSES = classification()
CLIP = r"clip: expected the combined update in .grad, found rows that wait for optimizer.combine\(\); call it first"
TERM = r"join: expected its backward pass to be the only one that writes .grad.*add the term to one of the losses"


def made(**options: Any) -> tuple[nn.Sequential, gs.GradientSurgery]:
    model = mlp()
    return model, gs.GRU(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **options)


def capture(model: nn.Module, optimizer: gs.GradientSurgery, *names: str) -> None:
    for name in names or ("retain", "forget"):
        with optimizer.objective(name):
            LOSSES(model, 0, 0)[name].backward()


# Clipping ------------------------------------------------------------------------------------------------------------------------

CLIPPING: dict[str, Callable[[Any], Any]] = {
    "norm": lambda parameters: clip_grad_norm_(parameters, 0.1),
    "norm, one by one": lambda parameters: torch.nn.utils.clip_grad_norm_(parameters, 0.1, foreach=False),
    "value": lambda parameters: clip_grad_value_(parameters, 0.1),
    "one norm for several": lambda parameters: clip_grads_with_norm_(parameters, 0.1, torch.ones(())),
}


def functions() -> list[Any]:
    """What torch's clipping functions call."""
    return [
        [cell.cell_contents for cell in function.__closure__ or ()]
        for function in (clip_grad_value_, clip_grads_with_norm_, clip_grad_norm_)  # type: ignore[attr-defined]
    ]


ORIGINAL = functions()


@pytest.fixture(scope="module")
def nobody_waits() -> None:
    """Optimizers that other tests left behind with rows that wait are gone."""
    gc.collect()
    model, optimizer = made()
    capture(model, optimizer)
    optimizer.combine()


@pytest.mark.usefixtures("nobody_waits")
@pytest.mark.parametrize("given", ["generator", "list", "one"])
@pytest.mark.parametrize("name", CLIPPING)
def test_clipping_before_combine_is_refused_and_torchs_own_afterwards(name: str, given: str) -> None:
    model, optimizer = made()
    plain, reference = made()

    def parameters(of: nn.Module) -> Any:
        return {"generator": of.parameters, "list": lambda: list(of.parameters()), "one": lambda: of[0].weight}[given]()  # type: ignore[index]

    capture(model, optimizer)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(RuntimeError, match=CLIP):
        CLIPPING[name](parameters(model))
    if name != "value":  # without any gradient, that one raises an error of its own
        CLIPPING[name](parameters(plain))  # rows that do not wait are torch's own business
    optimizer.combine()
    assert functions() == ORIGINAL
    CLIPPING[name](parameters(model))
    optimizer.step()
    capture(plain, reference)
    reference.combine()
    CLIPPING[name](parameters(plain))
    reference.step()
    optimizer.zero_grad()
    reference.zero_grad()
    assert_same(snapshot(model, optimizer), snapshot(plain, reference))


@pytest.mark.usefixtures("nobody_waits")
@pytest.mark.parametrize("how", ["zero_grad", "step", "next", "load_state_dict", "gone"])
def test_rows_that_no_longer_wait_leave_torch_as_it_was(how: str) -> None:
    model, optimizer = made()
    capture(model, optimizer)
    assert functions() != ORIGINAL
    if how == "next":
        with optimizer.objective("retain"):
            LOSSES(model, 0, 1)["retain"].backward()
            assert functions() == ORIGINAL
            clip_grad_norm_(model.parameters(), 0.1)  # of the row: that is what stands in .grad here
        optimizer.zero_grad()
    elif how == "gone":
        del optimizer
        gc.collect()
        clip_grad_norm_(model.parameters(), 0.1)
        other_model, other = made()
        capture(other_model, other)
        other.combine()
    elif how == "load_state_dict":
        optimizer.load_state_dict(optimizer.state_dict())
    else:
        optimizer.step() if how == "step" else optimizer.zero_grad()
    assert functions() == ORIGINAL
    clip_grad_norm_(model.parameters(), 0.1)


def test_an_empty_generator_is_still_torchs_warning() -> None:
    model, optimizer = made()
    capture(model, optimizer)
    with pytest.warns(UserWarning, match="empty generator"):
        clip_grad_norm_(iter_nothing(), 0.1)
    optimizer.zero_grad()


def iter_nothing() -> Any:
    yield from ()


def test_lightning_and_accelerate_clip_by_the_same_functions(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    accelerate = pytest.importorskip("accelerate")
    model, optimizer = made()

    class Manual(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.automatic_optimization = model, False

        def configure_optimizers(self) -> Any:
            return optimizer

        def training_step(self, batch: Tensor, index: int) -> None:
            own = self.optimizers()
            capture(model, own)
            with pytest.raises(RuntimeError, match=CLIP):
                self.clip_gradients(own, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            own.combine()
            self.clip_gradients(own, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            own.step()
            own.zero_grad()
            own.max_norm, own.guard, own.add = 0.5, "measure", {"retain": 0.5}

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=1, default_root_dir=tmp_path, enable_model_summary=False, **quiet
    )
    trainer.fit(Manual(), torch.utils.data.DataLoader(range(2)))  # type: ignore[arg-type]
    # Set on Lightning's proxy, they reach the optimizer.
    assert (optimizer.max_norm, optimizer.guard, optimizer.add) == (0.5, "measure", {"retain": 0.5})

    accelerator = accelerate.Accelerator(cpu=True)
    capture(model, optimizer)
    with pytest.raises(RuntimeError, match=CLIP):
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.combine()
    accelerator.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


# Steps of the base -----------------------------------------------------------------------------------------------------------------

DIRECT = r"step\(\) was called on the base optimizer SGD while rows wait: call it on the GradientSurgery"


@pytest.mark.parametrize("duplicate", [None, copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("waiting", ["one row", "all rows", "combined", "join"])
def test_a_step_of_the_base_is_refused_while_rows_wait_and_only_then(waiting: str, duplicate: Any) -> None:
    model, optimizer = made()
    if duplicate is not None:
        model, optimizer = duplicate((model, optimizer))
    plain, reference = made()
    if waiting == "join":
        optimizer.join(**LOSSES(model, 0, 0)).backward()
    else:
        capture(model, optimizer, *(["retain"] if waiting == "one row" else []))
    if waiting == "combined":
        optimizer.combine()
    before = snapshot(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in (optimizer.base.step, lambda: scaler.step(optimizer.base)):
        with pytest.raises(RuntimeError, match=DIRECT):
            step()
    assert_same(snapshot(model, optimizer), before)
    if waiting == "one row":
        capture(model, optimizer, "forget")
    optimizer.step()
    optimizer.zero_grad()
    capture(plain, reference)
    reference.step()
    reference.zero_grad()
    for each, wrapper in ((model, optimizer), (plain, reference)):  # no rows wait
        LOSSES(each, 1, 0)["retain"].backward()
        wrapper.base.step()
        wrapper.zero_grad()
    assert_same(snapshot(model, optimizer), snapshot(plain, reference))


def test_rows_of_an_earlier_wrapper_refuse_no_step_of_another() -> None:
    """As in a notebook, whose latest traceback keeps the wrapper of a cell that broke off."""
    model, broken = made()
    capture(model, broken)
    capture(model, optimizer := gs.GRU(broken.base))
    optimizer.step()


def test_a_base_without_hooks_is_left_alone() -> None:
    """As Accelerate's optimizer, which never calls torch's constructor."""
    optimizer = made()[1]
    del optimizer.base._optimizer_step_pre_hooks
    gs.GRU(optimizer.base)


# Terms added to the joint scalar -------------------------------------------------------------------------------------------------


def penalty(model: nn.Module) -> Tensor:
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum((tensor.square().sum() for tensor in local), torch.zeros(()))


def with_term(model: nn.Module, optimizer: gs.GradientSurgery, order: str, micro: int = 0) -> Tensor:
    """Autograd runs what was built last first."""
    if order == "term first":
        term = penalty(model)
        return optimizer.join(**LOSSES(model, 0, micro)) + term
    return optimizer.join(**LOSSES(model, 0, micro)) + penalty(model)


@pytest.mark.parametrize("micro", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize("between", ["nothing", "zero_grad", "spent", "scaler"])
@pytest.mark.parametrize("order", ["term first", "join first"])
def test_a_term_added_to_join_is_refused_in_both_orders(order: str, between: str, micro: int) -> None:
    """Also where Lightning zeroes .grad between the two, and where the last step's gradients were left in .grad."""
    model, optimizer = made(accumulate=True)
    joined(model, optimizer, LOSSES, [1])
    if between == "spent":
        optimizer.join(**LOSSES(model, 2, 0)).backward()
        optimizer.step()
    if micro:
        optimizer.join(**LOSSES(model, 0, 0)).mul(0.5).backward()
    before = values(model)
    loss = with_term(model, optimizer, order, micro) / 2
    if between == "zero_grad" and not micro:
        optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", enabled=between == "scaler")
    with pytest.raises(RuntimeError, match=TERM):
        scaler.scale(loss).backward()
    with pytest.raises(RuntimeError):
        optimizer.step()  # nothing that could be stepped is left
    assert torch.equal(values(model), before)
    optimizer.zero_grad()
    joined(model, optimizer, LOSSES, [3])


def test_what_was_always_right_is_not_refused() -> None:
    """Two micro-batches in one backward pass, a term inside a loss, a term of other parameters, clipping in between."""
    model, optimizer = made(accumulate=True)
    plain, reference = made(accumulate=True)
    other = nn.Parameter(torch.ones(2))
    joint = [optimizer.join(**LOSSES(model, 0, micro)) for micro in range(2)]
    (sum(joint) / 2 + other.square().sum()).backward()  # type: ignore[operator]
    clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()
    for micro in (1, 0):  # as autograd ran them
        (reference.join(**LOSSES(plain, 0, micro)) / 2).backward()
        clip_grad_norm_(plain.parameters(), 0.1)
    reference.step()
    reference.zero_grad()
    found = LOSSES(model, 1, 0)
    optimizer.join(forget=found["forget"], retain=found["retain"] + penalty(model)).backward()
    optimizer.step()
    assert_same(snapshot(plain, reference), snapshot(plain, reference))
    assert torch.equal(other.grad, 2 * torch.ones(2))  # type: ignore[arg-type]


def terms_across_ranks(rank: int) -> None:
    """Every rank refuses both orders, and none before: the losses alone are exact (see test_ranks.py)."""
    wraps: list[Callable[[], nn.Module]] = [
        lambda: DistributedDataParallel(mlp()),
        lambda: DistributedDataParallel(mlp(), gradient_as_bucket_view=True),
        sharded,
    ]
    for wrap in wraps:
        for micro in range(2):
            for order in ("term first", "join first"):
                model = wrap()
                optimizer = surgeon(model, accumulate=True)
                joined(model, optimizer, of_rank(rank), [0], micro_batches=2)
                if micro:
                    (optimizer.join(**of_rank(rank)(model, 2, 0)) / 2).backward()
                term = penalty(model) if order == "term first" else None
                loss = optimizer.join(**of_rank(rank)(model, 2, micro))
                with pytest.raises(RuntimeError, match=TERM):
                    ((loss + (penalty(model) if term is None else term)) / 2).backward()
                with pytest.raises(RuntimeError, match="expected a backward pass for each"):
                    optimizer.step()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_terms_are_refused_on_every_rank_under_ddp_and_fsdp2() -> None:
    run(terms_across_ranks)
