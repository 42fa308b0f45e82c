"""Generates answers in batches, greedily or by sampling."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig

from lightning_modules.data.chat import end_of_turn
from lightning_modules.data.tokenization import padding_id, special_id
from lightning_modules.evaluation.heads import EXACT, agree
from lightning_modules.evaluation.likelihood import device_of, evaluation_mode
from lightning_modules.evaluation.processes import several
from lightning_modules.evaluation.texts import context_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GREEDY: dict[str, Any] = {"do_sample": False}
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_SAMPLED: dict[str, Any] = {"do_sample": True, "top_k": 0}


class Begun(NamedTuple):
    """An answer that may have begun.

    Attributes:
        prompt: the tokens of the prompt, at least one.
        said: the first tokens of the greedy answer, as far as they are known.
        ended: whether these are all.
    """

    prompt: Sequence[int]
    said: Sequence[int] = ()
    ended: bool = False


def generate_greedily(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    advance: Callable[[int], object] = lambda _: None,
) -> list[str]:
    """Continues each prompt with the most likely tokens, as text; see `generate_tokens`, which takes the same.

    Returns:
        The answers, in the order given, without special tokens and surrounding white space.

    Raises:
        ValueError: as `generate_tokens`.
    """
    answers = generate_tokens(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, advance=advance
    )
    return _texts(tokenizer, answers)


def generate_tokens(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    advance: Callable[[int], object] = lambda _: None,
) -> list[list[int]]:
    """Continues each prompt with the most likely token at every step, until eos or the chat template's end of turn.

    Of the checkpoint's generation config only the tokens that end an answer count.
    Prompts are padded on the left under an attention mask and share a key-value cache. Padding changes no answer: where
    it would, as with a model that does not heed the mask (RWKV, MiniMax), each prompt is continued alone. That is tried
    out, but for the shards of one model. An answer also ends where the model's context does; a warning says how many
    prompts leave less than `max_new_tokens`.

    Args:
        model: a causal language model with Hugging Face's `generate`.
        tokenizer: decodes the answers; its eos and the end of turn of its chat template end them.
        prompts: the tokens of each prompt, at least one.
        max_new_tokens: the longest answer, in tokens.
        batch_size: prompts in a batch. They are sorted by length.
        advance: called with the number of prompts done, after every batch.

    Returns:
        The tokens after each prompt, in the order given, without the one that ends them.

    Raises:
        ValueError: if the model has no `generate`, or a prompt fills its context.
    """
    begun = [Begun(prompt) for prompt in prompts]
    return _continued(model, tokenizer, begun, _GREEDY | {"max_new_tokens": max_new_tokens}, batch_size, advance)


def finished_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    begun: Sequence[Begun],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    advance: Callable[[int], object] = lambda _: None,
) -> list[str]:
    """As `generate_greedily`, from answers that have begun; those that have ended cost nothing."""
    decoding = _GREEDY | {"max_new_tokens": max_new_tokens}
    return _texts(tokenizer, _continued(model, tokenizer, begun, decoding, batch_size, advance))


def generate_samples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    sampling: Mapping[str, float] | None = None,
) -> list[str]:
    """As `generate_greedily`, with every token drawn from the whole distribution.

    Args:
        model: a causal language model with Hugging Face's `generate`.
        tokenizer: decodes the answers.
        prompts: the tokens of each prompt, at least one.
        max_new_tokens: the longest answer, in tokens.
        batch_size: prompts in a batch; on it depends which numbers are drawn for which prompt.
        sampling: `temperature` (1 if not given) and `seed` (0). The global random state is left as it was.

    Raises:
        ValueError: as `generate_greedily`.
    """
    given = dict(sampling or {})
    decoding = _SAMPLED | {"temperature": given.get("temperature", 1.0), "max_new_tokens": max_new_tokens}
    device = device_of(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(given.get("seed", 0)))
        begun = [Begun(prompt) for prompt in prompts]
        return _texts(tokenizer, _continued(model, tokenizer, begun, decoding, batch_size, lambda _: None))


@contextmanager
def _without_wishes(model: nn.Module) -> Generator[None]:
    """Takes away what a checkpoint's generation config wishes, but for its special tokens.

    It may ask for sampling, a repetition penalty (Qwen's does) or a least length, which would make the scores of
    different models incomparable. Transformers judges the wishes before it hears what the call asks for instead.
    """
    # Not one by one: every release of Transformers knows further ones. A model may hold another that has its own.
    before: dict[Any, Any] = {
        module: config for module in model.modules() if (config := vars(module).get("generation_config")) is not None
    }
    for module, config in before.items():
        module.generation_config = GenerationConfig(**{name: getattr(config, name, None) for name in _SPECIAL})
    try:
        yield
    finally:
        for module, config in before.items():
            module.generation_config = config


def _continued(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    begun: Sequence[Begun],
    decoding: Mapping[str, Any],
    batch_size: int,
    advance: Callable[[int], object],
) -> list[list[int]]:
    generate: Any = getattr(model, "generate", None)
    if generate is None:
        raise ValueError(
            f"expected a model with a generate() method, found {type(model).__name__}: give a Hugging Face "
            "causal language model, or evaluate with generate=False"
        )
    pad, device = padding_id(tokenizer), device_of(model)
    max_new_tokens = decoding["max_new_tokens"]
    context, room = context_length(model), _room(model, [answer.prompt for answer in begun], max_new_tokens)
    # Processes with shards of one model run every step together, also where rounding ends an answer earlier in one.
    sharded = several() and any(isinstance(parameter, DTensor) for parameter in model.parameters())
    stops = stop_tokens(model, tokenizer)
    answers = [list(answer.said[:tokens]) for answer, tokens in zip(begun, room, strict=True)]
    left = [0 if answer.ended else tokens - len(answer.said) for answer, tokens in zip(begun, room, strict=True)]
    going_on = [index for index in range(len(begun)) if left[index] > 0]
    trial = sorted((begun[index].prompt for index in going_on), key=len)
    fewest = min((room[index] for index in going_on), default=0)
    # Of the processes with shards not every one may have two prompts to try it out with.
    together = _Together(generate, pad, device, trial, fewest, harmless=True if sharded else None)
    with evaluation_mode(model), _without_wishes(model):
        for everything in generation_batches(begun, max_new_tokens, batch_size):
            batch = [index for index in everything if left[index] > 0]
            longest = max((left[index] for index in batch), default=0)
            # All of them together, unless some would run out of the model's context.
            ends = {index: len(begun[index].prompt) + len(answers[index]) + longest for index in batch}
            steps = {
                index: longest if context is None or ends[index] <= context + 1 else left[index] for index in batch
            }
            prompts = {index: [*begun[index].prompt, *answers[index]] for index in batch}
            parts = [[index for index in batch if steps[index] == count] for count in sorted(set(steps.values()))]
            for indices in [rows for part in parts for rows in together.parts(part)]:
                inputs = together.batch([prompts[index] for index in indices])
                width, new_tokens = inputs["input_ids"].shape[1], steps[indices[0]]
                output = generate(
                    **inputs,
                    pad_token_id=pad,
                    eos_token_id=sorted(stops),
                    use_cache=True,
                    synced_gpus=sharded,
                    **{**decoding, "max_new_tokens": new_tokens},
                )
                for index, tokens in zip(indices, output[:, width:].tolist(), strict=True):
                    answers[index] += tokens[: left[index]]
            advance(len(everything))
    return [_until(tokens, stops) for tokens in answers]


class _Together:
    """Puts prompts into a batch, filled up on the left, where that changes no answer.

    Whether it does is tried out as soon as a batch has two: the first two tokens after the shortest prompt of all,
    alone and beside the longest. A recurrent state goes through padding as through a text, whatever the mask says, and
    Transformers' RWKV mixes the states of a batch up.

    Args:
        generate: of the model.
        pad: the token that fills up.
        device: where the model is.
        prompts: all of them, the shortest first.
        steps: the most tokens that may follow each of them.
        harmless: whether it changes none; None tries it out.
    """

    def __init__(
        self,
        generate: Callable[..., Any],
        pad: int,
        device: torch.device,
        prompts: Sequence[Sequence[int]],
        steps: int,
        *,
        harmless: bool | None,
    ) -> None:
        self.generate, self.pad, self.device = generate, pad, device
        self.prompts, self.steps = prompts, steps
        self.harmless = harmless

    def parts(self, indices: Sequence[int]) -> list[list[int]]:
        """The prompts that can share a batch: all of these, or each one alone."""
        if len(indices) > 1 and self.harmless is None:
            self.harmless = self._tried([self.prompts[0], self.prompts[-1]], min(2, self.steps))
        return [list(indices)] if self.harmless else [[index] for index in indices]

    def batch(self, prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Prompts as a batch."""
        width = max(map(len, prompts))
        input_ids = torch.full((len(prompts), width), self.pad)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
            attention_mask[row, width - len(prompt) :] = 1
        return {"input_ids": input_ids.to(self.device), "attention_mask": attention_mask.to(self.device)}

    def _tried(self, pair: Sequence[Sequence[int]], steps: int) -> bool:
        how = _GREEDY | {"max_new_tokens": steps, "pad_token_id": self.pad, "use_cache": True}
        told = {"output_logits": True, "return_dict_in_generate": True}
        try:
            with torch.autocast(self.device.type, enabled=False):
                alone = self.generate(**self.batch(pair[:1]), **how, **told).logits
                beside = self.generate(**self.batch(pair), **how, **told).logits
            return all(
                agree(found[0], expected[0], exact=found.dtype in EXACT)
                for expected, found in zip(alone, beside, strict=False)
            )
        except Exception:  # a way of its own to generate, which tells no logits
            return True


def _texts(tokenizer: PreTrainedTokenizerBase, answers: Iterable[Sequence[int]]) -> list[str]:
    return [str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip() for tokens in answers]


def generation_batches(begun: Sequence[Begun], max_new_tokens: int, batch_size: int) -> list[list[int]]:
    """The places of answers in batches: first those with most tokens to come, at last those that have ended."""
    left = [0 if answer.ended else max_new_tokens - len(answer.said) for answer in begun]
    order = sorted(range(len(begun)), key=lambda index: (left[index], len(begun[index].prompt)), reverse=True)
    going_on = [index for index in order if left[index] > 0]
    ended = order[len(going_on) :]
    batches = [going_on[start : start + batch_size] for start in range(0, len(going_on), batch_size)]
    return [*batches, ended] if ended else batches


def _room(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    """How many tokens can be generated after each prompt: fewer than asked for where the model's context ends."""
    context = context_length(model)
    if context is None:
        return [max_new_tokens] * len(prompts)
    # One more than there are places, because the last token is said and not read.
    room = [min(max_new_tokens, context - len(prompt) + 1) for prompt in prompts]
    if min(room, default=1) < 1:
        raise ValueError(
            f"expected prompts of at most {context} tokens, which is all that the model reads, found one of "
            f"{max(map(len, prompts))}: give a shorter one, so that there is room for an answer"
        )
    short = sum(count < max_new_tokens for count in room)
    if short:
        warnings.warn(
            f"{short} of {len(prompts)} prompts leave room for fewer than max_new_tokens={max_new_tokens} tokens, the least for "
            f"{min(room)}: the model reads no more than {context}, so these answers are generated that far",
            stacklevel=4,
        )
    return room


def stop_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer: eos, the chat template's end of turn, and what the model's configuration adds."""
    # Some chat models (Llama 3, Gemma) end a turn with tokens that only their generation config names.
    configured: int | list[int] | None = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    turn = None
    with suppress(ValueError):  # a template that does not take a question and an answer has made none of the prompts
        turn = end_of_turn(tokenizer)
    known = {special_id(tokenizer, "eos"), turn, *([configured] if isinstance(configured, int) else configured or ())}
    return {token for token in known if token is not None}


def _until(tokens: Iterable[int], stops: set[int]) -> list[int]:
    kept: list[int] = []
    for token in tokens:
        if token in stops:
            break
        kept.append(token)
    return kept
