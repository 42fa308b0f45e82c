"""What shares one Gram matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

Scope: TypeAlias = Literal["global", "tensor"] | Callable[[str], Any]


class Blocks(NamedTuple):
    """The block of each parameter (None: all in one), the number of blocks, and their names (None in the global scope)."""

    of_parameter: Sequence[int] | None
    number: int
    names: tuple[str, ...] | None


def blocks(scope: Scope, param_groups: Sequence[Mapping[str, Any]]) -> Blocks:
    """The blocks of parameters that the scope makes.

    Args:
        scope: ``"global"``, ``"tensor"``, or a function parameter name -> block key (blocks are in order of first use).
        param_groups: The optimizer's.

    Raises:
        ValueError: If the scope is none of these, or is a function and the parameters have no names.

    Example:
        >>> groups = [{"params": [1, 2, 3], "param_names": ["a.weight", "b.weight", "a.bias"]}]
        >>> blocks(lambda name: name.split(".")[0], groups)
        Blocks(of_parameter=[0, 1, 0], number=2, names=('a', 'b'))
    """
    if scope == "global":
        return Blocks(None, 1, None)
    names = [name for group in param_groups for name in (group.get("param_names") or [None] * len(group["params"]))]
    if scope == "tensor":
        shown = tuple(str(index) if name is None else name for index, name in enumerate(names))
        return Blocks(list(range(len(names))), len(names), shown)
    if not callable(scope):
        raise ValueError(f"scope: expected 'global', 'tensor' or a function of a parameter's name, found {scope!r}")
    if None in names:
        raise ValueError(
            "scope: a function of the parameter's name needs names, and the base optimizer has none; build it from "
            "model.named_parameters()"
        )
    keys = [scope(str(name)) for name in names]
    order = {key: index for index, key in enumerate(dict.fromkeys(keys))}
    return Blocks([order[key] for key in keys], len(order), tuple(str(key) for key in order))
