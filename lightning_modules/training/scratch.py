"""A small Llama, trained from scratch until it has memorised its examples: a model to unlearn on one CPU core."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import gradsurgery as gs
from lightning_modules.data.tokenization import encode, padding_id, special_id
from lightning_modules.files import replacing
from lightning_modules.folder import cache_folder
from lightning_modules.progress import Stage
from lightning_modules.training.finetuning import FinetuningDataModule, FinetuningSettings, taught_alone

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
VOCABULARY = 4096
FORMAT = 1
"""Raise it when the code below changes what is trained, so that models in old caches are not taken for new ones."""


@dataclass(frozen=True)
class ScratchSettings:
    """How large the small model is, and how it is trained.

    Attributes:
        hidden_size: Width of the model, a multiple of `2 * num_heads`.
        num_layers: Depth of the model.
        num_heads: Attention heads.
        epochs: Passes over the examples.
        batch_size: Examples a step.
        lr: Highest learning rate.
        seed: Of the first weights and of the order of the batches.
        device: Where it is trained. A model of 100 M parameters wants a GPU.
    """

    hidden_size: int = 192
    num_layers: int = 2
    num_heads: int = 4
    epochs: int = 25
    batch_size: int = 8
    lr: float = 2e-3
    seed: int = 0
    device: str | torch.device = "cpu"

    def check(self) -> None:
        """Refuse what cannot be trained.

        Raises:
            ValueError: If the learning rate or a size is not positive, or the sizes do not fit together.
        """
        hidden_size, num_layers, num_heads = self.hidden_size, self.num_layers, self.num_heads
        epochs, batch_size = self.epochs, self.batch_size
        if not self.lr > 0.0:
            raise ValueError(f"expected lr > 0, found {self.lr}")
        if min(hidden_size, num_layers, num_heads, epochs, batch_size) < 1 or hidden_size % (2 * num_heads):
            raise ValueError(
                "expected positive sizes, and hidden_size a multiple of 2 * num_heads (rotary embeddings turn pairs); "
                f"found {hidden_size=}, {num_layers=}, {num_heads=}, {epochs=}, {batch_size=}"
            )


def scratch_model(
    examples: Sequence[Mapping[str, Any]],
    settings: ScratchSettings = ScratchSettings(),
    *,
    tokenizer_texts: Sequence[str] | None = None,
    cache_dir: str | Path | None = None,
    description: str = "Training the small model from scratch",
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Returns a small Llama that has memorised `examples`, and its tokenizer; from the cache if it was trained before.

    The default is the cheapest that memorises 200 TOFU questions: 1.7 M parameters, about 40 s on one core, mean answer
    probability .99, every answer generated word for word. It is wide and shallow because that trains fastest on a CPU,
    and its head is applied to answer tokens only. It is trained by AdamW with betas .9 and .98, a learning rate with
    warm-up and linear decay, and gradients clipped to norm 1. The caller's random number generators are left as they
    were.

    Args:
        examples: With `question` and `answer`; an empty question is plain text.
        settings: Of the model and its training.
        tokenizer_texts: What the byte-level BPE (at most 4096 tokens) is trained on; None: the examples. Give more text
            to share a tokenizer between models.
        cache_dir: Holds one Hugging Face checkpoint for each set of arguments; None:
            `$XDG_CACHE_HOME/gradsurgery/scratch`.
        description: What the progress bar says, or, without a terminal, the first line of text.

    Returns:
        The model, in eval mode and on the CPU wherever it was trained, and the tokenizer.

    Raises:
        ValueError: If there are no examples, the learning rate is not positive, or the sizes do not fit together.
    """
    if not examples:
        raise ValueError("expected at least one example to memorise, found none")
    settings.check()
    pairs = [(str(row["question"]), str(row["answer"])) for row in examples]
    texts = list(tokenizer_texts) if tokenizer_texts is not None else [f"Q: {q}\nA: {a}" for q, a in pairs]
    root = cache_folder("scratch") if cache_dir is None else Path(cache_dir)
    folder = root / _key(pairs, texts, settings)
    # Making and loading a model both draw random weights. They use the CPU's generator, so only that one is forked.
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), one_thread(), _without_progress_bars():
        known = _load(folder)
        if known is not None:
            return known
        tokenizer = _train_tokenizer(texts)
        model = _train(pairs, tokenizer, settings, description)
        known = _load(folder)  # another process may have been faster, and read its own now
        if known is None:
            _save(model, tokenizer, folder)
            known = _load(folder)
        return known or (model, tokenizer)


def _key(pairs: Sequence[tuple[str, str]], texts: Sequence[str], settings: ScratchSettings) -> str:
    arguments: dict[str, Any] = {"pairs": pairs, "texts": texts, **vars(settings)}
    device = torch.device(arguments.pop("device")).type
    if device != "cpu":
        arguments["device"] = device  # a GPU rounds otherwise
    versions = [str(module.__version__) for module in (gs, torch, transformers)]
    text = json.dumps([FORMAT, VOCABULARY, versions, arguments], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte, so that no text is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )


def _train(
    pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, settings: ScratchSettings, description: str
) -> LlamaForCausalLM:
    encoded = [encode(tokenizer, question, answer) for question, answer in pairs]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=max(int(2.67 * settings.hidden_size) // 16 * 16, 16),
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        max_position_embeddings=max(2048, *(len(example.input_ids) for example in encoded)),
        tie_word_embeddings=True,
        pad_token_id=special_id(tokenizer, "pad"),
        bos_token_id=special_id(tokenizer, "bos"),
        eos_token_id=special_id(tokenizer, "eos"),
    )
    torch.default_generator.manual_seed(settings.seed)  # not torch.manual_seed, which reseeds every GPU as well
    model = LlamaForCausalLM(config)  # on the CPU, so that the same seed is the same start everywhere
    teaching = FinetuningSettings(
        epochs=settings.epochs, batch_size=settings.batch_size, lr=settings.lr, seed=settings.seed
    )
    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{description}: {len(encoded)} examples, {settings.epochs} epochs")
    begin, bar = time.perf_counter(), _Bar(description, console)
    data = FinetuningDataModule(encoded, padding_id(tokenizer), teaching)
    taught_alone(model, data, teaching, device=torch.device(settings.device), callbacks=[bar])
    console.print(f"{description}: done in {time.perf_counter() - begin:.0f} s, loss {float(bar.loss):.3f}")
    return model.cpu().eval()


class _Bar(Callback):
    """A progress bar in a terminal, lines in a log, and a moving mean of the loss."""

    def __init__(self, description: str, console: Console) -> None:
        self.description, self.loss = description, torch.zeros(())
        self._bar = Progress(console=console, transient=True, disable=not console.is_terminal)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count."""
        steps = int(trainer.estimated_stepping_batches)
        self._stage, self.loss = Stage(self.description, steps), self.loss.to(pl_module.device)
        self._task = self._bar.add_task(self.description, total=steps)
        self._bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:  # noqa: ARG002 (Lightning's signature)
        """Count a step; the loss is read once, at the end, so that no step waits for a GPU."""
        self.loss = 0.9 * self.loss + 0.1 * outputs["loss"].detach()
        self._bar.advance(self._task)
        self._stage.advance()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:  # noqa: ARG002 (the same)
        """Take the bar away, also after an error."""
        self._bar.stop()


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Cache the checkpoint, whole or not at all; a second process may have cached the same one meanwhile."""
    try:
        with replacing(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except OSError as error:
        if not folder.is_dir():  # otherwise another process was faster, with the same model
            Console(stderr=True).print(f"The small model could not be cached: {error}", markup=False)


def _load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast] | None:
    """What is cached; None if there is nothing, or nothing whole, which is then trained again and replaced."""
    if not folder.is_dir():
        return None
    try:
        model = LlamaForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a damaged file makes of its readers
        Console(stderr=True).print(f"{folder} is damaged and is made again: {error}", markup=False)
        return None


@contextmanager
def one_thread() -> Generator[None]:
    """Lets the block use one thread: steps are so small that more gain little, and on a busy machine they wait.

    Two threads on two cores that others use too took 20 times as long (5 s became 70 to 114 s). One thread also makes
    the weights independent of the number of threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _without_progress_bars() -> Generator[None]:
    """Keeps Transformers from drawing progress bars for files that take a millisecond."""
    enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers.utils.logging.enable_progress_bar()
