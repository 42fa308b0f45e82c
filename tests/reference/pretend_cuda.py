"""A CUDA device that is not there: tensors on it are CPU tensors whose storages are marked, with real numbers.

Whole commands run under it and choose what they would on a GPU. Where a marked tensor meets an unmarked one, and CUDA would
refuse that, it raises as CUDA does. What creates or moves tensors in Python is replaced; what they turn into is followed
below autograd, in C++'s own calls too:

    with pretended_cuda() as device:
        model.to("cuda")(ids)  # RuntimeError: Expected all tensors to be on the same device

It does not see: C++ that asks for a device itself, the number of a second GPU, streams and threads (autograd's of a device),
kernels' own rounding and their refusals by type, Triton, memory, other processes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch._dynamo  # looks at the functions that are replaced below
from torch import Tensor
from torch.utils import _device as default_device

from tests.reference import pretend_cuda_module
from tests.reference.pretend_cuda_mode import PretendedCuda, RealGenerator, real_device

CUDA = torch.device("cuda", 0)
# The device of a new tensor is that of the first argument; elsewhere it is the CPU.
LIKE = (
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "rand_like",
    "randn_like",
    "randint_like",
    "tensor",
    "as_tensor",
    "asarray",
)
MADE = ("zeros", "ones", "full", "empty", "empty_strided", "arange", "linspace", "logspace", "eye", "rand", "randn", "randint", "randperm",
        "scalar_tensor", "tril_indices", "triu_indices", "hann_window", "from_numpy", "frombuffer")  # fmt: skip
NEW = ("new_tensor", "new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided")


class _OfTheDevice(RealGenerator):
    device = CUDA


class _GeneratorType(type):
    """`torch.Generator(device)` with a choice; what it is an instance of stays."""

    mode: PretendedCuda

    def __call__(cls, device: Any = "cpu") -> Any:
        if not is_cuda(device):
            return RealGenerator(device)
        made = _OfTheDevice()
        cls.mode.generators[made._cdata] = made
        return made

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, RealGenerator)


def is_cuda(device: Any) -> bool:
    return isinstance(device, int) or (device is not None and torch.device(device).type == "cuda")


class _Moved(torch.autograd.Function):
    """A copy on the other device, whose gradient comes back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mode: PretendedCuda, on: bool) -> Tensor:
        ctx.mode, ctx.on = mode, on
        return mode.put(tensor.clone(), on)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.mode.put(gradients[0].clone(), not ctx.on), None, None


def _default_device() -> torch.device | None:
    """Of `with torch.device(...)` and `torch.set_default_device`."""
    modes = torch.overrides._get_current_function_mode_stack()
    return next((mode.device for mode in modes if isinstance(mode, default_device.DeviceContext)), None)


def _factory(mode: PretendedCuda, original: Callable[..., Any], like: bool) -> Callable[..., Any]:
    """The same on the CPU, marked if it was wanted on the device."""

    @functools.wraps(original)
    def made(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is None and not (args and isinstance(args[0], Tensor)):
            device = _default_device()
        on = (like and mode.has(args[0] if args else None)) if device is None else is_cuda(device)
        if on and device is not None:
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        if "generator" in kwargs:
            mode.check_generator(kwargs["generator"], on)
        mode.made_by_python += 1
        try:
            with mode.own_randomness(on and kwargs.get("generator") is None):
                found = original(*args, **kwargs)
        finally:
            mode.made_by_python -= 1
        if isinstance(found, Tensor) and args and isinstance(args[0], Tensor) and mode.has(found) != on:
            found = found.clone()  # `as_tensor` gives back what it was given
        return mode.put(found, on)

    return made


def _methods(mode: PretendedCuda) -> dict[str, Any]:
    """What a tensor says of where it is, and what moves it."""
    real: Any = {name: getattr(Tensor, name) for name in ("to", "numpy", "__deepcopy__", "get_device", "set_")}

    def moved(tensor: Tensor, on: bool) -> Tensor:
        if real_device(tensor).type != "cpu" or mode.has(tensor) == on:
            return tensor
        return (
            _Moved.apply(tensor, mode, on)
            if tensor.requires_grad and torch.is_grad_enabled()
            else mode.put(tensor.clone(), on)
        )

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if "other" in kwargs:
            args = (kwargs.pop("other"), *args)
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        elif args and isinstance(args[0], torch.dtype):
            args = (None, *args)
        device, *rest = args or (kwargs.pop("device", None),)
        on = mode.has(self) if device is None else is_cuda(device)
        if device is not None and not on and torch.device(device).type != "cpu":
            return real["to"](self, device, *rest, **kwargs)
        return moved(real["to"](self, "cpu" if real_device(self).type == "cpu" else None, *rest, **kwargs), on)

    def numpy(self: Tensor, *, force: bool = False) -> Any:
        if mode.has(self) and not force:
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
            )
        return real["numpy"](self, force=force)

    def device(self: Tensor) -> torch.device:
        return CUDA if mode.has(self) else real_device(self)

    return {
        "to": to,
        "numpy": numpy,
        "device": property(device),
        "is_cuda": property(lambda self: mode.has(self)),
        "is_cpu": property(lambda self: device(self).type == "cpu"),
        "get_device": lambda self: 0 if mode.has(self) else real["get_device"](self),
        "cpu": lambda self, *_, **__: moved(self, False),
        "cuda": lambda self, *_, **__: moved(self, True),
        "pin_memory": lambda self, *_: self,
        "__deepcopy__": lambda self, memo: mode.put(real["__deepcopy__"](self, memo), mode.has(self)),
    }


def _autocasts(mode: PretendedCuda) -> dict[str, Any]:
    """Autocast for the device is that of the CPU too, where the numbers are; which of the two was meant is kept."""
    kind = torch.amp.autocast_mode.autocast
    enter, leave = kind.__enter__, kind.__exit__

    def enter_both(self: Any) -> Any:
        found = enter(self)
        self.of_the_cpu = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        if self.device == "cuda":
            torch.set_autocast_enabled("cpu", self._enabled)
            torch.set_autocast_dtype("cpu", self.fast_dtype)
        mode.autocast.append(self.device if self._enabled else "none")
        return found

    def leave_both(self: Any, *error: Any) -> Any:
        mode.autocast.pop()
        if self.device == "cuda":
            torch.set_autocast_enabled("cpu", self.of_the_cpu[0])
            torch.set_autocast_dtype("cpu", self.of_the_cpu[1])
        return leave(self, *error)

    return {"__enter__": enter_both, "__exit__": leave_both}


def _replacements(mode: PretendedCuda) -> Generator[tuple[Any, str, Any]]:
    for name in (*LIKE, *MADE):
        yield torch, name, _factory(mode, getattr(torch, name), name in LIKE)
    for name in NEW:
        yield Tensor, name, _factory(mode, getattr(Tensor, name), True)
    for name, method in _methods(mode).items():
        yield Tensor, name, method
    for name, method in _autocasts(mode).items():
        yield torch.amp.autocast_mode.autocast, name, method
    for name, function in pretend_cuda_module.functions(mode).items():
        yield torch.cuda, name, function
    yield torch, "Generator", _GeneratorType("Generator", (), {"mode": mode})
    backward = torch.autograd._engine_run_backward

    def run_backward(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        before, mode.in_backward = mode.in_backward, any(map(mode.has, outputs))
        try:
            return backward(outputs, *args, **kwargs)
        finally:
            mode.in_backward = before

    yield torch.autograd, "_engine_run_backward", run_backward


@contextmanager
def pretended_cuda(*, strict: bool = True) -> Iterator[PretendedCuda]:
    """One CUDA device for as long as it is entered; see the top of the file."""
    mode = PretendedCuda(strict)
    default_device._device_constructors()  # remembers the functions that are replaced below
    with ExitStack() as stack:
        for place, name, new in [*_replacements(mode)]:
            stack.callback(functools.partial(setattr, place, name, vars(place)[name]) if name in vars(place) else functools.partial(delattr, place, name))  # fmt: skip
            setattr(place, name, new)
        torch.serialization.register_package(
            0,  # before those of the CPU and of CUDA
            lambda storage: "cuda:0" if storage in mode.there else None,
            lambda storage, location: _loaded(mode, storage) if location.startswith("cuda") else None,
        )
        stack.callback(lambda: torch.serialization._package_registry.pop(0))
        stack.enter_context(mode)
        yield mode


def _loaded(mode: PretendedCuda, storage: Any) -> Any:
    mode.there.add(storage)
    return storage
