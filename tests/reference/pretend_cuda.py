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
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # looks at the functions that are replaced below
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _device as default_device
from torch.utils._python_dispatch import TorchDispatchMode

from gradsurgery.losses import _kernel
from tests.reference import pretend_cuda_module

CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).parents[2]
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
# CUDA takes numbers of the CPU beside its own tensors in what goes over elements, and these; and devices meet in copies.
WITH_NUMBERS = (
    "masked_fill",
    "masked_fill_",
    "fill",
    "fill_",
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "_fused_adam_",
    "_fused_adamw_",
)
INDEXED = ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put")
ACROSS = ("copy_", "set_", "_to_copy", "_pack_padded_sequence", "_has_same_storage_numel")
_GetSet: Any = torch._C.TensorBase
_real_device = _GetSet.device.__get__
_RealGenerator: Any = torch.Generator


class Storages:
    """A set of storages. Weak references keep the addresses of those that are gone from being given to others."""

    def __init__(self) -> None:
        self._known: dict[int, StorageWeakRef] = {}
        self._limit = 1 << 14

    def __contains__(self, tensor: Tensor) -> bool:
        return (storage := storage_of(tensor)) is not None and storage._cdata in self._known

    def add(self, tensor: Tensor) -> None:
        if (storage := storage_of(tensor)) is not None:
            self._known[storage._cdata] = StorageWeakRef(storage)
        if len(self._known) > self._limit:
            self._known = {key: held for key, held in self._known.items() if not held.expired()}
            self._limit = 2 * len(self._known) + (1 << 14)

    def discard(self, tensor: Tensor) -> None:
        if (storage := storage_of(tensor)) is not None:
            self._known.pop(storage._cdata, None)


def storage_of(tensor: Any) -> Any:
    """None for what has none: tensors under `torch.vmap`, sparse ones, those without numbers."""
    if isinstance(tensor, torch.UntypedStorage):
        return tensor
    try:
        return None if _real_device(tensor).type != "cpu" else tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


class PretendedCuda(TorchDispatchMode):
    """What is where; follows it through every operation.

    Args:
        strict: Raise at a fault; else note it and go on.

    Attributes:
        faults: What would have been refused, and autocasts of the CPU around tensors of the device, which would do nothing.
    """

    def __init__(self, strict: bool) -> None:
        super().__init__()
        self.strict = strict
        self.faults: list[str] = []
        self.there, self.anywhere = (
            Storages(),
            Storages(),
        )  # "anywhere": made inside C++, for tensors of a device not seen
        self.lookups: list[str] | None = None  # where a model looked up its tokens on the CPU; None does not note it
        self.operations = 0  # with tensors of the device
        self.made_by_python = 0
        self.in_backward = False
        self.autocast: list[str] = []  # devices, the innermost last
        self.random = _RealGenerator().manual_seed(0).get_state()
        self.generators: dict[int, Any] = {}  # those of the device, by the address that C++ knows them by

    def has(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor in self.there

    def put(self, tensor: Any, on: bool) -> Any:
        if isinstance(tensor, Tensor):
            self.anywhere.discard(tensor)
            (self.there.add if on else self.there.discard)(tensor)
        return tensor

    def fault(self, text: str) -> None:
        if self.strict:
            raise RuntimeError(text)
        self.faults.append(self.said(text))

    def said(self, text: str) -> str:
        """With the last of our own lines that led there."""
        frames = [
            frame
            for frame in traceback.extract_stack()
            if frame.filename.startswith(str(ROOT)) and "reference" not in frame.filename
        ]
        return f"{text}: {' < '.join(f'{Path(f.filename).name}:{f.lineno}' for f in reversed(frames[-6:]))}"

    @contextmanager
    def own_randomness(self, on: bool) -> Iterator[None]:
        """Draws on the device come from a generator of its own, as they do there."""
        if not on:
            yield
            return
        before = torch.get_rng_state()
        torch.random.default_generator.set_state(self.random)
        yield
        self.random = torch.get_rng_state()
        torch.random.default_generator.set_state(before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        marked = [tensor for tensor in given if tensor in self.there]
        if marked:
            self.operations += 1
            self.check(func, args, kwargs, given)
        with self.own_randomness(bool(marked) and torch.Tag.nondeterministic_seeded in func.tags):
            found = func(*args, **kwargs)
        if marked:
            known = {
                id(storage_of(tensor)) if storage_of(tensor) is None else storage_of(tensor)._cdata for tensor in given
            }
            for tensor in _tensors(found):
                if tensor in self.anywhere or (storage := storage_of(tensor)) is None or storage._cdata not in known:
                    self.put(tensor, True)
        elif self.lookups is not None and func is torch.ops.aten.embedding.default:
            self.lookups.append(self.said("a forward pass on the CPU"))
        elif not self.made_by_python and (not given or all(tensor in self.anywhere for tensor in given)):
            for tensor in _tensors(found):
                self.put(tensor, True) if self.in_backward else self.anywhere.add(tensor)
        return found

    def check(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> None:
        """Raise as CUDA does where devices are mixed in a way that it refuses."""
        name = func._schema.name.split("::")[-1]
        self.check_generator(kwargs.get("generator"), True)
        if self.autocast and self.autocast[-1] == "cpu":
            self.fault(f"{name} of tensors on cuda:0 under torch.autocast('cpu'), which does nothing there")
        for tensor in given:
            if tensor in self.anywhere:
                self.put(tensor, True)
        if name in ACROSS:
            return
        elsewhere = [tensor for tensor in given if storage_of(tensor) is not None and tensor not in self.there]
        if name in INDEXED:
            indices = [] if args[0] not in self.there else [id(tensor) for tensor in _tensors(args[1])]
            elsewhere = [tensor for tensor in elsewhere if id(tensor) not in indices]
        numbers = torch.Tag.pointwise in func.tags or name.startswith("_foreach_") or name in WITH_NUMBERS
        written = [*_tensors(args[:1] if name.endswith("_") else ()), *_tensors(kwargs.get("out"))]
        for tensor in elsewhere:
            if not numbers or tensor.dim() > 0 or any(tensor is one for one in written):
                text = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
                self.fault(f"{text} (aten.{name}; {list(tensor.shape)} {tensor.dtype} on the CPU)")
                return

    def check_generator(self, generator: Any, on: bool) -> None:
        if generator is not None and (generator._cdata in self.generators) != on:
            expected, found = ("cuda", "cpu") if on else ("cpu", "cuda")
            self.fault(f"Expected a '{expected}' device type for generator but found '{found}'")


class _OfTheDevice(_RealGenerator):
    device = CUDA


class _GeneratorType(type):
    """`torch.Generator(device)` with a choice; what it is an instance of stays."""

    mode: PretendedCuda

    def __call__(cls, device: Any = "cpu") -> Any:
        if not is_cuda(device):
            return _RealGenerator(device)
        made = _OfTheDevice()
        cls.mode.generators[made._cdata] = made
        return made

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _RealGenerator)


def is_cuda(device: Any) -> bool:
    return isinstance(device, int) or (device is not None and torch.device(device).type == "cuda")


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, dict):
        for part in found.values():
            yield from _tensors(part)
    elif isinstance(found, (list, tuple)):
        for part in found:
            yield from _tensors(part)


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
        if _real_device(tensor).type != "cpu" or mode.has(tensor) == on:
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
        return moved(real["to"](self, "cpu" if _real_device(self).type == "cpu" else None, *rest, **kwargs), on)

    def numpy(self: Tensor, *, force: bool = False) -> Any:
        if mode.has(self) and not force:
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
            )
        return real["numpy"](self, force=force)

    def device(self: Tensor) -> torch.device:
        return CUDA if mode.has(self) else _real_device(self)

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
    yield _kernel, "_triton", lambda: None  # there is no device to compile for; plain PyTorch does the same
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
