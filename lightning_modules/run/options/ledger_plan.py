"""What `gradsurgery ledger plan` is told: a model, the requests that wait, and what is to be kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_modules.data.formats import AUTO, format_by_name
from lightning_modules.run.options.flat import Flat, at_least_one, flag
from lightning_modules.run.options.loading import LoadingOptions


@dataclass(frozen=True)
class WaitingOptions:
    """Requests that wait.

    Attributes:
        model: folder, hub name or .gguf file of the causal language model that is to forget them
        requests: YAML file of them, one `name: file of rows` a line; files as of unlearn --forget
        retain: examples to keep; 64 of them, evenly spaced, stand for all
        output: folder for plan.json and plan.png; nothing is written without it
        max_length: tokens an example; longer ones lose their end
        batch_size: examples a forward and backward pass
        chat_template_kwargs: variables of the tokenizer's chat template, as of unlearn
        prompt_format: how questions and answers are written, as of unlearn
    """

    model: str | None = None
    requests: str | None = None
    retain: str | None = None
    output: str | None = None
    max_length: int = 512
    batch_size: int = 8
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    prompt_format: str = AUTO

    def check(self) -> None:
        """Raise ValueError on options that are missing or outside their domain."""
        missing = [flag(name) for name in ("model", "requests", "retain") if getattr(self, name) is None]
        if missing:
            raise ValueError(f"ledger plan: expected --model, --requests and --retain, found no {', '.join(missing)}")
        if self.output is not None and (not self.output.strip() or "\0" in self.output):
            raise ValueError(f"--output: expected the name of a folder, found {self.output!r}")
        at_least_one(self, "max_length", "batch_size")
        format_by_name(self.prompt_format)


@dataclass(frozen=True)
class LedgerPlanOptions(Flat):
    """Estimate which deletion requests are cheap to forget in one run, from their gradients at the model as it is."""

    waiting: WaitingOptions = field(default_factory=WaitingOptions)
    loading: LoadingOptions = field(default_factory=LoadingOptions)

    def check(self) -> None:
        """Raise ValueError on options that are missing or outside their domain."""
        self.waiting.check()
        self.loading.check()
