"""A small Llama, trained from scratch until it has memorised its examples: a model to unlearn on one CPU core."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_modules.data.tokenization import IGNORED, Encoded, collate, encode, padding_id, special_id
from lightning_modules.folder import cache_folder
from lightning_modules.progress import Stage
from lightning_modules.training.warmup import warmup_and_decay

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
VOCABULARY = 4096
FORMAT = 1
"""Raise it when the code below changes what is trained, so that models in old caches are not taken for new ones."""
_BUCKET = 8  # batches that are sorted by length together: enough to save padding, few enough to keep the order random


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
        if not folder.is_dir():
            tokenizer = _train_tokenizer(texts)
            model = _train(pairs, tokenizer, settings, description)
            _save(model, tokenizer, folder)
            if not folder.is_dir():
                return model, tokenizer
        model = LlamaForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def _key(pairs: Sequence[tuple[str, str]], texts: Sequence[str], settings: ScratchSettings) -> str:
    arguments: dict[str, Any] = {"pairs": pairs, "texts": texts, **vars(settings)}
    device = torch.device(arguments.pop("device")).type
    if device != "cpu":
        arguments["device"] = device  # a GPU rounds otherwise
    versions = [".".join(module.__version__.split(".")[:2]) for module in (torch, transformers)]
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
    epochs, batch_size, device = settings.epochs, settings.batch_size, torch.device(settings.device)
    torch.default_generator.manual_seed(settings.seed)  # not torch.manual_seed, which reseeds every GPU as well
    model = LlamaForCausalLM(config).train()  # on the CPU, so that the same seed is the same start everywhere
    torch.nn.Module.to(model, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.01)
    steps = epochs * -(-len(encoded) // batch_size)
    schedule = warmup_and_decay(optimizer, steps)

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{description}: {len(encoded)} examples, {epochs} epochs")
    stage = Stage(description, steps)
    begin, losses = time.perf_counter(), torch.zeros((), device=device)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=steps)
        for batch in _batches(encoded, batch_size, epochs, settings.seed):
            tensors = collate(batch, padding_id(tokenizer))
            loss = _loss(model, {name: tensor.to(device) for name, tensor in tensors.items()})
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses = 0.9 * losses + 0.1 * loss.detach()  # read once, at the end, so that no step waits for a GPU
            bar.advance(task)
            stage.advance()
    console.print(f"{description}: done in {time.perf_counter() - begin:.0f} s, loss {float(losses):.3f}")
    return model.cpu().eval()


def _batches(encoded: Sequence[Encoded], batch_size: int, epochs: int, seed: int) -> Iterator[list[Encoded]]:
    order = random.Random(seed)
    for _ in range(epochs):
        shuffled = order.sample(encoded, len(encoded))
        batches: list[list[Encoded]] = []
        for start in range(0, len(shuffled), _BUCKET * batch_size):
            bucket = sorted(shuffled[start : start + _BUCKET * batch_size], key=lambda example: len(example.input_ids))
            batches += [bucket[first : first + batch_size] for first in range(0, len(bucket), batch_size)]
        order.shuffle(batches)
        yield from batches


def _loss(model: LlamaForCausalLM, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    labels = batch["labels"][:, 1:]
    keep = labels != IGNORED
    # No mask: padding is on the right, where causal attention never looks, and without one a faster kernel is used.
    hidden = model.model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state[:, :-1]
    return cross_entropy(model.lm_head(hidden[keep]), labels[keep])


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the checkpoint beside its place and rename it, so that a crash or a second process leaves no half."""
    partial = folder.with_name(f".partial-{uuid.uuid4().hex}")
    try:
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # otherwise another process was faster, with the same model
            Console(stderr=True).print(f"The small model could not be cached in {folder.parent}: {error}", markup=False)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
