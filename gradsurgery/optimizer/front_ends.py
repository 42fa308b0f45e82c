"""Front ends: how an optimizer is given backward passes, by contexts or by one scalar, and combines their rows."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from gradsurgery.optimizer.average import EMA
from gradsurgery.optimizer.capture import Phase
from gradsurgery.optimizer.join import Stages, join
from gradsurgery.optimizer.metric import metric_of
from gradsurgery.optimizer.options import Adjustable
from gradsurgery.optimizer.perturbation import DIRECTION, Perturbation, Perturbed, Scale
from gradsurgery.optimizer.ranks import Ranks
from gradsurgery.optimizer.record import Record, record_of
from gradsurgery.optimizer.rows import Rows
from gradsurgery.optimizer.scope import blocks_of_both
from gradsurgery.optimizer.trunk import Features, Shared
from gradsurgery.optimizer.update import decide


class FrontEnds(Adjustable):
    """What captures and combines rows: `objective` for loops of one's own, `join` for trainers that own the loop."""

    _ranks: Ranks
    _ema: EMA

    def objective(self, name: str, *, at: Perturbation | None = None) -> AbstractContextManager[None]:
        """Everything that ``backward()`` writes to ``.grad`` inside this context is the row called ``name``.

        Several backward passes, also in several contexts, add up as ``.grad`` does.

        Args:
            name: One of the objectives.
            at: Take the gradient at weights that are moved for the time of the context, see `perturbed`. The forward
                pass then belongs inside it too.

        Raises:
            ValueError: If there is no such objective.
            RuntimeError: If the row cannot be trusted (see `Window.capture` in `gradsurgery.optimizer.capture`), or
                ranks enter different objectives, or the perturbation has no direction; everything else is untouched.
        """
        if name not in self.objectives:
            raise ValueError(f"objective: expected one of {list(self.objectives)}, found {name!r}")
        row = self._capture(name, self.objectives.index(name))
        return row if at is None else _moved(row, at)

    def perturbed(self, radius: float, *, scale: Scale = "global") -> Perturbation:
        r"""Weights moved along a direction, $\theta' = \theta - \rho \, g / \|g\|$, at which a row can be taken.

        Args:
            radius: $\rho$, the Euclidean length of the move; see `Perturbation`.
            scale: ``"global"``, or ``"tensor"`` for a move of each tensor relative to its own length.

        Returns:
            What ``objective(name, at=...)`` and `Perturbed` take. It may be kept for the whole training.

        Raises:
            ValueError: If the radius is not a positive number, or the scale is unknown.

        Example:
            >>> import torch, gradsurgery as gs
            >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
            >>> optimizer = gs.GradientSurgery(torch.optim.SGD([weight], lr=0.1))
            >>> perturbed = optimizer.perturbed(radius=0.5)
            >>> with perturbed.direction():
            ...     weight[0].backward()
            >>> with optimizer.objective("forget", at=perturbed):
            ...     print(weight.data)
            ...     (weight.square().sum() / 2).backward()
            tensor([0.5000, 1.0000])
            >>> weight.data
            tensor([1., 1.])
        """
        self._options.perturbed = True
        capture, take = self._capture_direction, self._take_direction
        return Perturbation(self._parameters, capture, take, lambda: self._window.number, radius=radius, scale=scale)

    @contextmanager
    def _capture_direction(self) -> Generator[None]:
        with self._ranks.reducing(self._parameters()), self._capture(DIRECTION, len(self.objectives) + 1):
            yield

    def _take_direction(self) -> list[Tensor | None] | None:
        return self._window.slots.pop(DIRECTION, None)

    def _capture(self, name: str, action: int) -> AbstractContextManager[None]:
        parameters = self._parameters()
        return self._window.capture(
            name,
            parameters,
            objectives=self.objectives,
            accumulate=self._options.accumulate,
            agree=partial(self._ranks.agree_to_enter, action, parameters),
        )

    # Signatures one by one, so that a type checker does not take the values of join(**losses) for the other arguments.
    @overload
    def join(self, **losses: Tensor | Perturbed) -> Tensor: ...
    @overload
    def join(self, *, retain_graph: bool, **losses: Tensor | Perturbed) -> Tensor: ...
    @overload
    def join(self, *, scale: float | Tensor | None, **losses: Tensor | Perturbed) -> Tensor: ...
    @overload
    def join(self, *, retain_graph: bool, scale: float | Tensor | None, **losses: Tensor | Perturbed) -> Tensor: ...
    @overload
    def join(self, *, features: Features, **losses: Tensor | Perturbed) -> Tensor: ...
    @overload
    def join(self, *, features: Features, batched: bool, **losses: Tensor | Perturbed) -> Tensor: ...
    @overload
    def join(
        self,
        *,
        features: Features,
        batched: bool = ...,
        retain_graph: bool = ...,
        scale: float | Tensor | None = ...,
        **losses: Tensor | Perturbed,
    ) -> Tensor: ...
    def join(
        self,
        *,
        features: Any = None,
        batched: Any = False,
        retain_graph: Any = False,
        scale: Any = None,
        **losses: Tensor | Perturbed,
    ) -> Tensor:
        """One scalar, the sum of the losses, whose single ``backward()`` captures every row and combines them.

        The gradient that reaches it must be the loss scale (of a GradScaler, else 1) divided by the number of
        micro-batches, as Lightning, Hugging Face and Accelerate divide: rows are then means over the micro-batches so
        far. A loop that does not divide says the loss scale, ``join(..., scale=1.0)``: rows are then sums, as those of
        contexts. A loss that was not divided is noticed by `GradientSurgery.step`, and refused.

        Losses that share one forward pass name the tensors that they are computed from::

            hidden = model.model(**batch).last_hidden_state
            optimizer.join(forget=forget_loss(hidden), retain=retain_loss(hidden), features=hidden).backward()

        The rows are the same as with ``retain_graph=True``. Every loss runs its head backward to the features, and the
        graph of the head is freed; then the trunk before the features runs backward once for each loss. It pays where
        the losses look at the same examples. Losses of different examples, as forgetting and retention usually have,
        are better given a forward pass each: with one over all examples every loss runs backward through the examples
        of the others too, whose gradients are zero, and a step of two losses takes up to 1.4 times as long.

        Args:
            features: The tensor, or several, from which every loss is computed, as in TorchJD's ``mtl_backward``. Where
                heads and trunk cannot run apart (DDP, FSDP2, hooks, an embedding that is the head too or another way
                around the features, features computed from one another), every loss gets a whole backward pass.
            batched: Run the trunk backward once, with all losses' gradients of the features at the same time
                (`torch.autograd.grad` with ``is_grads_batched``). On a CPU that takes as long; it is meant for a GPU
                that waits for launches, and not measured there.
            retain_graph: Keep the graphs until the last of the inner backward passes: needed when the losses share one
                forward pass and name no features, and when they share a part of the graph behind the features.
            scale: The loss scale that the incoming gradient carries; None reads it from the gradient.
            **losses: One 0-dim loss for each objective, by name; or a `Perturbed`, which the backward pass computes.

        Returns:
            0-dim float32 tensor (float64 where a loss is). A term that is added to it is in no row, and refused.

        Raises:
            ValueError: If an objective is missing or unknown, or a loss is not a single number, or features are no
                tensors.
            RuntimeError: If a loss does not depend on any parameter, under DDP with ``static_graph``, or for FSDP1; if
                features have no graph, or a loss is not computed from them. Its backward raises as `objective` and
                `combine` do, and where another term writes to ``.grad``. With ``batched``: if heads and trunk cannot
                run apart, or the trunk has an operation that `torch.vmap` cannot run backward.

        Cost: the graphs of all losses are alive at once (contexts hold one at a time). ``features`` walks the graph in
        Python when the losses are joined. ``batched`` holds the gradients of the trunk's activations of all K losses at
        once, K times those of a backward pass. ``tests/benchmarks/trunk.py`` measures all of them.
        """
        window, joined, parameters = self._window, self._window.joined, self._parameters()
        window.refuse_stray("join", parameters)

        def begin() -> None:
            joined.refuse_mixture(scale)
            window.refuse_another_term(parameters)

        def finish(gradient: Tensor) -> None:
            loss_scale = joined.add(gradient, scale)
            # Inside DDP's no_sync() the rows are this rank's own; they are reduced, and combined, with the last
            # micro-batch.
            if self._ranks.synchronising(parameters):
                self.combine(scale=loss_scale)
            else:
                window.spent.look(parameters)

        arm = partial(self._ranks.arm_reducer, parameters)
        end = partial(window.refuse_another_term, parameters)
        window.spent.look(parameters)
        stages = Stages(begin, arm, self.objective, finish, end)
        if batched and features is None:
            raise ValueError(
                "join: expected features with batched=True, found none; name the tensors that the losses share, or leave it out"
            )
        shared = None if features is None else Shared(features, batched, reduced=self._ranks.reduce(parameters))
        device = parameters[0].device
        return join(losses, self.objectives, stages, device=device, retain_graph=retain_graph, shared=shared)

    @torch.no_grad()
    def combine(self, *, scale: float | Tensor | None = None) -> Record:
        """Combine the rows and write the update to ``.grad``, where clipping and GradScaler read it.

        `GradientSurgery.step` and join's backward call it.

        Args:
            scale: Loss scale of the rows (``scaler.get_scale()``), so that averages, the record and ``max_norm`` are in
                unscaled units. With a GradScaler and contexts it must be given, because the scaler cannot be seen from
                here.

        Returns:
            The step's record. Calling it again without new rows changes nothing.

        Raises:
            RuntimeError: If an objective is open or missing, ``.grad`` holds a gradient that belongs to none, or ranks
                disagree; nothing is changed. A non-finite Gram matrix does not raise here: it leaves NaN in ``.grad``,
                where a GradScaler finds it, and `GradientSurgery.step` raises.

        Cost: reads every row once and writes one, without temporaries (an elementwise rule makes a new row, which is
        measured by one more pass).
        """
        window, parameters, options = self._window, self._parameters(), self._options
        window.refuse_inside("combine")
        if window.phase is Phase.COMBINED and window.record is not None:
            return window.record
        self._ranks.agree(len(self.objectives), window.problem_combining(self.objectives, parameters), parameters)
        rows = Rows.captured(
            window.rows(self.objectives, len(parameters)),
            parameters,
            1.0 if scale is None else scale,
            blocks=blocks_of_both(options.scope, options.record_scope, self.param_groups),
            metric=metric_of(options.metric, self._base, parameters),
        )
        keep, check = options.accumulate, partial(self._ranks.check_gram, parameters)
        # Folding overwrites rows, and those that will grow must stay.
        to_fold = {} if keep else self._ema.fold(rows, window.candidates, add=options.add)
        rows = self._ema.stand_in(rows, window.candidates, to_fold)
        try:
            update, written = decide(
                rows, options.rule, add=options.add, max_norm=options.max_norm, keep=keep, check=check
            )
        finally:
            rows.finish_writes()  # nothing is left to do, unless this raised before the rows were measured
        window.record, window.scale_known = record_of(self.objectives, rows, update), scale is not None
        window.hand_to_step(rows, update, written, keep_slots=keep)
        window.spent.look(parameters)
        if not keep and not self._ema.decays and options.guard is None:
            rows.lists.clear()  # nobody reads the protected rows again: free them before the base's step
        return window.record


@contextmanager
def _moved(row: AbstractContextManager[None], at: Perturbation) -> Generator[None]:
    at.check()  # before the row is entered, so that a forgotten direction costs no row
    with row, at.moved():
        yield
