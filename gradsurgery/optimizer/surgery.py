"""GradientSurgery: an optimizer that keeps the gradients of several objectives apart, and steps any other with their combination."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from gradsurgery import rules
from gradsurgery.gram import combine_blocks_
from gradsurgery.optimizer.average import EMA
from gradsurgery.optimizer.capture import Phase
from gradsurgery.optimizer.join import Backward, join
from gradsurgery.optimizer.metric import check_metric, optimizer_metric
from gradsurgery.optimizer.ranks import Ranks, refuse
from gradsurgery.optimizer.record import Record
from gradsurgery.optimizer.scope import Scope, blocks
from gradsurgery.optimizer.update import Rows, Update, decide, decide_by_coordinates, guard, measure, with_update
from gradsurgery.optimizer.window import Combined, Window
from gradsurgery.optimizer.wrapper import Wrapper, local_bytes
from gradsurgery.rules import elementwise


class GradientSurgery(Wrapper):
    r"""Wrap an optimizer so that each objective's gradient is kept apart and a rule decides what is stepped.

    With rows :math:`g_0` (``"forget"``) and :math:`g_1, \dots` (protected; their EMA where ``ema_decay`` is set), the base optimizer
    steps with :math:`u = \sum_k c_k g_k + \sum_k \mathrm{add}_k\, r_k`, where :math:`c = \mathrm{rule}(G)`,
    :math:`G_{ij} = \langle g_i, g_j\rangle` and :math:`r_k` is the current row.

    Two front ends. Contexts, with one graph alive at a time::

        with optimizer.objective("retain"):
            retain_loss(model, retain_batch).backward()
        with optimizer.objective("forget"):
            forget_loss(model, forget_batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    or one scalar whose single ``backward()`` does all of it, for trainers that own the loop::

        optimizer.join(forget=forget_loss, retain=retain_loss).backward()

    It is a `torch.optim.Optimizer`: ``param_groups`` and ``state`` are the base's own, so schedulers, GradScaler, Lightning,
    checkpoints and step hooks work on it. Put the scheduler on this wrapper.

    Args:
        base: Any constructed optimizer whose step needs no closure.
        rule: Gram matrix ``[..., K, K]`` -> coefficients ``[..., K]`` (see `gradsurgery.rules`), or a function rows -> row marked by
            `gradsurgery.elementwise.rule` (such as ``elementwise.sago``; one more gradient copy), or its name.
        objectives: K distinct names; the first is rectified, the others are protected.
        ema_decay: Weight of the OLD value in the moving average that stands in for a protected row, in [0, 1): one number for every
            protected row, or by name. The average starts at 0 and is bias-corrected, as Adam's. (GRU's gamma is 1 - ema_decay.)
        scope: What shares one Gram matrix: the whole model, each tensor, or a function parameter name -> block key (the base must
            then have been built from ``model.named_parameters()``).
        record_scope: Like ``scope``: the record then holds the Gram matrices of these blocks too (``record.block_gram``), whatever the
            rule sees, from the same pass over the rows; the step is the same. `gradsurgery.scope.by_layer` makes it the G-effect by
            layer. None records only what the rule saw.
        metric: ``"optimizer"`` measures conflict with the base's own preconditioner as it stood before the step (Euclidean on the
            first): 1/(sqrt(v) + eps) for Adam-likes. It knows neither momentum nor weight decay nor the groups' learning rates.
        guard: ``"update"`` looks at the parameter change after the base's step and removes, by the same exact projection as
            `gradsurgery.rules.gru`, what would raise a protected objective to first order. ``"measure"`` only records it.
        add: Added after the rule, by name: a multiple of the current protected row, not of its EMA (the GRU code's "+ce").
        max_norm: Clip the combined gradient to this Euclidean norm.
        ema_dtype: Type the averages are kept in.
        accumulate: Keep the rows apart after `combine`, one more copy, so that `join` can run once per micro-batch.

    Raises:
        TypeError: If ``base`` is not a constructed optimizer, or needs a closure (LBFGS).
        ValueError: If an option is outside its domain or names an unknown objective, rule, scope or metric, or if an elementwise rule
            meets a scope or metric, which only a Gram matrix has.
        RuntimeError: If DeepSpeed owns the parameters.

    Cost: K - 1 gradient copies, one more per EMA, one each for ``accumulate`` and ``guard``; see `memory_estimate`.

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
        metric: Literal["euclidean", "optimizer"] = "euclidean",
        guard: Literal["update", "measure"] | None = None,
        add: Mapping[str, float] | None = None,
        max_norm: float | None = None,
        ema_dtype: torch.dtype = torch.float32,
        accumulate: bool = False,
    ) -> None:
        super().__init__(base)
        self._rule = rules.by_name(rule) if isinstance(rule, str) else rule
        self.objectives = tuple(objectives)
        if isinstance(objectives, str) or not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives: expected distinct names, the rectified one first, found {objectives!r}")
        if not callable(self._rule):
            raise ValueError(f"rule: expected a function of the Gram matrix or its name, found {rule!r}")
        self._elementwise = elementwise.is_elementwise(self._rule)
        if metric not in ("euclidean", "optimizer"):
            raise ValueError(f"metric: expected 'euclidean' or 'optimizer', found {metric!r}")
        if guard not in (None, "update", "measure"):
            raise ValueError(f"guard: expected None, 'update' or 'measure', found {guard!r}")
        if max_norm is not None and not max_norm > 0.0:
            raise ValueError(f"max_norm: expected a positive number, found {max_norm}")
        if not ema_dtype.is_floating_point:
            raise ValueError(f"ema_dtype: expected a floating-point type, found {ema_dtype}")
        protected = self.objectives[1:]
        decays = ema_decay if isinstance(ema_decay, Mapping) else dict.fromkeys(protected, ema_decay)
        for option, names in (("ema_decay", decays), ("add", add or {})):
            if unknown := set(names) - set(protected):
                raise ValueError(f"{option}: expected protected objectives, {list(protected)}, found {sorted(unknown)}")
        self._ema = EMA({name: decay for name, decay in decays.items() if decay is not None}, ema_dtype)
        self._add = [(add or {}).get(name, 0.0) for name in self.objectives]
        self._scope: Scope = scope
        self.record_scope: Scope | None = record_scope
        self._metric, self._guard, self._max_norm, self._accumulate = metric, guard, max_norm, accumulate
        if metric == "optimizer":
            check_metric(base)
        if isinstance(self._rule, type):
            raise ValueError(
                f"rule: expected a function of the Gram matrix, found the class {self._rule.__name__}; construct it"
            )
        low = {p.dtype for p in self._parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
        if guard == "update" and low:
            warnings.warn(
                f"guard='update': expected float32 parameters, found {', '.join(map(str, low))}, whose rounding swallows the correction of "
                "a small step; keep float32 weights and use autocast (bf16-mixed). record.actual_change says what was achieved",
                stacklevel=2,
            )
        blocks(scope, self.param_groups)
        if record_scope is not None:
            blocks(record_scope, self.param_groups, option="record_scope")
        if self._elementwise:
            self._check_elementwise(rule)
        refuse(base, self._parameters())

    def _check_elementwise(self, rule: object) -> None:
        for option, found, only in (("scope", self._scope, "global"), ("metric", self._metric, "euclidean")):
            if found != only:
                raise ValueError(
                    f"{option}: expected {only!r} with an elementwise rule, which decides coordinate by coordinate and asks for no Gram "
                    f"matrix, found {found!r} with {getattr(rule, '__name__', rule)!r}; drop {option}, or use a rule of gradsurgery.rules"
                )
        self._rule([[] for _ in self.objectives])  # a wrong option shows on rows of no parameters too

    def _restart(self) -> None:
        super()._restart()
        # Everything that changes while training lives in objects that are changed in place: Lightning calls methods on a
        # proxy, and an attribute that a method rebinds there would never reach this object.
        self._window = Window()
        self._ranks = Ranks()

    # One step --------------------------------------------------------------------------------------------------------------------

    @property
    def record(self) -> Record | None:
        """The latest `combine`'s record, or None before the first."""
        return self._window.record

    def objective(self, name: str) -> AbstractContextManager[None]:
        """Everything that ``backward()`` writes to ``.grad`` inside this context is the row called ``name``.

        Several backward passes, also in several contexts, add up as ``.grad`` does.

        Args:
            name: One of the objectives.

        Raises:
            ValueError: If there is no such objective.
            RuntimeError: If the row cannot be trusted (see `Slots.capture` in `gradsurgery.optimizer.capture`), or ranks enter
                different objectives; everything else is untouched.
        """
        if name not in self.objectives:
            raise ValueError(f"objective: expected one of {list(self.objectives)}, found {name!r}")
        parameters = self._parameters()

        def agree(problem: str | None) -> None:
            # Inside DDP's no_sync() no rank waits for another, and each may have its own number of micro-batches.
            if problem is not None or self._ranks.synchronising(parameters):
                self._ranks.agree(self.objectives.index(name), problem, parameters)

        return self._window.slots.capture(name, parameters, accumulate=self._accumulate, agree=agree)

    # Two signatures, so that a type checker does not take the values of join(**losses) for retain_graph.
    @overload
    def join(self, **losses: Tensor) -> Tensor: ...
    @overload
    def join(self, *, retain_graph: bool, **losses: Tensor) -> Tensor: ...
    def join(self, *, retain_graph: Any = False, **losses: Tensor) -> Tensor:
        """One scalar, the sum of the losses, whose single ``backward()`` captures every row and combines them.

        Args:
            retain_graph: Keep the graphs until the last of the inner backward passes: needed when the losses share one forward pass.
            **losses: One 0-dim loss for each objective, by name.

        Returns:
            0-dim float32 tensor (float64 where a loss is). The gradient that reaches it (a GradScaler's scale, Lightning's and
            Hugging Face's 1 / number of micro-batches) scales every row.

        Raises:
            ValueError: If an objective is missing or unknown, or a loss is not a single number.
            RuntimeError: If a loss does not depend on any parameter, under DDP with ``static_graph``, or for FSDP1; its backward raises as
                `objective` and `combine` do.

        Cost: the graphs of all losses are alive at once (contexts hold one at a time).
        """

        def capture(name: str, loss: Tensor, gradient: Tensor, keep: bool) -> None:
            self._ranks.prepare(loss, self._parameters())
            with self.objective(name):
                torch.autograd.backward(loss, gradient, retain_graph=keep)

        def finish(gradient: Tensor) -> None:
            slots = self._window.slots
            slots.joins += 1
            # Inside DDP's no_sync() the rows are this rank's own; they are reduced, and combined, with the last micro-batch. The incoming
            # gradient is loss scale / micro-batches, so that scale times the micro-batches so far leaves rows that are means.
            if self._ranks.synchronising(self._parameters()):
                self.combine(scale=gradient * slots.joins)

        return join(self.objectives, losses, Backward(capture, finish, retain_graph))

    @torch.no_grad()
    def combine(self, *, scale: float | Tensor | None = None) -> Record:
        """Combine the rows and write the update to ``.grad``. `step` and join's backward call it; clipping and GradScaler read ``.grad``.

        Args:
            scale: Loss scale of the rows (``scaler.get_scale()``), so that averages, the record and ``max_norm`` are in unscaled units.
                With a GradScaler and contexts it must be given; nothing here can see the scaler.

        Returns:
            The step's record. Calling it again without new rows changes nothing.

        Raises:
            RuntimeError: If an objective is missing, ``.grad`` holds a gradient that belongs to none, or ranks disagree; nothing is
                changed. A non-finite Gram matrix does not raise here: it leaves NaN in ``.grad``, where a GradScaler finds it, and
                `step` raises.

        Cost: reads every row once, writes one; no temporaries (an elementwise rule makes a new row, and is measured by one more pass).
        """
        window, parameters = self._window, self._parameters()
        if window.slots.phase is Phase.COMBINED and window.record is not None:
            return window.record
        self._ranks.agree(len(self.objectives), window.slots.combining(self.objectives, parameters), parameters)
        scale = 1.0 if scale is None else scale
        if not self._accumulate:  # rows that will grow must stay what they are
            kept = {name for name, multiple in zip(self.objectives, self._add, strict=True) if multiple}
            rows_to_fold = {name: window.slots.rows[name] for name in self._ema.decays if name not in kept}
            self._ema.fold(rows_to_fold, window.slots.folded, scale, parameters)
        raw = [
            row + [None] * (len(parameters) - len(row)) for row in map(window.slots.rows.get, self.objectives) if row
        ]
        rows = Rows(
            mixing=self._ema.mixing(self.objectives, raw, window.slots.folded, parameters),
            scale=scale,
            blocks=blocks(self._scope, self.param_groups),
            parameters=parameters,
            metric=optimizer_metric(self._base, parameters) if self._metric == "optimizer" else None,
            recorded=None
            if self.record_scope is None
            else blocks(self.record_scope, self.param_groups, option="record_scope"),
        )
        written, update, recorded = self._by_coordinates(rows) if self._elementwise else self._by_gram(rows)
        one = rows.blocks.names is None
        coefficients = update.coefficients
        window.record = Record(
            objectives=self.objectives,
            gram=update.gram[0] if one else update.gram,
            coefficients=coefficients[0] if one and coefficients is not None else coefficients,
            predicted_change=-update.change,
            update_norm=update.norm,
            blocks=rows.blocks.names,
            block_gram=recorded,
            block_names=None if rows.recorded is None else rows.recorded.names or ("global",),
        )
        window.combined = Combined(update.amounts.isfinite().all(), update.healthy, rows)
        for parameter, gradient in zip(parameters, written, strict=True):
            parameter.grad = gradient
        if not self._accumulate:
            window.slots.rows.clear()
            if not self._ema.decays and self._guard is None:
                rows.mixing.rows.clear()  # nobody reads the protected rows again: free them before the base's step
        window.slots.phase = Phase.COMBINED
        return window.record

    def _by_gram(self, rows: Rows) -> tuple[list[Tensor | None], Update, Tensor | None]:
        """The update in the rows' scale, in the memory of the first row unless that will grow; what was decided; what is recorded."""
        products, gram, recorded = measure(rows)
        self._ranks.check(gram, rows.parameters)
        averaged = [name in self._ema.decays for name in self.objectives]
        update = decide(rows, products, gram, self._rule, add=self._add, averaged=averaged, max_norm=self._max_norm)
        lists = rows.mixing.rows
        first = [None if tensor is None else tensor.clone() for tensor in lists[0]] if self._accumulate else lists[0]
        amounts = rows.mixing.scaled(update.amounts, rows.scale)
        return combine_blocks_([first, *lists[1:]], amounts, blocks=rows.blocks.of_parameter), update, recorded

    def _by_coordinates(self, rows: Rows) -> tuple[list[Tensor | None], Update, Tensor | None]:
        """As `_by_gram`, in new memory."""
        made = with_update(rows, self._rule)
        products, gram, recorded = measure(made)
        try:
            self._ranks.check(gram, rows.parameters)
        except RuntimeError as error:
            error.add_note(
                "A rule that draws at random, such as graddrop, needs a generator with the same seed on every rank."
            )
            raise
        update = decide_by_coordinates(made, products, gram, add=self._add, max_norm=self._max_norm)
        used = [0, *(k + 1 for k, multiple in enumerate(self._add) if multiple)]
        amounts = made.mixing.scaled(update.amounts, rows.scale)
        written = combine_blocks_([made.mixing.rows[b] for b in used], torch.stack([amounts[:, b] for b in used], 1))
        # Nobody reads the first row again: free it before the base's step.
        rows.mixing.rows[0] = [None] * len(rows.parameters)
        return written, update, None if recorded is None else recorded[:, 1:, 1:]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Combine what is not combined, step the base, guard the change, and commit the averages.

        Args:
            closure: Called once, with gradients enabled, before anything else.

        Returns:
            The closure's value, or None.

        Raises:
            FloatingPointError: If a row, and so the Gram matrix, is not finite: parameters, base state and averages are as before, and
                `zero_grad` recovers.
            RuntimeError: If no objective, or not all of them, ran since the last step. With every learning rate 0 and no objective it
                passes through to the base instead (`torch.distributed.checkpoint` initialises optimizers so).
        """
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        window = self._window
        parameters = self._parameters()
        if not window.slots.rows and window.slots.phase is not Phase.COMBINED:
            if closure is not None and value is None:
                return None  # Lightning: training_step returned None to skip this batch
            rates = [group.get("lr") for group in self.param_groups]
            if all(rate is not None and float(rate) == 0.0 for rate in rates):
                self._base.step()
                self._ema.start(parameters)
                return value
            problem = (
                f"step: expected a backward pass for each of {list(self.objectives)} since the last step, found none; run them inside "
                "optimizer.objective(name), or call backward() on optimizer.join(...)"
            )
            self._ranks.agree(len(self.objectives), problem, parameters)
        record = self.combine()
        combined = window.combined
        if combined is None:
            raise RuntimeError("step: expected rows that combine() left, found none; call zero_grad() and start again")
        self._check_finite(combined)
        if all(parameter.grad is None for parameter in parameters):
            raise RuntimeError(
                "step: expected the update in .grad, found none, so something zeroed it after combine(); to drop a batch call "
                "optimizer.zero_grad(), which forgets the rows too (model.zero_grad() does not)"
            )
        rows = combined.rows
        with torch.no_grad():
            before = [None if p.grad is None else p.detach().clone() for p in parameters] if self._guard else []
            self._base.step()
            if self._guard:
                made, left = guard(rows, before, project=self._guard == "update")
                record = replace(record, actual_change=left, unguarded_change=made)
            if self._ema.decays:
                self._ema.commit(self.objectives, rows.mixing, rows.scale, parameters)
        if isinstance(self._rule, rules.StatefulRule):
            self._rule.commit()
        window.record = replace(record, applied=True)
        window.clear(Phase.CLOSED)
        return value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``.grad`` and every row; ``model.zero_grad()`` knows nothing of rows that are not in ``.grad``."""
        self._base.zero_grad(set_to_none)
        # Zeroed tensors may stay in .grad: they are spent, not stray.
        self._window.clear(Phase.OPEN if set_to_none else Phase.CLOSED)

    def _check_finite(self, combined: Combined) -> None:
        if bool(combined.finite):
            return
        ill = [name for name, healthy in zip(self.objectives, combined.healthy.tolist(), strict=True) if not healthy]
        found = (
            f"a NaN or inf in the gradient of {' and '.join(map(repr, ill))}"
            if ill
            else "finite rows but a non-finite rule or average"
        )
        raise FloatingPointError(
            f"step: expected finite rows, found {found}; nothing was stepped and zero_grad() recovers. Look at that loss, lower the "
            "learning rate, or use a GradScaler with fp16"
        )

    # Saving ----------------------------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        rule = getattr(self._rule, "__name__", repr(self._rule))
        return f"{type(self).__name__}({self._base!r}, rule={rule}, objectives={self.objectives}, ema_decay={self._ema.decays})"

    def __getstate__(self) -> dict[str, Any]:
        # Rows belong to a moment, and what is known of the wrappers to a process.
        return {key: value for key, value in super().__getstate__().items() if key not in ("_window", "_ranks")}

    def state_dict(self) -> dict[str, Any]:
        """The base's state_dict with the averages in it.

        Each is a float tensor ``gradsurgery_ema_<objective>`` in the parameter's state. The number of steps behind them, and a stateful
        rule's numbers, are in the parameter groups, where every checkpoint format keeps them.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state_dict = self._ema.save(self._base.state_dict(), self._parameters())
        if isinstance(self._rule, rules.StatefulRule):
            for group in state_dict["param_groups"]:
                group["gradsurgery_rule"] = self._rule.state_dict()
        for hook in self._optimizer_state_dict_post_hooks.values():
            found = hook(self, state_dict)
            state_dict = state_dict if found is None else found
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # the name is torch.distributed.checkpoint's
        """Restore what `state_dict` returned. A plain checkpoint of the base is accepted: averages then start at 0.

        Args:
            state_dict: From `state_dict`; it is not modified.

        Raises:
            ValueError: If it does not fit: other parameter groups, an average of another shape, or averages of objectives that have none
                here. Nothing is changed then.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            found = hook(self, state_dict)
            state_dict = state_dict if found is None else found
        plain, averages = self._ema.split(state_dict, self._parameters())
        rule_state = [group.pop("gradsurgery_rule", None) for group in plain["param_groups"]]
        self._base.load_state_dict(plain)
        self._ema.restore(averages)
        if isinstance(self._rule, rules.StatefulRule) and rule_state and rule_state[0] is not None:
            self._rule.load_state_dict(rule_state[0])
        self._window.clear()
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def memory_estimate(self) -> int:
        """Bytes on this rank that surgery holds at most, besides what a plain step of the base holds at the same time.

        K - 1 rows while backward passes run; one average for each protected row with ``ema_decay``, from the first step on; one row more
        with ``accumulate`` or an elementwise rule, and one copy of the parameters with ``guard``, between `combine` and the end of `step`
        only, when activations are gone. Activations are not counted: contexts hold those of one objective at a time, `join` of all.
        """
        parameters = self._parameters()
        copies = len(self.objectives) - 1 + (self._accumulate or self._elementwise) + (self._guard is not None)
        averages = len(self._ema.decays) * local_bytes(parameters, self._ema.dtype.itemsize)
        return copies * local_bytes(parameters) + averages


class GRU(GradientSurgery):
    """`GradientSurgery` with the defaults of the GRU paper (2503.09117): rule ``gru``, ``ema_decay=0.2``, one Gram matrix for all.

    Args:
        base: Any constructed optimizer.
        **options: As `GradientSurgery`.
    """

    def __init__(self, base: torch.optim.Optimizer, **options: Any) -> None:
        defaults: dict[str, Any] = {"rule": rules.gru, "ema_decay": 0.2}
        super().__init__(base, **defaults | options)
