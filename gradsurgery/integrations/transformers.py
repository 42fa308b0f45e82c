"""Hugging Face's Trainer, and TRL's trainers on top of it: a mixin that keeps the objectives' gradients apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradsurgery.integrations.accelerate import unwrap
from gradsurgery.integrations.pairs import PairedDataset, collate, is_pair
from gradsurgery.losses import TokenLoss, answer_tokens, ceu
from gradsurgery.optimizer.gru import GRU
from gradsurgery.optimizer.surgery import GradientSurgery

_Trainer: Any = object  # the user's class brings the Trainer; this module imports torch alone


class SurgeryTrainerMixin(_Trainer):
    """Makes an unlearning trainer of `transformers.Trainer`, or of one built on it such as TRL's `SFTTrainer`.

    Put it first among the bases. Give ``train_dataset`` one dataset for each objective; everything else is the
    trainer's own: its arguments, collator, samplers, accumulation, clipping, bf16, fp16, DDP, schedulers, evaluation,
    checkpoints and resuming. The averages are in the optimizer's state, so that a resumed run is the uninterrupted one.

    In a training step the objectives follow each other, the protected ones first: forward, backward, and the next, so
    that one graph is alive at a time. Each objective's row is the gradient of what the trainer would minimise if that
    objective were alone: a mean over the tokens of all micro-batches of a step, on all processes, where the model takes
    ``num_items_in_batch``, and otherwise the mean over its micro-batches. Every objective is divided by its own number
    of tokens.

    The losses by default: CE-U (`gradsurgery.losses.ceu`) for the first objective, and for the others what the
    trainer computes itself, the cross-entropy of the labels. Another loss per token is one argument; for any other
    kind override `objective_loss`.

    Logged beside the trainer's ``loss``, which is the sum over the objectives: ``loss_<objective>``, ``cosine``,
    ``conflict`` and ``coefficient_<objective>`` of the latest step.

    Args:
        *args: As the trainer's.
        train_dataset: A dataset for each objective (see `gradsurgery.integrations.pairs.PairedDataset`: an epoch is
            one pass over the longest), or one dataset whose examples are ``{"forget": example, "retain": example}``
            (with TRL: a dataset for each). Examples and batches of one objective are what the trainer takes otherwise.
        surgery: Base optimizer -> `GradientSurgery`. Bind options by `functools.partial`: ``partial(gs.GRU,
            guard="update")``. It is not called if ``optimizers`` brings a `GradientSurgery`.
        losses: By objective: a loss per token, logits ``[N, V]`` and labels ``[N]`` -> ``[N]``, or None for the
            trainer's own loss. Objectives that are not named keep the default.
        **kwargs: As the trainer's. Evaluation takes ordinary datasets: ``eval_dataset={"forget": ..., "retain": ...}``
            logs both losses.

    Attributes:
        step_losses: The losses of the latest step on this process, by objective.

    Raises:
        TypeError: If a dataset is a stream, whose length is not known.
        ValueError: If a dataset is empty, a loss is not a function, or the names of the datasets or of ``losses`` are
            not the optimizer's objectives (the last when training starts).
        RuntimeError: Under DeepSpeed, FSDP and `torch.nn.DataParallel`.

    Cost: the backward passes of all objectives, and what `GradientSurgery` holds.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
        >>> class Unlearn(SurgeryTrainerMixin, Trainer):
        ...     pass
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> rows = [{"input_ids": [i, i + 1, 1], "labels": [-100, i + 1, 1]} for i in range(6)]
        >>> trainer = Unlearn(
        ...     LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)),
        ...     TrainingArguments(tempfile.mkdtemp(), report_to="none", disable_tqdm=True, use_cpu=True),
        ...     train_dataset={"forget": rows[:2], "retain": rows[2:]},
        ... )
        >>> steps = trainer.train().global_step  # doctest: +ELLIPSIS
        {'train_runtime': ...
        >>> steps, trainer.surgery.record.applied
        (3, True)
    """

    def __init__(
        self,
        *args: Any,
        train_dataset: Any = None,
        surgery: Callable[[torch.optim.Optimizer], GradientSurgery] = GRU,
        losses: Mapping[str, TokenLoss | None] | None = None,
        **kwargs: Any,
    ) -> None:
        self.make_surgery = surgery
        self.token_losses = dict(losses or {})
        if wrong := [name for name, loss in self.token_losses.items() if loss is not None and not callable(loss)]:
            raise ValueError(
                f"losses: expected a function of logits and labels, or None, found another value for {wrong}"
            )
        self.step_losses: dict[str, Tensor] = {}
        self._objective: str | None = None
        self._within_window = False
        # Refused before the trainer does its long work.
        several = PairedDataset(train_dataset).datasets if isinstance(train_dataset, Mapping) else {}
        # TRL's trainer tokenizes the dataset that it is given, so it is given one of them; the others follow.
        super().__init__(*args, train_dataset=next(iter(several.values()), train_dataset), **kwargs)
        self._refuse_engines()
        if several:
            first, *others = several
            prepared = {name: self._prepared(name, several[name], kwargs.get("formatting_func")) for name in others}
            self.train_dataset = PairedDataset({first: self.train_dataset, **prepared})

    @property
    def surgery(self) -> GradientSurgery:
        """The optimizer, once training has created it; its ``record`` is that of the latest step.

        Raises:
            TypeError: Before that.
        """
        optimizer = getattr(self, "optimizer", None)
        if optimizer is None:
            raise TypeError("surgery: expected an optimizer, found none; it is created when training starts")
        return unwrap(optimizer)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The trainer's optimizer, wrapped by ``surgery``. The trainer calls it when training starts."""
        base = super().create_optimizer(*args, **kwargs)
        try:
            surgery = unwrap(base)  # the user's own, or that of an earlier call of train()
        except TypeError:
            names = {id(parameter): name for name, parameter in self.model.named_parameters()}
            for group in base.param_groups:  # a scope by layers goes by the names
                group.setdefault("param_names", [names.get(id(parameter), "") for parameter in group["params"]])
            self.optimizer = surgery = self.make_surgery(base)
        surgery.zero_grad()  # rows of a training that was stopped within a window
        self._within_window = False
        datasets = self.train_dataset.datasets if isinstance(self.train_dataset, PairedDataset) else None
        self._check_names("train_dataset", set(surgery.objectives if datasets is None else datasets))
        self._check_names("losses", set(surgery.objectives) | set(self.token_losses))
        return self.optimizer

    # Data ------------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        """The trainer's loader, with batches ``{"forget": batch, "retain": batch}``."""
        each = self._get_collator_with_removed_columns(self.data_collator, description="training")
        given = self.data_collator, self.args.remove_unused_columns
        self.data_collator, self.args.remove_unused_columns = partial(collate, each), False
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator, self.args.remove_unused_columns = given

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The trainer's own.

        Raises:
            ValueError: If the examples are pairs, which the trainer's evaluation does not know.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        if hasattr(dataset, "__len__") and len(dataset) and is_pair(dataset[0]):
            raise ValueError(
                "eval_dataset: expected ordinary examples, found one for each objective; pass a dataset for each, "
                'eval_dataset={"forget": ..., "retain": ...}'
            )
        return super().get_eval_dataloader(eval_dataset)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The batches of a step, and for each objective the number of its tokens in them."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        self._check_names("train_dataset", set(batches[0]))
        counts = {
            name: super(SurgeryTrainerMixin, self).get_batch_samples(
                iter([batch[name] for batch in batches]), len(batches), device
            )[1]
            for name in self.surgery.objectives
        }
        return batches, counts

    # A step ----------------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The trainer's own training step for each objective, inside that objective, and `combine` after the last.

        Args:
            model: The trainer's.
            inputs: A batch for each objective.
            num_items_in_batch: The number of tokens of each objective in all batches of the step, from
                `get_batch_samples`.

        Returns:
            The sum of the losses.
        """
        surgery, counts = self.surgery, num_items_in_batch or {}
        before = self.step_losses if self._within_window else {}
        found: dict[str, Tensor] = {}
        for name in (*surgery.objectives[1:], surgery.objectives[0]):
            self._objective = name
            try:
                with surgery.objective(name):
                    found[name] = super().training_step(model, inputs[name], counts.get(name))
            finally:
                self._objective = None
        self.step_losses = {name: loss + before.get(name, 0.0) for name, loss in found.items()}
        self._within_window = not self.accelerator.sync_gradients
        if self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler
            # What the scaler makes of 1 is its scale, and stays on the device.
            surgery.combine(scale=None if scaler is None else scaler.scale(torch.ones((), device=self.args.device)))
        return torch.stack([loss.float() for loss in found.values()]).sum()

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """In training the loss of the objective whose turn it is; in evaluation the trainer's own."""
        if self._objective is not None:
            return self.objective_loss(self._objective, model, inputs, num_items_in_batch)
        return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)

    def objective_loss(self, name: str, model: nn.Module, inputs: Any, num_items_in_batch: Any) -> Tensor:
        """One objective's loss of one micro-batch, to be minimised. Override it for losses that are not per token.

        Args:
            name: The objective.
            model: To be called (under DDP it is the wrapper).
            inputs: The objective's batch, on the device.
            num_items_in_batch: The number of its tokens in all micro-batches of the step on all processes: return
                their sum divided by it, times the number of processes (`mean_over_step` does). None: return the mean
                of this batch; the trainer divides it by the number of micro-batches.

        Returns:
            0-dim.
        """
        loss = self.token_losses.get(name, ceu if name == self.surgery.objectives[0] else None)
        if loss is None:
            return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        outputs = model(**{key: value for key, value in inputs.items() if key != "labels"})
        logits, labels = answer_tokens(outputs.logits, inputs["labels"])
        return self.mean_over_step(loss(logits, labels), num_items_in_batch)

    def mean_over_step(self, values: Tensor, num_items_in_batch: Any) -> Tensor:
        """The mean of one micro-batch's values per token, such that the micro-batches of a step add up to their mean.

        Args:
            values: ``[N]``.
            num_items_in_batch: As in `objective_loss`.

        Returns:
            0-dim; 0 where there is no token.
        """
        if num_items_in_batch is None or getattr(self, "loss_is_scaled_for_ga", None) is False:
            return values.sum() / max(len(values), 1)
        # DDP takes the mean over the processes, and the number is theirs together.
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        number = num_items_in_batch  # a tensor is not read
        return values.sum() / (number.clamp_min(1) if isinstance(number, Tensor) else max(number, 1)) * processes

    # What is logged and counted --------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add what the latest step's record says to the trainer's own line."""
        if "loss" in logs and self.step_losses and (record := self.surgery.record) is not None:
            logs |= {f"loss_{name}": float(loss) for name, loss in self.step_losses.items()}
            if len(record.objectives) > 1:
                logs |= {"cosine": float(record.cosines[..., 0, 1].mean()), "conflict": float(record.conflict)}
            if record.coefficients is not None:
                found = record.coefficients.reshape(-1, len(record.objectives)).mean(0).tolist()
                logs |= {f"coefficient_{name}": value for name, value in zip(record.objectives, found, strict=True)}
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self, inputs: Any) -> int:
        """Those of all objectives."""
        return sum(super(SurgeryTrainerMixin, self).floating_point_ops(batch) for batch in inputs.values())

    def _track_num_input_tokens(self, inputs: Any) -> None:
        for batch in inputs.values():
            super()._track_num_input_tokens(batch)

    # Checks ----------------------------------------------------------------------------------------------------------

    def _prepared(self, name: str, dataset: Any, formatting_func: Any) -> Any:
        """As TRL's trainers prepare (tokenize, truncate, pack) the dataset that they are given; others do not."""
        prepare: Callable[..., Any] | None = getattr(self, "_prepare_dataset", None)
        if prepare is None or getattr(self, "_skip_prepare_dataset", False):
            return dataset
        return prepare(dataset, self.processing_class, self.args, self.args.packing, formatting_func, name)

    def _check_names(self, what: str, found: set[str]) -> None:
        expected = self.surgery.objectives
        if found != set(expected):
            raise ValueError(f"{what}: expected one for each of the objectives {list(expected)}, found {sorted(found)}")

    def _refuse_engines(self) -> None:
        found = {
            "DeepSpeed, which reduces and steps gradients by itself": self.is_deepspeed_enabled,
            "FSDP, which nobody has tested under this trainer": self.is_fsdp_enabled,
            "several GPUs in one process (torch.nn.DataParallel)": self.args.n_gpu > 1,
        }
        for engine, present in found.items():
            if present:
                raise RuntimeError(
                    f"SurgeryTrainerMixin: expected one process for each device, alone or under DDP, found {engine}; start it "
                    "with torchrun or accelerate launch"
                )
