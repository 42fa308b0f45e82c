"""Scope: which parameters share one Gram matrix."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

Scope: TypeAlias = Literal["global", "tensor"] | Callable[[str], Any]


class Blocks(NamedTuple):
    """Which parameters share one Gram matrix.

    Attributes:
        of_parameter: The block of each parameter; None puts all in one.
        number: Number of blocks.
        names: Their names; None in the global scope.
    """

    of_parameter: Sequence[int] | None
    number: int
    names: tuple[str, ...] | None


def blocks(scope: Scope, param_groups: Sequence[Mapping[str, Any]], *, option: str = "scope") -> Blocks:
    """The blocks of parameters that a scope stands for.

    Args:
        scope: ``"global"``, ``"tensor"``, or a function parameter name -> block key (blocks are in order of first use).
        param_groups: The optimizer's.
        option: Name of the option that holds the scope, for the error.

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
        raise ValueError(f"{option}: expected 'global', 'tensor' or a function of a parameter's name, found {scope!r}")
    if None in names:
        raise ValueError(
            f"{option}: a function of the parameter's name needs names, and the base optimizer has none; build it from "
            "model.named_parameters()"
        )
    keys = [scope(str(name)) for name in names]
    order = {key: index for index, key in enumerate(dict.fromkeys(keys))}
    return Blocks([order[key] for key in keys], len(order), tuple(str(key) for key in order))


def blocks_of_both(
    scope: Scope, record_scope: Scope | None, param_groups: Sequence[Mapping[str, Any]]
) -> tuple[Blocks, Blocks | None]:
    """The blocks of ``scope`` and of ``record_scope`` (None where that is None), as `blocks`."""
    seen = blocks(scope, param_groups)
    return seen, None if record_scope is None else blocks(record_scope, param_groups, option="record_scope")


_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_STACKS = {"layers", "layer", "h", "block", "blocks"}
_PATH = {"base_model", "model", "language_model", "text_model", "transformer", "gpt_neox", "backbone"} | _STACKS
# Searched in this order, because post_attention_layernorm is a norm.
_IN_A_LAYER = {
    "norm": re.compile(r"norm|^ln(_|$)", re.IGNORECASE),
    "attention": re.compile(r"attn|attention", re.IGNORECASE),
    "mlp": re.compile(r"mlp|ffn|feed_?forward|moe|^fc\d$|^DenseReluDense$|^intermediate$", re.IGNORECASE),
}
_OUTSIDE = {
    "head": re.compile(r"^(lm_head|embed_out)$"),
    "embedding": re.compile(r"embed|^(wte|wpe|shared)$", re.IGNORECASE),
    "final norm": re.compile(r"norm|^ln(_|$)", re.IGNORECASE),
}


def by_layer(name: str) -> str:
    """The part of a Transformer that a parameter belongs to. As ``scope`` or ``record_scope``: three blocks a layer.

    The parts are ``embedding``, ``layer 7 attention``, ``layer 7 mlp``, ``layer 7 norm``, ``final norm`` and ``head``.
    They are recognised by the words that Llama, GPT-2, GPT-NeoX, Gemma, Mistral, Qwen, Phi, OPT, BLOOM, Falcon and T5
    use in transformers; the words of wrappers (PEFT, FSDP, torch.compile) are skipped. The first known word of a layer
    decides: Gemma 3's ``self_attn.q_norm`` is attention. Another stack keeps its name (``encoder layer 0 mlp``). A part
    that is not recognised keeps its own name (``layer 3 mixer``, ``score``), and is never merged with another on a
    guess. A head tied to the embedding is one tensor, and part of ``embedding``.

    Args:
        name: From ``model.named_parameters()``.

    Example:
        >>> by_layer("model.layers.7.mlp.down_proj.weight"), by_layer("transformer.h.0.ln_1.bias")
        ('layer 7 mlp', 'layer 0 norm')
        >>> by_layer("model.norm.weight")
        'final norm'
        >>> by_layer("base_model.model.model.layers.7.self_attn.q_proj.lora_A.default.weight")
        'layer 7 attention'
    """
    words = [word for word in name.split(".") if word not in _WRAPPERS]
    numbers = [index for index, word in enumerate(words) if word.isdigit()]
    if not numbers:
        for index, word in enumerate(words):
            for kind, pattern in _OUTSIDE.items():
                if pattern.search(word):
                    return _part(words[:index], kind)
        return ".".join(words[:-1]) or name
    at = next((index for index in numbers if index and words[index - 1] in _STACKS), numbers[0])
    inside = [word for word in words[at + 1 : -1] if not word.isdigit()]
    found = (kind for word in inside for kind, pattern in _IN_A_LAYER.items() if pattern.search(word))
    return _part(words[:at], f"layer {words[at]}", next(found, inside[0] if inside else ""))


def _part(path: Sequence[str], *kind: str) -> str:
    return " ".join(word for word in (*(word for word in path if word not in _PATH), *kind) if word)
