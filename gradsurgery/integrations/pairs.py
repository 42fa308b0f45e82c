"""Several datasets as one, whose examples hold one of each: samplers, shards and resuming understand that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset


class PairedDataset(Dataset[dict[str, Any]]):
    """Examples ``{"forget": example, "retain": example}`` from one dataset for each objective.

    Entry i holds example ``i % len(dataset)`` of each, and the length is that of the longest: an epoch sees all of the
    longest dataset once, and the others as often as they fit in. The sampler decides the order of the entries.

    Args:
        datasets: By objective; each with a length and examples by index (lists and `datasets.Dataset` are).

    Raises:
        TypeError: If one of them has no length (a stream).
        ValueError: If there is none, or one is empty.

    Example:
        >>> pairs = PairedDataset({"forget": ["a", "b"], "retain": ["x", "y", "z"]})
        >>> len(pairs), pairs[2]
        (3, {'forget': 'a', 'retain': 'z'})
    """

    def __init__(self, datasets: Mapping[str, Any]) -> None:
        for name, dataset in datasets.items():
            if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
                raise TypeError(
                    f"{name}: expected a dataset with a length and examples by index, found {type(dataset).__name__}; zip streams "
                    f"yourself into one that yields {_shape(datasets)}"
                )
            if not len(dataset):
                raise ValueError(f"{name}: expected at least one example, found none")
        if not datasets:
            raise ValueError("train_dataset: expected a dataset for each objective, found none")
        self.datasets = dict(datasets)

    def __len__(self) -> int:
        """The number of examples of the longest dataset."""
        return max(len(dataset) for dataset in self.datasets.values())

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One example of each."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return {name: dataset[index % len(self) % len(dataset)] for name, dataset in self.datasets.items()}


def collate(collator: Callable[[list[Any]], Any], examples: Sequence[Any]) -> dict[str, Any]:
    """A batch for each objective, each made by the collator from that objective's examples.

    Args:
        collator: Examples of one objective -> a batch. If the examples are not ``{"forget": example, ...}``, it gets
            them as they are and makes ``{"forget": batch, ...}`` of them itself.
        examples: Of a dataset of pairs, as `PairedDataset` or one of the user's own.

    Raises:
        ValueError: If what comes out is not a batch for each objective.
    """
    first = examples[0]
    if is_pair(first):
        return {name: collator([example[name] for example in examples]) for name in first}
    found = collator(list(examples))
    if not is_pair(found):
        keys = list(found) if isinstance(found, Mapping) else type(found).__name__
        raise ValueError(
            f'train_dataset: expected a batch for each objective, found {keys}; pass train_dataset={{"forget": dataset, "retain": '
            'dataset}, or a dataset whose examples are {"forget": example, "retain": example}'
        )
    return found


def is_pair(value: Any) -> bool:
    """Whether this is an example, or a batch, for each objective."""
    return isinstance(value, Mapping) and bool(value) and all(isinstance(entry, Mapping) for entry in value.values())


def _shape(names: Mapping[str, Any]) -> str:
    return "{" + ", ".join(f'"{name}": example' for name in names) + "}"
