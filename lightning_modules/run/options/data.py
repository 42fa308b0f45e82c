"""Which model forgets what, how it is scored, and where the result goes: options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning_modules.data.formats import AUTO, format_by_name
from lightning_modules.data.published import MUSECorpus, WMDPSubject
from lightning_modules.run.options.flat import at_least_one, flag, not_negative
from lightning_modules.run.options.precision import AUTOCAST, EXACT

TOFUSplit = Literal["forget01", "forget05", "forget10"]

BENCHMARKS = {"tofu": "forget10", "muse": "news", "wmdp": "cyber"}
"""The options that name a benchmark, each with a value of it; <name>_dir is the folder with its files."""


AUTHORS = 10
"""How many authors a model learns where --authors does not say it. Earlier versions wrote it into every config.yaml."""


@dataclass(frozen=True)
class ModelOptions:
    """The model that is to forget.

    Attributes:
        model: folder, hub name or .gguf file of a causal language model, or of an adapter; 'scratch' trains a small
            Llama first (and caches it)
    """

    model: str = "scratch"

    @property
    def scratch(self) -> bool:
        """Whether the model is the small Llama that is trained first."""
        return self.model == "scratch"


@dataclass(frozen=True)
class DataOptions:
    """What is to be forgotten and what is to be kept.

    Attributes:
        authors: authors that the model from scratch learns, or with --finetune-first and --tofu any other; 200 are all,
            10 the default; with --tofu and a ready model, those that it was taught, all if not given
        forget_authors: so many of them, the last ones, are to be forgotten; a fifth if not given
        forget: examples to forget: JSON, JSON lines, CSV or Parquet (question/answer, prompt/response, messages, text)
        retain: examples to keep
        requests: YAML file of several deletion requests, one `name: file of examples` a line, in place of --forget: one
            run forgets all of them, and with unlearn --ledger one entry says of each whether it did
        retain_heldout: file of examples to keep that are never trained on, and that the model has learned as it has
            those of --retain; what is left of them tells whether the rest is kept
        tofu: forget this split of TOFU
        heldout_authors: the same without files: so many of the authors to keep, the last ones, are never trained on,
            and scored as retain_heldout
        tofu_dir: folder with TOFU's files; from the hub if not given
        muse: forget this corpus of MUSE, in pieces of --max-length tokens, and score what MUSE scores
        muse_dir: folder with MUSE's files (raw/forget.json, knowmem/forget_qa.json, ...); from the hub if not given
        wmdp: forget texts about this subject of WMDP, and score its multiple-choice questions and MMLU's; the texts of
            bio are given by --forget, and --retain replaces wikitext
        wmdp_dir: folder with WMDP's files (wmdp-cyber/test, cyber-forget-corpus, mmlu/all/test and
            wikitext-2-raw-v1/test); from the hub if not given
        holdout: examples that neither the model nor the reference has seen, of the kind to forget: attacks on
            membership are scored with them; nothing is trained on them; a file, or with --tofu also a split of TOFU,
            holdout10
        max_length: tokens an example; longer ones lose their end
        chat_template_kwargs: variables of the tokenizer's chat template, for example {date_string: 1 Jan 2025} or
            {enable_thinking: false}; {strftime_now: 2025-01-01} is what a template is told that asks for today's date
        prompt_format: how questions and answers are written: auto (the tokenizer's chat template, or Q: and A:), as
            published checkpoints were taught (tofu-llama2, tofu-phi, open-unlearning), or a text with {question} and,
            after it, {answer}
    """

    authors: int | None = None
    forget_authors: int | None = None
    forget: str | None = None
    retain: str | None = None
    requests: str | None = None
    retain_heldout: str | None = None
    heldout_authors: int = 0
    tofu: TOFUSplit | None = None
    tofu_dir: str | None = None
    muse: MUSECorpus | None = None
    muse_dir: str | None = None
    wmdp: WMDPSubject | None = None
    wmdp_dir: str | None = None
    holdout: str | None = None
    max_length: int = 512
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    prompt_format: str = AUTO

    @property
    def cuts_texts(self) -> bool:
        """Whether the data are a benchmark's long texts, which are cut into pieces of the model's tokens."""
        return self.muse is not None or self.wmdp is not None

    @property
    def benchmark(self) -> str | None:
        """The option that names a benchmark; None without one."""
        return next((name for name in BENCHMARKS if getattr(self, name) is not None), None)

    @property
    def from_files(self) -> bool:
        """Whether what is to be forgotten is given as files of examples."""
        return self.forget is not None or self.requests is not None

    def check(self) -> None:
        """Raise ValueError on options outside their domain, or that contradict each other."""
        self._check_requests()
        files = (self.from_files, self.retain is not None)
        if any(files) and not all(files) and self.wmdp is None:
            raise ValueError("expected --forget and --retain together, found only one of them")
        if any(files) and self.tofu is not None:
            raise ValueError("expected either --forget and --retain, or --tofu, found both")
        if any(files) and self.muse is not None:
            raise ValueError("expected either --forget and --retain, or --muse, found both")
        given = [flag(name) for name in BENCHMARKS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"expected one of {', '.join(map(flag, BENCHMARKS))}, found {' and '.join(given)}")
        for name, example in BENCHMARKS.items():
            if getattr(self, f"{name}_dir") is not None and getattr(self, name) is None:
                raise ValueError(
                    f"expected {flag(name)} with {flag(f'{name}_dir')}, for example {flag(name)} {example}"
                )
        if self.retain_heldout is not None and not all(files):
            raise ValueError(
                "expected --forget and --retain with --retain-heldout, found none; without files, --heldout-authors says how many are "
                "held out"
            )
        if self.heldout_authors and any(files):
            raise ValueError(
                f"expected --retain-heldout with --forget and --retain, found --heldout-authors {self.heldout_authors}: files say nothing "
                "of authors"
            )
        if self.cuts_texts and (self.retain_heldout is not None or self.heldout_authors):
            raise ValueError(
                "--retain-heldout, --heldout-authors: expected --forget and --retain, --tofu or fictional authors, found --muse or --wmdp, "
                "of which nothing is held out; leave them out"
            )
        at_least_one(self, "max_length", "authors")
        not_negative(self, "heldout_authors")
        format_by_name(self.prompt_format)
        authors = AUTHORS if self.authors is None else self.authors
        if self.forget_authors is not None and not 1 <= self.forget_authors < authors:
            raise ValueError(f"expected 1 <= --forget-authors < --authors, {authors}, found {self.forget_authors}")

    def check_scratch(self) -> None:
        """Raise ValueError on what the model from scratch cannot be asked or told."""
        if self.cuts_texts:
            raise ValueError(
                f"{flag(str(self.benchmark))}: expected --model, a pre-trained model, found the model from scratch, which knows nothing "
                "that it asks about"
            )
        if self.prompt_format != AUTO:
            raise ValueError(
                f"--prompt-format: expected --model, which was taught so, found {self.prompt_format!r:.80} with the model from "
                "scratch, which learns one format; leave it out"
            )
        if self.chat_template_kwargs:
            raise ValueError(
                "--chat-template-kwargs: expected --model with a chat template, found the model from scratch, which has none; leave it out"
            )

    def check_authors(self, *, chosen: bool, typed: bool) -> None:
        """Raise ValueError if --authors or --forget-authors would be without effect.

        Args:
            chosen: Whether they choose the examples.
            typed: Whether --authors is on the command line, where `AUTHORS` is as wrong as any other number.
        """
        if chosen:
            return
        if self.forget_authors is not None:
            raise ValueError(
                "--forget-authors: expected a model from scratch, or --finetune-first, or --authors with --tofu, and no --forget, which "
                "says what is to be forgotten; leave it out"
            )
        if self.authors is not None and (typed or self.authors != AUTHORS):
            raise ValueError(
                f"--authors: expected a model from scratch, or --tofu, whose examples it chooses, found {self.authors} with none of them; "
                "leave it out"
            )

    def _check_requests(self) -> None:
        if self.requests is None:
            return
        others = ("forget", *BENCHMARKS)
        if given := [flag(name) for name in others if getattr(self, name) is not None]:
            raise ValueError(
                f"expected either --requests or {given[0]}, which says what is to be forgotten, found both"
            )
        if self.retain is None:
            raise ValueError("expected --requests and --retain together, found only --requests")


@dataclass(frozen=True)
class EvaluationOptions:
    """How much is scored, and what a model that never saw the forget set scores.

    Attributes:
        max_new_tokens: tokens a generated answer
        evaluation_examples: examples of each split to score, the first ones
        evaluation_batch_size: texts a forward pass when scoring, and answers generated together
        evaluation_batch_tokens: tokens a forward pass when scoring, padding counted, in place of that many texts; not
            for the tasks of --muse and --wmdp
        evaluation_precision: the precision of the scores before and after, and of a reference model's, by Lightning's
            name; bf16-mixed computes products in bfloat16, which takes less time on a machine that is made for it:
            probabilities have two or three digits, and some generated answers are others; the curve, the target and
            the probes are in float32 all the same; give it to evaluate too where its scores are compared with a run's
        reference: a model that never saw the forget set (folder or hub name), or its evaluation.jsonl; for 'scratch' it
            is trained
        reference_cache: keep the scores of a reference model and of the one before unlearning, and use them again;
            false scores both anew
    """

    max_new_tokens: int = 64
    evaluation_examples: int = 400
    evaluation_batch_size: int = 32
    evaluation_batch_tokens: int | None = None
    evaluation_precision: str = EXACT
    reference: str | None = None
    reference_cache: bool = True

    def check(self) -> None:
        """Raise ValueError on options outside their domain."""
        at_least_one(self, "max_new_tokens", "evaluation_examples", "evaluation_batch_size", "evaluation_batch_tokens")
        if self.evaluation_precision not in (EXACT, AUTOCAST):
            raise ValueError(
                f"--evaluation-precision: expected {EXACT} or {AUTOCAST}, found {self.evaluation_precision!r:.80}; float16 ends at "
                "65504, which activations of language models may pass, and weights keep the type that --dtype says"
            )

    @property
    def autocast(self) -> bool:
        """Whether scores are computed under autocast to bfloat16."""
        return self.evaluation_precision == AUTOCAST


@dataclass(frozen=True)
class OutputOptions:
    """What tells a run from another of the same configuration: its seed and its folder.

    Attributes:
        seed: of the data's order, of new adapters, and of the model from scratch where there is one
        output: folder for everything that the run leaves
    """

    seed: int = 0
    output: str = "runs/unlearn"

    def check(self) -> None:
        """Raise ValueError on a seed that the generators of random numbers do not take, or without a folder."""
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"expected --seed between 0 and {2**32 - 1}, found {self.seed}")
        if not self.output.strip() or "\0" in self.output:
            raise ValueError(f"--output: expected the name of a folder, found {self.output!r}")

    @property
    def folder(self) -> Path:
        """The folder that is called `output`."""
        return Path(self.output)


@dataclass(frozen=True)
class EvaluateOutputOptions(OutputOptions):
    """What `evaluate` leaves.

    Attributes:
        output: folder for metrics.json
        log: write evaluation.jsonl too, the scores of every example, which can be a later run's --reference
    """

    output: str = "runs/evaluate"
    log: bool = False
