"""GradientSurgery: keep each objective's gradient apart, and step any optimizer with their combination."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from gradsurgery import rules
from gradsurgery.optimizer import checkpoint
from gradsurgery.optimizer.average import EMA
from gradsurgery.optimizer.capture import Phase, Window, check_objectives
from gradsurgery.optimizer.front_ends import FrontEnds
from gradsurgery.optimizer.guard import check_guard, copy_before_step, guard
from gradsurgery.optimizer.metric import MetricOption, check_metric
from gradsurgery.optimizer.options import Guard, Options, check_norm, start_of
from gradsurgery.optimizer.ranks import Ranks, refuse_deepspeed
from gradsurgery.optimizer.record import Record
from gradsurgery.optimizer.scaler import check_scaler
from gradsurgery.optimizer.scope import Scope, blocks_of_both
from gradsurgery.optimizer.update import multiples, resolve_rule
from gradsurgery.optimizer.wrapper import refuse_groups, watch_steps


class GradientSurgery(FrontEnds):
    r"""Wrap an optimizer so that each objective's gradient is kept apart and a rule decides what is stepped.

    With rows $g_0$ (``"forget"``) and $g_1, \dots$ (protected; their moving average where ``ema_decay`` is set), the
    base optimizer steps with $u = \sum_k c_k g_k + \sum_k \mathrm{add}_k\, g_k^{\mathrm{now}}$, where $c =
    \mathrm{rule}(G)$, $G_{ij} = \langle g_i, g_j\rangle$ and $g_k^{\mathrm{now}}$ is the current row.

    There are two front ends: contexts, with one graph alive at a time (see the example), and for trainers that own the
    loop one scalar whose single ``backward()`` does all of it::

        optimizer.join(forget=forget_loss, retain=retain_loss).backward()

    It is a `torch.optim.Optimizer`: ``param_groups`` and ``state`` are the base's own, so schedulers, GradScaler,
    Lightning, checkpoints and step hooks work on it. Put the scheduler on this wrapper.

    ``rule``, ``ema_decay``, ``add``, ``max_norm``, ``guard``, ``metric`` and ``record_scope`` are attributes too, which
    a schedule may set between steps (`gradsurgery.optimizer.options.Adjustable`).

    Args:
        base: Any constructed optimizer whose step needs no closure.
        rule: Gram matrix ``[..., K, K]`` -> coefficients ``[..., K]`` (see `gradsurgery.rules`), or a function rows ->
            row marked by `gradsurgery.rules.elementwise.rule` (such as ``elementwise.sago``; one more gradient copy),
            or its name.
        objectives: K distinct names; the first is rectified, the others are protected.
        ema_decay: Weight of the OLD value in the moving average that stands in for a protected row, in [0, 1): one
            number for every protected row, or by name. The average starts at 0 and is bias-corrected, as Adam's. (GRU's
            gamma is 1 - ema_decay.)
        scope: What shares one Gram matrix: the whole model, each tensor, or a function parameter name -> block key (the
            base must then have been built from ``model.named_parameters()``).
        record_scope: Like ``scope``: the record then also holds the Gram matrices of these blocks
            (``record.block_gram``), whatever the rule sees. They come from the same pass over the rows, and the step
            stays the same. `gradsurgery.optimizer.scope.by_layer` makes it the G-effect by layer. None records only
            what the rule saw.
        metric: ``"optimizer"`` measures conflict with the base's own preconditioner as it stood before the step
            (Euclidean on the first step): 1/(sqrt(v) + eps) for Adam-likes. Momentum, weight decay and the groups'
            learning rates are not part of it. A function of your own takes the parameters and returns, for each, the
            diagonal of the inner product: a tensor of weights > 0 like the parameter, or None for weights of 1. It is
            asked when rows are combined: ``metric=lambda parameters: [importance[id(p)] for p in parameters]``.
        guard: ``"update"`` looks at the parameter change after the base's step and removes, by the same exact
            projection as `gradsurgery.rules.gru`, what would raise a protected objective to first order. ``"measure"``
            only records it.
        add: Added after the rule, by name: a multiple of the current protected row, not of its average (the GRU code's
            "+ce").
        max_norm: Clip the combined gradient to this Euclidean norm.
        ema_dtype: Type that the averages are kept in.
        accumulate: Keep the rows apart after `combine`, one more copy, so that `join` can run once per micro-batch.

    Raises:
        TypeError: If ``base`` is not a constructed optimizer, or needs a closure (LBFGS).
        ValueError: If an option is outside its domain or names an unknown objective, rule, scope or metric, or if an
            elementwise rule meets a scope or metric, which only a Gram matrix has, or a group has ``maximize=True`` or
            ``differentiable=True``, a parameter twice, or one on an Apple GPU.
        RuntimeError: If DeepSpeed owns the parameters.

    Cost: K - 1 gradient copies, one more per average, one each for ``accumulate`` and ``guard``; see `memory_estimate`.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = GradientSurgery(torch.optim.SGD([weight], lr=0.1), rule=rules.gru)
        >>> with optimizer.objective("retain"):
        ...     weight[0].backward()
        >>> with optimizer.objective("forget"):
        ...     (weight[1] - weight[0]).backward()
        >>> optimizer.step()
        >>> weight.data, optimizer.record.conflict
        (tensor([1.0000, 0.9000]), True)
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        rule: Callable[..., Any] | str = rules.gru,
        objectives: Sequence[str] = ("forget", "retain"),
        *,
        ema_decay: float | Mapping[str, float] | None = None,
        scope: Scope = "global",
        record_scope: Scope | None = None,
        metric: MetricOption = "euclidean",
        guard: Guard = None,
        add: Mapping[str, float] | None = None,
        max_norm: float | None = None,
        ema_dtype: torch.dtype = torch.float32,
        accumulate: bool = False,
    ) -> None:
        super().__init__(base)
        self._objectives = check_objectives(objectives)
        rule = resolve_rule(rule, len(self.objectives), scope=scope, metric=metric)
        check_metric(metric, base)
        check_guard(guard, self._parameters(), self.objectives)
        norm = check_norm(max_norm)
        self._ema = EMA(ema_decay, self.objectives, ema_dtype)
        added = multiples(add or {}, self.objectives)
        self._options = Options(rule, start_of(rule), scope, record_scope, metric, guard, added, norm, accumulate)
        blocks_of_both(scope, record_scope, self.param_groups)  # a scope that does not fit the parameters raises here
        refuse_deepspeed(base, self._parameters())

    _check_groups = staticmethod(refuse_groups)

    def _restart(self) -> None:
        super()._restart()
        # Changed in place and never replaced, for the reason that `Adjustable` gives.
        self._window = Window()
        self._ranks = Ranks()
        watch_steps(self._base, weakref.WeakMethod(self._window.refuse_direct_step))

    # One step --------------------------------------------------------------------------------------------------------

    @property
    def record(self) -> Record | None:
        """The latest `combine`'s record, or None before the first."""
        return self._window.record

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Combine what is not combined, step the base, guard the change, and commit the averages.

        Args:
            closure: Called once, with gradients enabled, before anything else.

        Returns:
            The closure's value, or None.

        Raises:
            FloatingPointError: If a row, and so the Gram matrix, is not finite: parameters, base state and averages are
                as before, and `zero_grad` recovers.
            RuntimeError: If an objective is open, or none, or not all of them, ran since the last step. With every
                learning rate 0 and no objective it passes through to the base instead (`torch.distributed.checkpoint`
                initialises optimizers so).
        """
        with torch.enable_grad():
            value = None if closure is None else closure()
        window, parameters = self._window, self._parameters()
        window.refuse_inside("step")
        if not window.slots and window.phase is not Phase.COMBINED:
            if closure is not None and value is None and all(p.grad is None for p in parameters):
                return None  # Lightning: training_step returned None to skip this batch
            rates = [group.get("lr") for group in self.param_groups]
            if all(rate is not None and float(rate) == 0.0 for rate in rates):
                self._step_base()
                self._ema.start(parameters)
                return value
            self._ranks.agree(len(self.objectives), window.problem_stepping(self.objectives), parameters)
        record = self.combine()
        rows = window.rows_to_step(self.objectives, parameters)
        with torch.no_grad():
            before = copy_before_step(rows.parameters) if self.guard else []
            self._step_base()
            if self.guard:
                unguarded, actual = guard(rows, before, self.param_groups, project=self.guard == "update")
                record = replace(record, actual_change=actual, unguarded_change=unguarded)
            if self._ema.decays:
                self._ema.commit(rows, window.candidates)
        if isinstance(self.rule, rules.StatefulRule):
            self.rule.commit()
        window.record = replace(record, applied=True)
        window.clear(Phase.CLOSED)
        window.spent.look(parameters)
        return value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``.grad`` and every row; ``model.zero_grad()`` knows nothing of rows that are not in ``.grad``.

        Raises:
            RuntimeError: If it is called inside an objective, whose earlier rows it would clear.
        """
        self._window.refuse_inside("zero_grad")
        self._base.zero_grad(set_to_none)
        # Zeroed tensors may stay in .grad. They are spent, and must not be refused as gradients of no objective.
        self._window.clear(Phase.OPEN if set_to_none else Phase.CLOSED)
        self._window.spent.look(self._parameters())

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """False: a GradScaler unscales ``.grad``, also for a fused base. It asks before it steps, and is noticed so."""
        check_scaler(self._window, inspect.currentframe())
        return False

    # Saving ----------------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        rule = getattr(self.rule, "__name__", repr(self.rule))
        return f"{type(self).__name__}({self._base!r}, rule={rule}, objectives={self.objectives}, ema_decay={self._ema.decays})"

    def __getstate__(self) -> dict[str, Any]:
        # Rows belong to one step, and the DDP modules that were found to one process: a copy starts without them.
        return {key: value for key, value in super().__getstate__().items() if key not in ("_window", "_ranks")}

    def state_dict(self) -> dict[str, Any]:
        """The base's state_dict with the averages in it.

        Each is a float tensor ``gradsurgery_ema_<objective>`` in the parameter's state, beside ``gradsurgery_steps``,
        the number of steps behind it. The decays, and a stateful rule's numbers, are in the parameter groups, where
        every checkpoint format keeps them.
        """
        return self._save_between_hooks(partial(checkpoint.save, self._base, self._ema, self.rule))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # the name is torch.distributed.checkpoint's
        """Restore what `state_dict` returned. A plain checkpoint of the base is accepted: averages then start at 0.

        Args:
            state_dict: From `state_dict`; it is not modified.

        Raises:
            ValueError: If it does not fit: other parameter groups, an average of another shape, or averages of
                objectives that have none here. Nothing is changed then.
        """

        def load(state_dict: dict[str, Any]) -> None:
            checkpoint.load(state_dict, self._base, self._ema, self.rule, self._options.rule_start)
            # Combined rows are forgotten, and so spent is what is left of them in .grad.
            window, parameters = self._window, self._parameters()
            window.clear(Phase.OPEN if window.phase is Phase.OPEN else Phase.CLOSED)
            window.spent.look(parameters)

        self._load_between_hooks(state_dict, load)
