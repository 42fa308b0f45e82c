"""A model over several devices, for one that no single device can hold: FSDP2, a decoder layer at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lightning_modules.evaluation.processes import from_first, is_first

POLICIES: dict[str, MixedPrecisionPolicy | None] = {
    "32-true": None,
    # Autocast would keep a bfloat16 copy of every layer's whole weights until its backward pass: the model, unsharded.
    "bf16-mixed": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
}
"""By Lightning's name of a precision: in which types sharded weights are gathered, and their gradients reduced."""


class Distributed:
    """A model that the first process holds whole, in its host's memory, and that all processes hold in shards.

    The other processes are only told its structure, on the meta device, and get their shards from the first one, layer
    by layer. So no device ever holds more than its shards and one whole layer (or the embeddings and the head), and no
    host but the first one's holds the model.

    Args:
        load: Called in the first process: the model and anything that every process is to know (it is pickled).

    Attributes:
        whole: The model in the first process, None in the others.
        known: What `load` returned beside it.

    Raises:
        RuntimeError: If the first process fails; there its own error is raised.
    """

    def __init__(self, load: Callable[[], tuple[nn.Module, Any]]) -> None:
        self.whole: Any = None

        def first() -> Any:
            self.whole, known = load()
            return known

        self.known = from_first(first)

    def sharded(self, mesh: DeviceMesh, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
        """The model in shards over the mesh, with the weights that `whole` has now.

        Args:
            mesh: One dimension shards; of two the first replicates and the second shards (HSDP).
            policy: See `POLICIES`.

        Raises:
            ValueError: If two layers share a weight.
        """
        model = from_first(lambda: _skeleton(self.whole))
        if not is_first():
            return shard_(model, mesh, None, policy)
        return shard_(model, mesh, self.whole, policy)

    def gather(self, model: nn.Module) -> None:
        """Write the weights of a sharded model, which `sharded` made, into `whole`."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state_dict = get_model_state_dict(model, options=options)
        if is_first():
            self.whole.load_state_dict(state_dict)


def shard_(
    model: nn.Module, mesh: DeviceMesh, source: nn.Module | None, policy: MixedPrecisionPolicy | None = None
) -> nn.Module:
    """Give a model on the meta device the weights that the first process has, and shard it by FSDP2.

    Args:
        model: The same in every process, its parameters on the meta device; changed in place.
        mesh: Of all processes.
        source: The model with the weights in the first process of all, None in the others.
        policy: See `POLICIES`.

    Returns:
        The model.

    Raises:
        ValueError: If two layers share a weight.
    """
    fill = _Filling(model, source, _device(mesh))
    inner = policy or MixedPrecisionPolicy()
    outer = inner if policy is None else replace(policy, output_dtype=torch.float32)  # losses want float32 logits
    *layers, rest = parts(model)
    for part in layers:
        fill(part)
        fully_shard(part, mesh=mesh, mp_policy=inner)
    fill(rest)
    # By default FSDP2 leaves the outermost part, embeddings and head, whole after a forward pass without gradients:
    # whoever then asked for the parameters, an optimizer say, would be given tensors that nobody trains.
    fully_shard(rest, mesh=mesh, mp_policy=outer, reshard_after_forward=True)
    return model


def parts(model: nn.Module) -> list[nn.Module]:
    """What is sharded, each part without those before it: the layers, and last of all the model around them.

    Around adapters there is PEFT's wrapper too, which holds no weights and which `generate` goes past: it stays out.
    """
    whole: Any = model
    return [*blocks(model), whole.get_base_model() if hasattr(whole, "peft_config") else model]


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a transformer: each is gathered, used and dropped as one.

    They are the modules of the classes that a Hugging Face model names in `_no_split_modules`, but those inside another
    one; without such names, the entries of the longest `nn.ModuleList`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
        >>> len(blocks(LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))))
        3
    """
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    found = list(_outermost(model, names))
    if not found:
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        found = list(max(lists, key=len, default=nn.ModuleList()))
    return [module for module in found if module is not model and any(True for _ in module.parameters())]


def _outermost(module: nn.Module, names: set[str]) -> Iterator[nn.Module]:
    for child in module.children():
        if type(child).__name__ in names:
            yield child
        else:
            yield from _outermost(child, names)


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy with parameters on the meta device. Buffers come along: they are small, and no state_dict has them all."""
    parameters = list(model.parameters())
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in parameters
    }
    return copy.deepcopy(model, memo)


class _Filling:
    """Replaces parameters on the meta device by those of the first process, a part of the model at a time."""

    def __init__(self, model: nn.Module, source: nn.Module | None, device: torch.device) -> None:
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._source = None if source is None else dict(source.named_parameters())
        self._device = device
        self._parameters = list(model.parameters())  # alive, or an id could come again
        self._filled: set[int] = set()

    def __call__(self, part: nn.Module) -> None:
        made: dict[int, nn.Parameter] = {}  # a tied weight is one parameter in two modules
        for module in part.modules():
            for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if not parameter.is_meta:
                    continue
                key = id(parameter)
                if key in self._filled:
                    raise ValueError(
                        f"--strategy fsdp2: expected layers with weights of their own, found {self._names[key]} in two of them; "
                        "use another strategy"
                    )
                if key not in made:
                    made[key] = nn.Parameter(self._value(parameter), parameter.requires_grad)
                module.register_parameter(name, made[key])
        self._filled |= set(made)

    def _value(self, parameter: nn.Parameter) -> torch.Tensor:
        value = torch.empty_like(parameter, device=self._device, requires_grad=False)
        if self._source is not None:
            value.copy_(self._source[self._names[id(parameter)]].detach())
        if dist.is_initialized():
            dist.broadcast(value, 0)
        return value


def _device(mesh: DeviceMesh) -> torch.device:
    """This process's device."""
    kind = mesh.device_type
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, torch.get_device_module(kind).current_device())
