# ruff: noqa: ARG002 (three classes with the same methods, not all of which need all arguments)
"""Where the start model's outputs come from: a second model, the model with its adapters off, or numbers on a disk.

The start model is the model before unlearning. NPO, DPO, UNDIAL, KL divergence and RMU compare the trained model with
it, and call it their reference model. (The reference of `--reference` and of forget quality is another one: a model
that never saw the forget set.)

| | memory | time | losses |
|---|---|---|---|
| `SecondModel` | a second copy of the weights | a forward pass | all |
| `AdapterOff` | none | a forward pass | all but `rmu`; needs adapters that leave the base as it was |
| `Precomputed` | 12 bytes an example | none | those that need a number per sequence: `npo`, `dpo` |
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

import gradsurgery as gs
from lightning_modules.data.tokenization import IGNORED, Encoded, collate
from lightning_modules.evaluation.likelihood import answer_nll, device_of, evaluation_mode
from lightning_modules.files import replacing
from lightning_modules.progress import Stage
from lightning_modules.training.heads import AnswerHead, Batch, States, answer_values
from lightning_modules.training.switching import check_switchable, switched_off


class SecondModel:
    """A frozen model beside the one that is trained: right for every loss, at twice the memory for weights.

    It is not part of the module: no optimizer, checkpoint or strategy sees it.

    Args:
        model: The start model, which is frozen. None copies the model of the `UnlearningModule` when that is made.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = model
        self._copied: nn.Module | None = None
        self._head: AnswerHead | None = None

    def prepare(self, model: nn.Module) -> None:
        """Copy the model if there is no copy yet, and freeze it.

        Args:
            model: The one that is trained.

        Raises:
            ValueError: If the start model is the trained model itself, or a copy of another one.
        """
        if self.model is model:
            raise ValueError(
                "SecondModel: expected another model than the one that is trained; SecondModel() copies it"
            )
        if self._copied is not None and self._copied is not model:
            raise ValueError(
                "SecondModel: expected the model that it is a copy of, found another; make a new SecondModel()"
            )
        if self._head is None:
            if self.model is None:
                self._copied, self.model = model, copy.deepcopy(model)
            self.model.requires_grad_(False).eval()
            self._head = AnswerHead(self.model)

    def hidden(self, head: AnswerHead, batch: Batch, layer: int) -> Tensor:
        """Hidden states after a layer, see `AnswerHead.hidden`."""
        with torch.no_grad():
            return self._on_device(head, batch).hidden(batch, layer)

    def states(self, head: AnswerHead, batch: Batch, *, split: bool) -> States:
        """The start model's states, with a head or as logits.

        Args:
            head: Of the trained model.
            batch: `input_ids` and `attention_mask`, `[B, T]`.
            split: False for logits, so that they can be compared with a trained model that gives logits.
        """
        with torch.no_grad():
            return self._on_device(head, batch).states(batch, split=split)

    def _on_device(self, head: AnswerHead, batch: Batch) -> AnswerHead:
        self.prepare(head.model)
        if self.model is None or self._head is None:
            raise RuntimeError("expected prepare(model) before the first batch")
        if device_of(self.model) != batch["input_ids"].device:
            self.model.to(batch["input_ids"].device)
        if head.packs:
            self._head.pack()
        return self._head

    def nll(self, head: AnswerHead, batch: Batch, skip_first: int, name: str) -> Tensor:
        """Negative log-likelihood of each answer, summed over its tokens, `[B]`."""
        with torch.no_grad():
            return sequence_nll(self.states(head, batch, split=True), batch["labels"], skip_first)


class AdapterOff:
    """The trained model with the adapters that are trained switched off: no second copy, one more forward pass.

    It is the start model where training leaves everything else as it is, and where the adapters changed nothing at the
    start; whatever else would give other numbers is refused. Frozen adapters that are active stay so. A module of
    `modules_to_save` is replaced by the original. There is no dropout. `requires_grad` of every parameter is left as it
    was.

    Adapters that were trained before (B is not 0) change what they are put on: then this is the model without them,
    which is right for going on with a run, and a warning says so.
    """

    def __init__(self) -> None:
        self._kept: list[str] = []
        self._prepared: nn.Module | None = None

    def prepare(self, model: nn.Module) -> None:
        """Refuse a model whose adapters, switched off, do not leave the start model.

        It is asked once: a second training of the same model has the same start model.

        Raises:
            TypeError: If it has no adapters.
            ValueError: If something is trained that is in no adapter, if starting the adapters changed the base weights
                (FILA, PiSSA, OLoRA and the like), or if they are merged.
        """
        if self._prepared is model:
            return
        if not hasattr(model, "disable_adapter"):
            raise TypeError(
                f"AdapterOff: expected a PEFT model with adapters, found {type(model).__name__}; use SecondModel() or Precomputed(path)"
            )
        self._kept, self._prepared = check_switchable(model), model

    def states(self, head: AnswerHead, batch: Batch, *, split: bool) -> States:
        """The base model's states, see `SecondModel.states`."""
        with evaluation_mode(head.model), switched_off(head.model, self._kept):
            return head.states(batch, split=split)

    def nll(self, head: AnswerHead, batch: Batch, skip_first: int, name: str) -> Tensor:
        """Negative log-likelihood of each answer, summed over its tokens, `[B]`."""
        with torch.no_grad():
            return sequence_nll(self.states(head, batch, split=True), batch["labels"], skip_first)


class Precomputed:
    """Log-likelihoods that `precompute` wrote: no second model and no second forward pass.

    They serve losses that need one number per sequence (`npo`, `dpo`). A loss that takes the start model's logits would
    need `[tokens, vocabulary]` numbers.

    Args:
        path: Of the file.

    Raises:
        FileNotFoundError: If there is no such file.
    """

    def __init__(self, path: str | Path) -> None:
        from safetensors.torch import load_file

        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"expected log-likelihoods in {self.path}, found no file; `precompute` writes it")
        self.tensors = load_file(self.path)

    def prepare(self, model: nn.Module) -> None:
        """Do nothing: the file says everything."""

    def states(self, head: AnswerHead, batch: Batch, *, split: bool) -> States:
        """Refuse: the file holds no logits.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "expected a reference that gives logits, found log-likelihoods from a file; use SecondModel() or AdapterOff() with this loss"
        )

    def nll(self, head: AnswerHead, batch: Batch, skip_first: int, name: str) -> Tensor:
        """Negative log-likelihood of each answer, summed over its tokens, `[B]`.

        Args:
            head: Not used.
            batch: With the examples' `index`, `[B]`, as `ForgetRetainDataModule` gives it.
            skip_first: 0.
            name: Of the batch: "forget", "retain" or "refusal".

        Raises:
            ValueError: If the batch has no index, the file is about other examples, or `skip_first` is not 0.
        """
        if skip_first:
            raise ValueError(
                f"skip_first: expected 0 with precomputed log-likelihoods, which are of whole answers, found {skip_first}"
            )
        if "index" not in batch:
            raise ValueError(
                "expected the batch to hold the examples' index, as those of ForgetRetainDataModule do, found none"
            )
        index, found = batch["index"].cpu(), checksums(batch).cpu()
        values, known = self.tensors.get(f"{name}_nll"), self.tensors.get(f"{name}_checksums")
        if values is None or known is None or int(index.max()) >= len(values) or not torch.equal(known[index], found):
            raise ValueError(
                f"expected {self.path} to be about these {name} examples, found others; write it again with `precompute`"
            )
        return values[index].to(batch["labels"].device)


Reference: TypeAlias = SecondModel | AdapterOff | Precomputed


class Examples(Protocol):
    """What `precompute` reads: `lightning_modules.data.order.PairDataset`."""

    forget: Sequence[Encoded]
    retain: Sequence[Encoded]
    refusal: Sequence[Encoded] | None


def precompute(
    model: nn.Module, dataset: Examples, path: str | Path | None, *, pad_token_id: int, batch_size: int = 32
) -> None:
    """Write the log-likelihood of every answer under the start model, for `Precomputed`.

    Args:
        model: The start model.
        dataset: `ForgetRetainDataModule(...).dataset` after `setup()`.
        path: Of the safetensors file to write; 12 bytes an example. None writes nothing: every process runs a model
            whose weights are sharded over them, and one of them writes.
        pad_token_id: Of the tokenizer.
        batch_size: Examples a forward pass.
    """
    from safetensors.torch import save

    splits: Mapping[str, Sequence[Encoded] | None] = {
        "forget": dataset.forget,
        "retain": dataset.retain,
        "refusal": dataset.refusal,
    }
    tensors: dict[str, Tensor] = {}
    stage = Stage("Scoring answers under the start model", sum(len(encoded or ()) for encoded in splits.values()))
    for name, encoded in splits.items():
        if encoded is None:
            continue
        lengths = torch.tensor([sum(label != IGNORED for label in example.labels[1:]) for example in encoded])
        sums = torch.cat([checksums(collate([example], pad_token_id)) for example in encoded])
        means = answer_nll(model, encoded, pad_token_id=pad_token_id, batch_size=batch_size, advance=stage.advance)
        tensors |= {f"{name}_nll": (means * lengths).float(), f"{name}_checksums": sums}
    if path is None:
        return
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(save(tensors))  # save_file has a temporary file of its own


def checksums(batch: Batch) -> Tensor:
    """A number for each row, `[B]` int64, that tells rows with other tokens or labels apart, whatever the padding."""
    mask = batch["attention_mask"].long()
    place = mask.cumsum(1)
    mixed = batch["input_ids"] * 1_000_003 + batch["labels"] * 7_919 + 12_345
    return (mixed * (place * 2_654_435_761 + place.square()) * mask).sum(1)


def sequence_nll(states: States, labels: Tensor, skip_first: int) -> Tensor:
    """Negative log-likelihood of each answer, summed over its tokens, `[B]`."""
    values, _ = answer_values(gs.losses.cross_entropy, states, labels, skip_first=skip_first, again=True)
    return gs.losses.sequence_sum(values, labels, skip_first=skip_first)
