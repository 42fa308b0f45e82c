"""Which tensors are on the device that is not there, followed through every operation: the half of `pretend_cuda` below autograd."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[2]
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
_Base: Any = torch._C.TensorBase
real_device = _Base.device.__get__
RealGenerator: Any = torch.Generator


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
    there = real_device(tensor).type == "cpu" and torch._C._has_storage(tensor)
    return tensor.untyped_storage() if there else None


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
        self.there = Storages()
        self.anywhere = Storages()  # made inside C++, for tensors of a device not seen
        self.lookups: list[str] | None = None  # where a model looked up its tokens on the CPU; None does not note it
        self.operations = 0  # with tensors of the device
        self.made_by_python = 0
        self.in_backward = False
        self.autocast: list[str] = []  # devices, the innermost last
        self.draws = False  # of the device's generator, at this moment
        self.random = RealGenerator().manual_seed(0).get_state()
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
        if not on or self.draws:
            yield
            return
        before, self.draws = torch.get_rng_state(), True
        torch.random.default_generator.set_state(self.random)
        try:
            yield
        finally:
            self.random, self.draws = torch.get_rng_state(), False
            torch.random.default_generator.set_state(before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(tensors_in((args, kwargs)))
        marked = [tensor for tensor in given if tensor in self.there]
        if marked:
            self.operations += 1
            self.check(func, args, kwargs, given)
        with self.own_randomness(bool(marked) and torch.Tag.nondeterministic_seeded in func.tags):
            found = func(*args, **kwargs)
        if marked:
            known = {storage._cdata for tensor in given if (storage := storage_of(tensor)) is not None}
            for tensor in tensors_in(found):
                if tensor in self.anywhere or (storage := storage_of(tensor)) is None or storage._cdata not in known:
                    self.put(tensor, True)
        elif self.lookups is not None and func is torch.ops.aten.embedding.default:
            self.lookups.append(self.said("a forward pass on the CPU"))
        elif not self.made_by_python and (not given or all(tensor in self.anywhere for tensor in given)):
            for tensor in tensors_in(found):
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
            indices = [] if args[0] not in self.there else [id(tensor) for tensor in tensors_in(args[1])]
            elsewhere = [tensor for tensor in elsewhere if id(tensor) not in indices]
        numbers = torch.Tag.pointwise in func.tags or name.startswith("_foreach_") or name in WITH_NUMBERS
        written = [*tensors_in(args[:1] if name.endswith("_") else ()), *tensors_in(kwargs.get("out"))]
        for tensor in elsewhere:
            if not numbers or tensor.dim() > 0 or any(tensor is one for one in written):
                text = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
                self.fault(f"{text} (aten.{name}; {list(tensor.shape)} {tensor.dtype} on the CPU)")
                return

    def check_generator(self, generator: Any, on: bool) -> None:
        if generator is not None and (generator._cdata in self.generators) != on:
            expected, found = ("cuda", "cpu") if on else ("cpu", "cuda")
            self.fault(f"Expected a '{expected}' device type for generator but found '{found}'")


def tensors_in(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, dict):
        for part in found.values():
            yield from tensors_in(part)
    elif isinstance(found, (list, tuple)):
        for part in found:
            yield from tensors_in(part)
