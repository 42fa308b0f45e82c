"""A device that is not there: tensors on ``meta`` stand for those of an accelerator, which the host may not look at.

`Device` sees every operation. A step may ask the device one question, whether its update is finite. A tensor that was
left on the CPU, a copy back to the host, and a copy to the device that the host would wait for fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gradsurgery as gs
from tests.problems import FOUR

META = torch.device("meta")
# Their answer's size depends on numbers, so that the host waits for it.
WAITS = {
    "nonzero",
    "unique",
    "_unique2",
    "unique_dim",
    "masked_select",
    "equal",
    "is_nonzero",
    "bincount",
    "unique_consecutive",
}
ADVICE = "use gradsurgery.gram.numbers_on"


class Device(TorchDispatchMode):
    """Answers yes where one number is asked for, and counts the questions; fails on every other way of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.questions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::").split(".")[0]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor for tensor in tensors if tensor.device == META]
        here = [tensor for tensor in tensors if tensor.device != META and tensor.dim() > 0]
        if name == "_local_scalar_dense" and there:
            self.questions += 1
            return True
        assert not (name in WAITS and there), f"{name}: the host waits for the device"
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            target = args[0].device if name == "copy_" else torch.device(kwargs.get("device") or source.device)
            waits = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:] and args[2]))
            assert target == META or source.device != META, f"{name}: a copy from the device to the host"
            assert target != META or source.device == META or not waits, f"a copy that the host waits for; {ADVICE}"
        else:
            assert not (there and here), f"{name}: tensors {[list(t.shape) for t in here]} were left on the CPU"
        return func(*args, **kwargs)


class Numbers(TorchFunctionMode):
    """Fails where numbers of the host become a tensor of the device on a way that dispatch does not see."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("tensor", "as_tensor", "new_tensor", "asarray"):
            target = torch.device(kwargs.get("device") or (args[0].device if name == "new_tensor" else "cpu"))
            data = args[name == "new_tensor"]
            assert target != META or isinstance(data, Tensor), f"{name}: a copy that the host waits for; {ADVICE}"
        if name in ("__getitem__", "__setitem__") and args[0].device == META:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(entry, (list, range)) for entry in index), f"indexed by a list; {ADVICE}"
        return func(*args, **kwargs)


@contextmanager
def device(questions: int) -> Iterator[None]:
    """Everything inside may ask the device that often."""
    with Numbers(), Device() as seen:
        yield
    assert seen.questions <= questions, f"asked the device {seen.questions} times, expected at most {questions}"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: bool((x > 0).any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x + torch.ones(3),
        lambda x: x[[0, 2]],
        lambda x: x[torch.tensor([0, 2])],
        lambda x: torch.tensor([1.0, 2.0], device=META),
        lambda x: torch.ones(3).to(META),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: x.nonzero(),
    ],
)
def test_the_device_notices(wrong: Callable[[Tensor], Any]) -> None:
    x = torch.zeros(3, device=META)
    with pytest.raises((AssertionError, NotImplementedError)), device(0):
        wrong(x)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(device=META, dtype=dtype)


def losses(model: nn.Module, names: Any) -> dict[str, Tensor]:
    inputs = torch.zeros(4, 6, device=META, dtype=next(model.parameters()).dtype)
    return {name: model(inputs).square().mean() for name in names}


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "averages": {"ema_decay": 0.5},
    "averages of two types": {"ema_decay": {"retain": 0.5, "utility": 0.9}, "ema_dtype": torch.bfloat16},
    "everything": {"ema_decay": 0.5, "add": {"retain": 0.5}, "max_norm": 1.0, "guard": "update"},
    "everything by tensor": {"ema_decay": 0.5, "max_norm": 1.0, "guard": "update", "scope": "tensor"},
    "a scope of one's own": {"scope": gs.scope.by_layer, "guard": "measure", "record_scope": "tensor"},
    "the optimizer's metric": {"metric": "optimizer", "ema_decay": 0.5, "record_scope": "tensor"},
    "a metric of one's own": {"metric": lambda parameters: [torch.ones_like(p) for p in parameters], "max_norm": 1.0},
    "accumulate": {"accumulate": True, "ema_decay": 0.5, "guard": "update"},
    "elementwise": {"rule": "sago", "ema_decay": 0.5, "max_norm": 1.0, "guard": "update"},
    "elementwise, several": {"rule": "sign_agreement", "add": {"retain": 0.5}},
    "GradVac": {"rule": "GradVac", "scope": "tensor"},
}


class Counting(torch.optim.Optimizer):
    """As fused and capturable optimizers, which meta refuses: the number of steps is on the device too."""

    def __init__(self, parameters: Any, moment: str) -> None:
        super().__init__(parameters, {"lr": 0.1, "eps": 1e-8, "betas": (0.9, 0.99)})
        self.moment = moment

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] = torch.ones((), device=META)
                state[self.moment] = parameter.grad.square()
                parameter.data.add_(parameter.grad)


TWICE = ("plain", "accumulate")
BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "fused AdamW": lambda p: Counting(p, "exp_avg_sq"),
    "fused Adagrad": lambda p: Counting(p, "sum"),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


def surgeon(model: nn.Module, base: str = "AdamW", **options: Any) -> gs.GradientSurgery:
    """Two groups with rates of their own."""
    named = list(model.named_parameters())
    groups = [{"params": named[:2]}, {"params": named[2:], "lr": 0.01}]
    if options.get("rule") == "GradVac":
        options["rule"] = gs.rules.GradVac()
    return gs.GradientSurgery(BASES[base](groups), **options)


def step(model: nn.Module, optimizer: gs.GradientSurgery, front_end: str, micro_batches: int = 1) -> None:
    for _ in range(micro_batches):
        found = losses(model, optimizer.objectives)
        if front_end == "join":
            (optimizer.join(**found) / micro_batches).backward()
        else:
            for name, loss in found.items():
                with optimizer.objective(name):
                    loss.backward()
    optimizer.combine(scale=None if front_end == "join" else torch.ones((), device=META))
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(("name", "front_end"), [*((n, "contexts") for n in OPTIONS), *((n, "join") for n in TWICE)])
def test_a_step_asks_one_question(name: str, front_end: str) -> None:
    """Also where a parameter joins late, so that averages of different numbers of steps meet in one block."""
    model = network()
    options: dict[str, Any] = {"objectives": FOUR[:3], **OPTIONS[name]}
    if options.get("rule") == "sago":
        options["objectives"] = FOUR[:2]
    optimizer = surgeon(model, **options)
    model[2].bias.requires_grad_(False)
    with device(1):
        step(model, optimizer, front_end)
    model[2].bias.requires_grad_(True)
    with device(1):
        step(model, optimizer, front_end, 2 if options.get("accumulate") else 1)


@pytest.mark.parametrize("base", BASES)
def test_the_metric_of_every_base_asks_nothing(base: str) -> None:
    model = network()
    optimizer = surgeon(model, base, metric="optimizer")
    for _ in range(2):
        with device(1):
            step(model, optimizer, "contexts")


@pytest.mark.filterwarnings("ignore:guard=")
def test_low_precision_asks_nothing_more() -> None:
    model = network(torch.bfloat16)
    optimizer = surgeon(model, ema_decay=0.5, guard="update", max_norm=1.0)
    for _ in range(2):
        with device(1):
            step(model, optimizer, "contexts")


@pytest.mark.parametrize("name", gs.rules.RULES)
def test_rules_ask_nothing(name: str) -> None:
    required = {"hamu": {"gain": 0.1, "radius": 1.0}, "hamu_u": {"gain": 0.1, "radius": 1.0}}.get(name, {})
    matrices = torch.zeros(4, 3, 3, device=META, dtype=torch.float64)
    with device(0):
        found = gs.rules.by_name(name)(matrices, **required)
    assert (found.device, found.shape) == (META, (4, 3))


# saliency_mask needs an order statistic of the whole row, and says that the host waits for it; graddrop needs a generator
# of the device, and meta has none.
@pytest.mark.parametrize("name", sorted(gs.elementwise.ELEMENTWISE.keys() - {"saliency_mask", "graddrop"}))
def test_elementwise_rules_ask_nothing(name: str) -> None:
    rows = [[torch.zeros(3, 2, device=META), None, torch.zeros(4, device=META)] for _ in range(2)]
    required: dict[str, Any] = {"cglearn": {"tau": 0.5}}.get(name, {})
    with device(0):
        gs.rules.by_name(name)(rows, **required)


# `linear` and `simnpo` wait for the device, and say so: they choose the tokens that count, and refuse labels and lengths
# that cannot be.
def logits(number: int) -> list[Tensor]:
    return [torch.zeros(6, 9, device=META, requires_grad=index == 0) for index in range(number)]


def places() -> Tensor:
    return torch.zeros(6, dtype=torch.int64, device=META)


def numbers() -> Tensor:
    return torch.zeros(6, device=META, requires_grad=True)


@pytest.mark.parametrize(
    "name", [*gs.losses.LOSSES, "npo", "dpo", "kl_divergence", "uniform", "undial", "jensen_shannon", "logit_margin"]
)
def test_losses_ask_nothing(name: str) -> None:
    function = getattr(gs.losses, name)
    if name in ("npo", "dpo"):
        arguments = [numbers() for _ in range(2 if name == "npo" else 4)]
    elif name in ("kl_divergence", "uniform", "jensen_shannon", "logit_margin"):
        arguments = logits(1 if name in ("uniform", "logit_margin") else 2)
    else:
        arguments = [logits(1)[0], places(), *(logits(2)[1:] if name == "undial" else [])]
    with device(0):
        function(*arguments).sum().backward()
