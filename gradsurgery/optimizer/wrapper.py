"""Wrapper: a torch.optim.Optimizer around another one, to which it delegates whatever is the base's own."""

from __future__ import annotations

import importlib
import inspect
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsurgery.gram import local_tensor

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


_GLOBAL_HOOKS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")

# Of the bases that a wrapper is stepping now, whichever wrapper it is: one base may be wrapped anew.
_stepping: set[int] = set()


class Wrapper(torch.optim.Optimizer):
    """An optimizer whose parameter groups, state and defaults are those of ``base``.

    `torch.optim.Optimizer.__init__` is not called, because it would build groups and state of its own. As properties
    they stay the base's through ``base.load_state_dict`` and ``add_param_group``, and schedulers, GradScaler and
    Lightning see the real ones.
    """

    def __init__(self, base: torch.optim.Optimizer) -> None:
        _check_base(base)
        self._check_groups(base.param_groups)
        self._base = base
        self._restart()

    def _restart(self) -> None:
        """Build what neither a copy nor a pickle takes along. Called by the constructor and after copying."""
        for name in _HOOKS:
            self.__dict__[name] = OrderedDict()
        self._warned_capturable_if_run_uncaptured = True
        self._patch_step_function()

    @property
    def base(self) -> torch.optim.Optimizer:
        """The wrapped optimizer."""
        return self._base

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's parameter groups."""
        return self._base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._base.param_groups = value

    @property
    def state(self) -> Any:
        """The base's state."""
        return self._base.state

    @state.setter
    def state(self, value: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._base.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The base's defaults."""
        return self._base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self._base.defaults = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base; its rows and averages start with the next objective.

        Torch refuses parameters without names beside parameters with names, as trainers that unfreeze add them: here
        they get some, unless a scope of the user's reads names.

        Raises:
            ValueError: If this optimizer cannot step such a group. Nothing is added then.
        """
        self._check_groups([{**self.defaults, **param_group}])
        self._base.add_param_group(self._named(param_group))

    def _named(self, param_group: dict[str, Any]) -> dict[str, Any]:
        """The group, with names where the other groups have some and it has none."""
        given = param_group.get("params", ())
        added = [given] if isinstance(given, Tensor) else list(given)
        if not any("param_names" in group for group in self.param_groups) or not added:
            return param_group
        if self._reads_names() or "param_names" in param_group or not all(isinstance(one, Tensor) for one in added):
            return param_group
        number = len(self._parameters())
        named = [(f"added.{number + place}", parameter) for place, parameter in enumerate(added)]
        return {**param_group, "params": named}

    def _reads_names(self) -> bool:
        """Whether the parameters' own names matter; here they do not."""
        return False

    @staticmethod
    def _check_groups(groups: Sequence[Mapping[str, Any]]) -> None:
        """Refuse groups that this optimizer cannot step, before they are its own; here none."""

    def __getattr__(self, name: str) -> Any:
        # Schedule-free optimizers swap two sets of weights, and a trainer asks for these two by their names.
        if name in ("train", "eval") and "_base" in self.__dict__:
            return getattr(self._base, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _step_base(self) -> None:
        """Step the base. Hooks on every optimizer have been called for this one, and are not called once more."""
        kept: list[tuple[dict[int, Any], dict[int, Any]]] = []
        for name in _GLOBAL_HOOKS:
            registered = vars(importlib.import_module("torch.optim.optimizer"))[name]
            kept.append((registered, dict(registered)))
            registered.clear()
        _stepping.add(id(self._base))
        try:
            self._base.step()
        finally:
            _stepping.discard(id(self._base))
            for registered, before in kept:
                registered.update(before)

    def _parameters(self) -> list[Tensor]:
        return parameters_of(self._base)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._base!r})"

    def _save_between_hooks(self, save: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``save`` returns, with the registered state_dict hooks called before and after."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state_dict = save()
        for hook in self._optimizer_state_dict_post_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def _load_between_hooks(self, state_dict: dict[str, Any], load: Callable[[dict[str, Any]], None]) -> None:
        """Call ``load`` with a shallow copy, and the registered load_state_dict hooks before and after."""
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        load(state_dict)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler sets an attribute "step" bound to this object, which in a copy would step the original.
        return {key: value for key, value in self.__dict__.items() if key not in ("step", *_HOOKS)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._restart()


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every parameter of the optimizer, in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def watch_steps(
    base: torch.optim.Optimizer, check: weakref.WeakMethod[Callable[[torch.optim.Optimizer], None]]
) -> None:
    """Call ``check`` before every step of the base that no wrapper makes; a base without hooks is left alone.

    Args:
        base: The base optimizer. It keeps the hook, and neither a copy nor a pickle of it does.
        check: Raises where a step is refused. The hook keeps nothing alive.
    """

    def hook(base: torch.optim.Optimizer, *_: object) -> None:
        # The compiler would trace it, and can follow no weak reference.
        if not torch.compiler.is_compiling() and id(base) not in _stepping and (alive := check()) is not None:
            alive(base)

    if hasattr(base, "_optimizer_step_pre_hooks"):
        base.register_step_pre_hook(hook)


def local_bytes(parameters: Sequence[Tensor], itemsize: int | None = None) -> int:
    """Bytes on this rank of one tensor per trainable parameter, in its own type or one of ``itemsize`` bytes."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    local = [local_tensor(parameter) for parameter in trained]
    return sum(tensor.numel() * (itemsize or tensor.element_size()) for tensor in local)


def _check_base(base: object) -> None:
    if not isinstance(base, torch.optim.Optimizer) or isinstance(base, Wrapper):
        found = base.__name__ if isinstance(base, type) else type(base).__name__
        raise TypeError(
            "base: expected a constructed torch.optim.Optimizer, such as torch.optim.AdamW(model.parameters()), "
            f"found {found}"
        )
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"base: expected an optimizer that steps with the gradients it finds, found {type(base).__name__}, which "
            "evaluates the loss again through a closure; use a first-order optimizer such as SGD or AdamW"
        )


def refuse_groups(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse groups in which the base ascends, or that surgery's gradients must flow through.

    Every sign that surgery knows is that of a descent, and rows are combined in place.

    Raises:
        ValueError: If a group has ``maximize=True`` or ``differentiable=True``, a parameter twice, or one that is on an
            Apple GPU.
    """
    for group in groups:
        listed = group.get("params")
        if not isinstance(listed, list):
            continue
        if any(getattr(getattr(parameter, "device", None), "type", None) == "mps" for parameter in listed):
            raise ValueError(
                "base: expected parameters on the CPU or a CUDA device, found one on an Apple GPU, which has no float64 to sum products "
                "in; train on the CPU"
            )
        if len({id(parameter) for parameter in listed}) < len(listed):
            raise ValueError(
                "base: expected every parameter once, found one that its group lists again, which surgery would change twice in a step; "
                "list it once"
            )
    if any(group.get("differentiable") for group in groups):
        raise ValueError(
            "base: expected parameter groups with differentiable=False, found differentiable=True: rows are combined in place, so that "
            "no gradient flows through the step to them; differentiate a loop of torch.autograd.grad of your own"
        )
    if any(group.get("maximize") for group in groups):
        raise ValueError(
            "base: expected parameter groups with maximize=False, found maximize=True, with which the guard and the record would have the "
            "wrong sign; minimise minus the loss instead"
        )
