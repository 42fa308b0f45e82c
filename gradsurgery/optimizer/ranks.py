"""Ranks: DDP's reducer, wrappers that are refused, and the checks that all ranks do the same with the same rows.

Before an objective is entered, and before rows are combined, the hosts tell each other what they are about to do. A
rank that goes another way would leave the others waiting for ever, or mix one objective's gradients with another's,
without a word. It is two numbers from host to host: devices do not wait for them.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradsurgery.gram import backend, dtensor_type, kernel_number

if TYPE_CHECKING:
    from torch.nn.parallel import DistributedDataParallel

# Reading a Gram matrix waits for the device, so that those of the first steps only are compared: enough for the warm-up
# of every wrapper (DDP rebuilds its buckets after the first step).
_CHECKED_STEPS = 3
# Reduced rows are bit-equal on all ranks, and a row that was not reduced differs in its first digits.
_AGREEMENT = 1e-6


def active() -> bool:
    """Whether several processes train together."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class Ranks:
    """The DDP modules around the parameters, and the checks that all ranks do the same."""

    def __init__(self) -> None:
        self._modules: list[weakref.ref[DistributedDataParallel]] | None = None
        self._steps_to_check = _CHECKED_STEPS
        self._alone_checked = False
        self._hosts: tuple[Any, Any] | None = None

    def ddp_modules(self, parameters: Sequence[Tensor]) -> list[DistributedDataParallel]:
        """Every DDP module that holds one of the parameters.

        Parameters do not know their module, so all live Python objects are searched: once, and again when a module is
        gone.

        Raises:
            RuntimeError: If one of the parameters is managed by FSDP1 or `torch.nn.DataParallel`.
        """
        if not active():
            # DataParallel needs two devices, and a search takes a moment.
            if not self._alone_checked and torch.cuda.device_count() > 1:
                _find_ddp_modules(parameters)
            self._alone_checked = True
            return []
        found = (
            []
            if self._modules is None
            else [module for reference in self._modules if (module := reference()) is not None]
        )
        if self._modules is None or len(found) < len(self._modules):
            found = _find_ddp_modules(parameters)
            self._modules = [weakref.ref(module) for module in found]
        return found

    def synchronising(self, parameters: Sequence[Tensor]) -> bool:
        """Whether backward passes are reduced over the ranks: False inside DDP's no_sync()."""
        return all(module.require_backward_grad_sync for module in self.ddp_modules(parameters))

    def reduce(self, parameters: Sequence[Tensor]) -> bool:
        """Whether DDP or FSDP2 reduces every backward pass, by hooks that count on whole ones."""
        DTensor = dtensor_type()
        sharded = DTensor is not None and any(isinstance(parameter, DTensor) for parameter in parameters)
        return sharded or bool(self.ddp_modules(parameters))

    @contextmanager
    def reducing(self, parameters: Sequence[Tensor]) -> Generator[None]:
        """Inside, backward passes are reduced over the ranks even where DDP's no_sync() is on.

        A direction has to be the same on all ranks in every micro-batch, because each moves its own copy along it.
        """
        waiting = [module for module in self.ddp_modules(parameters) if not module.require_backward_grad_sync]
        for module in waiting:
            module.require_backward_grad_sync = True
        try:
            yield
        finally:
            for module in waiting:
                module.require_backward_grad_sync = False

    def arm_reducer(self, parameters: Sequence[Tensor], loss: Tensor) -> None:
        """Make DDP reduce the coming backward pass: a forward pass arms its reducer for one backward pass only.

        Args:
            parameters: The parameters.
            loss: Whose backward pass is coming.

        Raises:
            RuntimeError: If a module has ``static_graph``.
        """
        for module in self.ddp_modules(parameters):
            if module.static_graph:
                raise RuntimeError(
                    "join: expected DistributedDataParallel(static_graph=False), found static_graph=True, whose reducer allows one "
                    "backward pass a forward pass; drop static_graph, or run forward and backward of each objective in its own context"
                )
            if module.require_backward_grad_sync:
                # Inside a backward pass grad mode is off, and with grad mode off the reducer records nothing.
                with torch.enable_grad():
                    module.reducer._rebuild_buckets()
                    module.reducer.prepare_for_backward([loss] if module.find_unused_parameters else [])

    def agree(self, action: int, problem: str | None, parameters: Sequence[Tensor]) -> None:
        """Check that every rank is about to do the same, so that none waits for another for ever.

        Where ranks do not have the same kernel for Gram matrices (`gradsurgery.gram.backend`), all become eager:
        replicas must compute the same bits.

        Args:
            action: A number for what this rank is about to do: to enter an objective, or to combine.
            problem: Why it cannot do so; None if it can.
            parameters: The parameters.

        Raises:
            RuntimeError: With this rank's problem, or because another rank does something else, or left. Every rank
                raises then.
        """
        if active() and (group := self._process_group(parameters)) is not None:
            mine = -1 if problem else action
            told = self._told((mine, kernel_number(parameters)), group[0])
            if len(told[:, 1].unique()) > 1:
                backend("eager")
                warnings.warn(
                    f"gradsurgery.gram.backend: expected the same kernel on every rank, found it different or missing on some "
                    f"({told[:, 1].tolist()}); all ranks compute with plain PyTorch now",
                    stacklevel=2,
                )
            others = (told[:, 0] != mine).nonzero().flatten().tolist()
            if problem is None and others:
                raise RuntimeError(
                    "objectives differ across ranks: expected every rank to run the same objectives in the same order, found ranks "
                    f"{others} elsewhere or refused; every rank must enter every objective as often as the others"
                )
        if problem is not None:
            raise RuntimeError(problem)

    def agree_to_enter(self, index: int, parameters: Sequence[Tensor], problem: str | None) -> None:
        """As `agree`, before an objective is entered."""
        modules: list[Any] = self.ddp_modules(parameters)
        if any(module._join_config.enable for module in modules):
            # Not agreed upon: a rank that is done hears nothing, and all others are here.
            raise RuntimeError(
                "objective: expected the same number of batches on every rank, found DistributedDataParallel.join(), under which ranks "
                "that are done take no part in surgery; drop join(), and pad or drop the last batches (DistributedSampler pads)"
            )
        if any(module.static_graph and not module.require_backward_grad_sync for module in modules):
            raise RuntimeError(
                "objective: expected DistributedDataParallel(static_graph=False) inside no_sync(), found static_graph=True, whose reducer "
                "counts on a reduction in every backward pass; drop static_graph, or no_sync()"
            )
        # Inside DDP's no_sync() no rank waits for another, and each may have its own number of micro-batches.
        if problem is not None or all(module.require_backward_grad_sync for module in modules):
            self.agree(index, problem, parameters)

    def check_gram(self, parameters: Sequence[Tensor], gram: Tensor) -> None:
        """On the first steps, compare the Gram matrix across ranks.

        Raises:
            RuntimeError: On every rank, if it differs, because then at least one row was not reduced.
        """
        if self._steps_to_check <= 0 or not active() or (group := self._process_group(parameters)) is None:
            return
        self._steps_to_check -= 1
        # NCCL cannot send from another device than the parameters'.
        grams = _gather(gram.to(parameters[0].device), group[0]).to(gram.device)
        lengths = grams.diagonal(dim1=-2, dim2=-1).sqrt()
        differ = (grams - grams[:1]).abs() > _AGREEMENT * (lengths[..., :, None] * lengths[..., None, :]).amax(0)
        # A non-finite matrix is handled by the step, which leaves NaN in .grad or raises.
        if bool(differ.any() & grams.isfinite().all()):
            raise RuntimeError(
                "rows differ across ranks: expected every rank to hold the same reduced gradients, found different Gram matrices. Under "
                "DDP only the backward pass after a forward pass is reduced: run forward and backward of one objective before the forward "
                "of the next, or use join; without DDP or FSDP2 reduce the gradients inside each objective's context"
            )

    def _told(self, numbers: tuple[int, ...], group: Any) -> Tensor:
        """Some numbers of every rank, ``[ranks, numbers]``, told from host to host."""
        if self._hosts is None or self._hosts[0] is not group:
            self._hosts = group, _group_of_hosts(group)
        try:
            return _gather(torch.tensor(numbers, device="cpu"), self._hosts[1])
        except RuntimeError as error:
            raise RuntimeError(
                "objectives differ across ranks: expected every rank to run the same objectives as often as the others, found one that "
                f"left or did something else ({error}); give every rank the same number of batches"
            ) from error

    def _process_group(self, parameters: Sequence[Tensor]) -> tuple[Any] | None:
        """The process group that must agree, in a tuple of one; None where it is unknown.

        The tuple tells an unknown group from the default one, which torch.distributed calls None.
        """
        modules = self.ddp_modules(parameters)
        if modules:
            return (modules[0].process_group,)
        DTensor = dtensor_type()
        sizes = {p.device_mesh.size() for p in parameters if DTensor is not None and isinstance(p, DTensor)}
        world = torch.distributed.get_world_size()
        return (None,) if max(sizes, default=world) == world else None  # else a pipeline's stage, say


def refuse_deepspeed(base: object, parameters: Sequence[Tensor]) -> None:
    """Refuse an engine that owns gradients and steps itself.

    Raises:
        RuntimeError: If DeepSpeed manages the parameters or the optimizer.
    """
    if type(base).__module__.startswith("deepspeed") or any(
        hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping") for parameter in parameters
    ):
        raise RuntimeError(
            "GradientSurgery: expected parameters whose .grad PyTorch owns, found DeepSpeed's, which reduces, frees and steps gradients by "
            "itself; train with DDP or FSDP2 (fully_shard) instead"
        )


def _find_ddp_modules(parameters: Sequence[Tensor]) -> list[DistributedDataParallel]:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    ours = {id(parameter) for parameter in parameters}
    kinds = (DistributedDataParallel, FullyShardedDataParallel, DataParallel)
    # type() and not isinstance(), which would run code of lazy proxies among the live objects.
    wrappers = [found for found in gc.get_objects() if issubclass(type(found), kinds)]
    wrappers = [wrapper for wrapper in wrappers if any(id(parameter) in ours for parameter in wrapper.parameters())]
    if any(isinstance(wrapper, FullyShardedDataParallel) for wrapper in wrappers):
        raise RuntimeError(
            "GradientSurgery: expected plain, DDP or FSDP2 parameters, found a FullyShardedDataParallel (FSDP1) wrapper, which does not "
            "support several backward passes a step; use torch.distributed.fsdp.fully_shard"
        )
    if any(isinstance(wrapper, DataParallel) and len(wrapper.device_ids) > 1 for wrapper in wrappers):
        raise RuntimeError(
            "GradientSurgery: expected a device for each process, found a torch.nn.DataParallel wrapper, which copies the model to several "
            "devices of one process in every forward pass; use DistributedDataParallel or torch.distributed.fsdp.fully_shard"
        )
    return [wrapper for wrapper in wrappers if isinstance(wrapper, DistributedDataParallel)]


def _group_of_hosts(group: Any) -> Any:
    """A group of the same ranks that sends from the hosts' memory."""
    if "cpu:" in str(torch.distributed.get_backend_config(group)):
        return group
    ranks = torch.distributed.get_process_group_ranks(group)
    return torch.distributed.new_group(ranks, backend="gloo", use_local_synchronization=True)


def _gather(values: Tensor, group: Any) -> Tensor:
    """One tensor of every rank, stacked."""
    gathered = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(gathered, values.contiguous(), group=group)
    return torch.stack(gathered)
