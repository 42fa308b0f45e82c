"""Anchors: what holds the layers of a model where examples to keep would feel that they change."""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn

from gradsurgery.gram.rows import dtensor_type
from gradsurgery.optimizer.ranks import active

_TRANSPOSED = "Conv1D"  # GPT-2's linear layer, in transformers: its weight is [in, out]


class LayerAnchor:
    r"""Pulls a model's weights back to where they were, as far as the inputs of its layers on kept examples reach.

    A retain loss holds what the retain examples show. What they do not show is answered by the same layers, from inputs
    of the same kind: an anchor holds the layers' outputs on such inputs, whatever the answers are. With $W_0$ the
    weight of a layer $y = W x$ at the start, and $C = \mathrm{E}[x x^T]$ over the tokens of the kept examples, `pull`
    replaces

    $$W \leftarrow W_0 + (W - W_0) \left(I + \lambda C / \bar c\right)^{-1},
    \qquad \bar c = \mathrm{tr}(C) / n, \quad \lambda = s\, \eta,$$

    which minimises $|V - W|^2 + (\lambda / \bar c)\, \mathrm{E}\,|(V - W_0) x|^2$ over $V$: a proximal step. Directions
    that no kept input has are left alone, and there the forgetting goes on. Of an embedding the inputs are one-hot, so
    that each row is divided by $1 + \lambda c_v / \bar c$, $c_v$ the share of its token; a weight that is an embedding
    and the head at once meets both terms. Vectors (biases, the weights of norms) are multiplied by one number for a
    channel, and pulled back by $1 / (1 + \lambda)$.

    As AdamW's weight decay, the pull goes with the learning rate $\eta$ of the step: where it is lowered, or rises in a
    warm-up, steps and pulls keep their balance, which is what decides how far the weights go.

    Source: ours. Related: the null spaces of layer inputs in continual learning (2103.09762) and in model editing
    (2410.02355), which forbid all change on kept inputs; here $\lambda$ says how much of it a step may leave.

    Args:
        model: Whose weights are held; those that require a gradient when the anchor is made, from where they are then.
        strength: $s > 0$. The scale of the inputs is divided out. 600 holds nearly everything in a small Llama.

    Raises:
        ValueError: If the strength is not a positive number, or nothing is trained.
        TypeError: If a weight that is trained is neither a vector nor that of a linear layer or an embedding, or is
            sharded.

    Cost: a copy of the trained weights and, for a layer with n inputs, n x n float32 numbers, which layers with the
    same input share; a pull takes `2 * out * n * n` multiplications a layer. In a process group the inputs of all
    processes count, and each pulls alike. A trained weight of 16 bits loses pulls that are smaller than its last digit,
    as it loses such steps.

    Example:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> before = layer.weight.detach().clone()
        >>> anchor = LayerAnchor(layer, strength=100.0)
        >>> with anchor.watch():
        ...     _ = layer(torch.tensor([[1.0, 0.0]]))  # the kept examples have the first input only
        >>> _ = layer.weight.data.add_(torch.tensor([[0.3, 0.3]]))
        >>> anchor.pull(lr=0.01)
        >>> (layer.weight - before).detach().round(decimals=4)  # C / c = diag(2, 0)
        tensor([[0.1000, 0.3000]])
    """

    def __init__(self, model: nn.Module, strength: float) -> None:
        if not 0.0 < strength < math.inf:
            raise ValueError(f"strength: expected a number > 0, found {strength}")
        named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        if not named:
            raise ValueError("model: expected weights that require a gradient, found none")
        sharded = dtensor_type()
        if sharded is not None and any(isinstance(weight, sharded) for weight in named.values()):
            raise TypeError("model: expected whole weights, found DTensors: an anchor does not know shards; use DDP")
        self.strength = strength
        self._weights = list(named.values())
        self._start = [weight.detach().clone() for weight in self._weights]
        self._layers: dict[int, list[nn.Module]] = {}  # id of a matrix -> the layers that have it
        self._names = {layer: name or type(layer).__name__ for name, layer in model.named_modules()}
        for layer in model.modules():
            weight = getattr(layer, "weight", None)
            if _is_known(layer) and isinstance(weight, Tensor) and weight.requires_grad:
                self._layers.setdefault(id(weight), []).append(layer)
        unknown = [name for name, weight in named.items() if weight.dim() != 1 and id(weight) not in self._layers]
        if unknown:
            raise TypeError(
                f"model: expected linear layers, embeddings and vectors, whose inputs are known, found {', '.join(unknown[:3])}: freeze "
                "such weights, or train LoRA adapters on linear layers"
            )
        self._seen: dict[nn.Module, Tensor] = {}
        self._pulls: list[partial[Tensor]] = []

    @contextmanager
    def watch(self, mask: Tensor | None = None) -> Generator[None]:
        """Forward passes of the model inside are of kept examples: the inputs of its layers are counted.

        It can be entered several times before the first pull. After it the count begins anew.

        Args:
            mask: `[B, T]`, not 0 at the tokens that count; by default all do. `attention_mask` leaves out padding. A
                layer whose input does not begin with `[B, T]`, as of an expert, counts all of it.

        Raises:
            ValueError: If the mask is no `[B, T]`, fits no layer's input, or fits that of a layer once and then not:
                each batch needs a `watch` with its own mask. Nothing is counted then.
        """
        if mask is not None and mask.dim() != 2:
            raise ValueError(f"mask: expected [B, T], as attention_mask is, found {list(mask.shape)}")
        last: list[tuple[Tensor, int, Tensor]] = []
        found: dict[nn.Module, Tensor] = {}
        masked: dict[nn.Module, set[bool]] = {}

        def count(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            given = inputs[0]
            masked.setdefault(layer, set()).add(mask is not None and _fits(mask, layer, given))
            version = -1 if given.is_inference() else given._version  # nobody counts what is written to those
            seen = version >= 0 and last and last[-1][0] is given and last[-1][1] == version
            moment = last[-1][2] if seen else None
            if moment is None or len(moment) != _size(layer):  # layers that follow each other may share their input
                moment = _moment(layer, given, mask)
                last[:] = [(given, version, moment)]
            found[layer] = found[layer] + moment if layer in found else moment

        hooks = [layer.register_forward_pre_hook(count) for layers in self._layers.values() for layer in layers]
        try:
            with torch.no_grad():
                yield
        finally:
            for hook in hooks:
                hook.remove()
        fitted = list(masked.values())
        if mask is not None and fitted and (not any(map(any, fitted)) or any(len(each) == 2 for each in fitted)):
            raise ValueError(
                f"mask: expected the first two dimensions of every batch that is watched with it, found {list(mask.shape)}, which do "
                "not fit: enter watch(attention_mask) once for each batch"
            )
        # Only now: a forward pass that fails has counted nothing.
        for layer, moment in found.items():
            self._seen[layer] = self._seen[layer] + moment if layer in self._seen else moment

    def prepare(self) -> None:
        """Make what pulls the weights of what was watched. `pull` does it too, where something new was watched.

        In a process group every process has to call it: they add up what they have watched.

        Warns:
            UserWarning: If no kept example came to a layer, such as an expert: its matrix is then not held.

        Raises:
            RuntimeError: If no forward pass was watched.
        """
        self._refresh()

    def pull(self, lr: float = 1.0) -> None:
        """Pull the weights back, after a step of any optimizer.

        Args:
            lr: The learning rate of that step.

        Raises:
            RuntimeError: If no forward pass was watched.
        """
        self._refresh()
        with torch.no_grad():
            for place, weight in enumerate(self._weights):
                held = (self._start[place], *self._pulls[place].args)
                if any(tensor.device != weight.device for tensor in held):  # the model has moved
                    self._start[place], *moved = (tensor.to(weight.device) for tensor in held)
                    self._pulls[place] = partial(self._pulls[place].func, *moved)
                start = self._start[place]
                left = self._pulls[place](change=weight - start, strength=self.strength * lr)
                weight.copy_(start + left)  # rounded once, where it has fewer digits

    def holds(self, weights: Iterable[Tensor]) -> bool:
        """Whether all that it pulls is among these weights."""
        there = set(map(id, weights))
        return all(id(weight) in there for weight in self._weights)

    def memory_estimate(self) -> int:
        """Bytes that the anchor holds, at most: layers that turn out to share their input hold less."""
        every = [layer for layers in self._layers.values() for layer in layers]
        numbers = sum(_size(layer) + _width(layer) ** 2 for layer in every)
        return sum(start.nbytes for start in self._start) + 4 * (numbers + len(self._weights))

    def _refresh(self) -> None:
        # The first time a process that has watched nothing adds nothing, and the others do not wait for it in vain.
        unreached: list[str] = []
        if self._seen or (not self._pulls and active()):
            with torch.no_grad():
                self._pulls, unreached = self._prepared()
        if not self._pulls:
            raise RuntimeError("pull: expected forward passes of kept examples inside `watch()` before, found none")
        if unreached:
            warnings.warn(
                f"no kept example came to {', '.join(unreached[:3])}{', ...' if len(unreached) > 3 else ''} ({len(unreached)} of "
                f"{sum(map(len, self._layers.values()))} layers) with an input other than 0: their matrices are not held; watch more "
                "examples, or freeze them",
                stacklevel=3,  # where `pull` or `prepare` is called
            )

    def _prepared(self) -> tuple[list[partial[Tensor]], list[str]]:
        """What pulls back the change of each weight; the names of the layers of weights that it does not hold."""
        last: list[tuple[Tensor, tuple[Tensor, Tensor]]] = []  # layers that follow each other may share their input

        def directions(moment: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
            if not (last and torch.equal(last[-1][0], moment) and last[-1][1][0].dtype == kind):
                values, basis = torch.linalg.eigh(moment)
                last[:] = [(moment, (values.clamp_min(0.0).to(kind), basis.to(kind)))]
            return last[-1][1]

        found: list[partial[Tensor]] = []
        unreached: list[str] = []
        for weight in self._weights:
            layers = self._layers.get(id(weight), [])
            scaled = {layer: self._scaled(layer) for layer in layers}
            if not any(moment.any() for moment in scaled.values()):  # tied ones hold each other's weight
                unreached += [self._names[layer] for layer in layers]
            rows = [moment for layer, moment in scaled.items() if isinstance(layer, nn.Embedding)]
            columns = [moment for layer, moment in scaled.items() if not isinstance(layer, nn.Embedding)]
            kind = _working(weight)
            if not columns:
                terms = _sum(rows)[:, None] if rows else weight.new_ones((), dtype=torch.float64)
                found.append(partial(_shrunk, terms.to(kind)))
                continue
            values, basis = directions(_sum(columns), kind)
            if type(layers[0]).__name__ == _TRANSPOSED:
                found.append(partial(_shrunk_from_left, values, basis))
            else:
                further = [_sum(rows)[:, None].to(kind)] if rows else []
                found.append(partial(_shrunk_from_right, values, basis, *further))
        self._seen.clear()
        return found, unreached

    def _scaled(self, layer: nn.Module) -> Tensor:
        """The layer's moments over their mean, in float64; 0 where no kept example came."""
        weight = _weight(layer)
        if layer in self._seen:
            moment = self._seen.pop(layer).to(weight.device, torch.float64, copy=True)
        else:
            size = (_size(layer),) if isinstance(layer, nn.Embedding) else (_size(layer),) * 2
            moment = weight.new_zeros(size, dtype=torch.float64)
        if active():
            distributed.all_reduce(moment)
        mean = moment.mean() if moment.dim() == 1 else moment.diagonal().mean()
        return moment / (mean if mean else 1.0)


def _is_known(layer: nn.Module) -> bool:
    """Whether it is known what the layer's weight is multiplied with."""
    return isinstance(layer, (nn.Linear, nn.Embedding)) or type(layer).__name__ == _TRANSPOSED


def _weight(layer: nn.Module) -> Tensor:
    weight: Any = layer.weight
    return weight


def _width(layer: nn.Module) -> int:
    """Inputs of a linear layer; 0 of an embedding, which needs one number a token."""
    if isinstance(layer, nn.Embedding):
        return 0
    return _weight(layer).shape[0 if type(layer).__name__ == _TRANSPOSED else 1]


def _size(layer: nn.Module) -> int:
    """The length of the layer's moments: its inputs, or the tokens of an embedding."""
    return len(_weight(layer)) if isinstance(layer, nn.Embedding) else _width(layer)


def _working(like: Tensor) -> torch.dtype:
    """In which type sums and products are computed: float32 at least."""
    return torch.promote_types(like.dtype, torch.float32)


def _sum(moments: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(moments)).sum(0)


def _fits(mask: Tensor, layer: nn.Module, inputs: Tensor) -> bool:
    """Whether these inputs are `[B, T]` tokens, or `[B, T, n]`; an expert's are `[tokens, n]`."""
    return inputs.shape[:2] == mask.shape and (isinstance(layer, nn.Embedding) or inputs.dim() > 2)


def _moment(layer: nn.Module, inputs: Tensor, mask: Tensor | None) -> Tensor:
    """Sum of x x^T over the tokens, `[n, n]`; of an embedding how often each token is there, `[V]`."""
    if mask is not None and _fits(mask, layer, inputs):
        inputs = inputs[mask.to(inputs.device) != 0]
    if isinstance(layer, nn.Embedding):
        return torch.bincount(inputs.flatten(), minlength=layer.num_embeddings).float()
    rows = inputs.reshape(-1, inputs.shape[-1]).to(_working(inputs))
    with torch.autocast(rows.device.type, enabled=False):  # squares overflow float16
        return rows.T @ rows


def _shrunk(terms: Tensor, *, change: Tensor, strength: float) -> Tensor:
    return change.to(terms) / (1.0 + strength * terms)


def _shrunk_from_right(values: Tensor, basis: Tensor, *rows: Tensor, change: Tensor, strength: float) -> Tensor:
    terms = values + rows[0] if rows else values
    return (change.to(basis) @ basis / (1.0 + strength * terms)) @ basis.T


def _shrunk_from_left(values: Tensor, basis: Tensor, *, change: Tensor, strength: float) -> Tensor:
    return _shrunk_from_right(values, basis, change=change.T, strength=strength).T
