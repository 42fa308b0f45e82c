"""A small Llama, trained from scratch until it has memorised its examples: something to unlearn on one CPU core."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
VOCABULARY = 4096
FORMAT = 1  # raise it when the code below changes what is trained, so that old caches are left alone
_LAST_SHARE_OF_LR = 0.02  # of the highest
_BUCKET = 8  # batches that are sorted by length together: enough to save padding, few enough to keep the order random


def scratch_model(
    examples: Sequence[Mapping[str, Any]],
    *,
    tokenizer_texts: Sequence[str] | None = None,
    seed: int = 0,
    hidden_size: int = 192,
    num_layers: int = 2,
    num_heads: int = 4,
    epochs: int = 25,
    batch_size: int = 8,
    lr: float = 2e-3,
    device: str | torch.device = "cpu",
    cache_dir: str | Path | None = None,
    description: str = "Training the small model from scratch",
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Returns a small Llama that has memorised `examples`, and its tokenizer; from the cache if it was trained before.

    The default is the cheapest that memorises 200 TOFU questions: 1.7 M parameters, about 40 s on one core, mean answer
    probability .99, every answer generated word for word. AdamW with betas .9 and .98, a learning rate with warm-up
    and linear decay, gradients clipped to norm 1. It is wide and shallow because that trains fastest on a CPU, and its
    head is applied to answer tokens only. The caller's random number generators are left as they were.

    Args:
        examples: with `question` and `answer`; an empty question is plain text.
        tokenizer_texts: what the byte-level BPE (at most 4096 tokens) is trained on; the examples by default. Give more
            text to share a tokenizer between models.
        seed: of the weights and of the order of the batches.
        hidden_size: width of the model.
        num_layers: depth of the model.
        num_heads: attention heads; they divide `hidden_size`.
        epochs: passes over the examples.
        batch_size: examples a step.
        lr: highest learning rate.
        device: where it is trained; a model of 100 M parameters wants a GPU. It is returned on the CPU, wherever that was.
        cache_dir: holds one Hugging Face checkpoint for each set of arguments; `$XDG_CACHE_HOME/gradsurgery/scratch` by
            default.
        description: what the progress bar, or without a terminal the first line of text, says.

    Raises:
        ValueError: if there are no examples, or the sizes do not fit together.
    """
    if not examples:
        raise ValueError("expected at least one example to memorise, found none")
    if not lr > 0.0:
        raise ValueError(f"expected lr > 0, found {lr}")
    if min(hidden_size, num_layers, num_heads, epochs, batch_size) < 1 or hidden_size % (2 * num_heads):
        raise ValueError(
            "expected positive sizes, and hidden_size a multiple of 2 * num_heads (rotary embeddings turn pairs); "
            f"found {hidden_size=}, {num_layers=}, {num_heads=}, {epochs=}, {batch_size=}"
        )
    pairs = [(str(row["question"]), str(row["answer"])) for row in examples]
    texts = list(tokenizer_texts) if tokenizer_texts is not None else [f"Q: {q}\nA: {a}" for q, a in pairs]
    sizes = {"hidden_size": hidden_size, "num_layers": num_layers, "num_heads": num_heads}
    schedule = {"epochs": epochs, "batch_size": batch_size, "seed": seed}
    device = torch.device(device)
    where = {} if device.type == "cpu" else {"device": device.type}  # a GPU rounds otherwise
    root = cache_folder("scratch") if cache_dir is None else Path(cache_dir)
    folder = root / _key({"pairs": pairs, "texts": texts, **sizes, **schedule, "lr": lr, **where})
    # Making and loading a model both draw random weights; only the CPU's generator is used, and only that one is
    # forked.
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), one_thread(), _without_progress_bars():
        if not folder.is_dir():
            tokenizer = _train_tokenizer(texts)
            model = _train(pairs, tokenizer, lr=lr, device=device, description=description, **sizes, **schedule)
            _save(model, tokenizer, folder)
            if not folder.is_dir():
                return model, tokenizer
        model = LlamaForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def _key(arguments: Mapping[str, object]) -> str:
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
    pairs: Sequence[tuple[str, str]],
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    device: torch.device,
    description: str,
) -> LlamaForCausalLM:
    encoded = [encode(tokenizer, question, answer) for question, answer in pairs]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=max(int(2.67 * hidden_size) // 16 * 16, 16),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=max(2048, *(len(example.input_ids) for example in encoded)),
        tie_word_embeddings=True,
        pad_token_id=special_id(tokenizer, "pad"),
        bos_token_id=special_id(tokenizer, "bos"),
        eos_token_id=special_id(tokenizer, "eos"),
    )
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which reseeds every GPU as well
    model = LlamaForCausalLM(config).train()  # on the CPU, so that the same seed is the same start everywhere
    torch.nn.Module.to(model, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    steps = epochs * -(-len(encoded) // batch_size)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share_of_lr(step, steps))

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"{description}: {len(encoded)} examples, {epochs} epochs")
    begin, losses = time.perf_counter(), torch.zeros((), device=device)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=steps)
        for batch in _batches(encoded, batch_size, epochs, seed):
            tensors = collate(batch, padding_id(tokenizer))
            loss = _loss(model, {name: tensor.to(device) for name, tensor in tensors.items()})
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            losses = 0.9 * losses + 0.1 * loss.detach()  # a number is asked for once, so that a GPU is not waited for
            bar.advance(task)
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
    # Padding is on the right, where causal attention never looks: without a mask the faster kernel is used.
    hidden = model.model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state[:, :-1]
    return cross_entropy(model.lm_head(hidden[keep]), labels[keep])


def _share_of_lr(step: int, steps: int) -> float:
    warm_up = max(1, min(100, steps // 10))
    if step < warm_up:
        return (step + 1) / warm_up
    left = (steps - step) / max(1, steps - warm_up)
    return max(_LAST_SHARE_OF_LR, left)


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the checkpoint beside its place and renames it: a crash or a second process leaves no half of one."""
    partial = folder.with_name(f".partial-{uuid.uuid4().hex}")
    try:
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was faster, with the same model
            Console(stderr=True).print(f"The small model could not be cached in {folder.parent}: {error}")
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def one_thread() -> Generator[None]:
    """Trains on one core: a step is so small that threads gain little, and on a busy machine they wait for each other.

    Two threads on two cores that others use too took 20 times as long (5 s became 70 to 114 s). It also makes the weights
    independent of the number of threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _without_progress_bars() -> Generator[None]:
    """Keeps Transformers from drawing bars for files that take a millisecond."""
    enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers.utils.logging.enable_progress_bar()
