"""Whether a model, its tokenizer and the examples fit together: asked once, before anything takes long."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_modules.data.examples import Example
from lightning_modules.data.tasks import CONTINUATION, TASK, apart, prefix_ids
from lightning_modules.data.tokenization import encode, encode_example, padding_id, shortened

_SHOWN = 3  # names of tensors in a message


def check_config(name: str, config: Any) -> None:
    """Refuse the configuration of a model that does not predict the next token from those before it.

    Transformers makes a causal model of an encoder's weights without a word. Every token of it sees the whole text.

    Raises:
        ValueError: If it is an encoder, or has an encoder and a decoder.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})  # its own code, which was trusted
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not own:
        raise ValueError(
            f"expected a causal language model, found {name!r} of the type {config.model_type}, which is none: give a model that "
            "continues a text"
        )
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if masked and getattr(config, "is_decoder", True) is False:
        raise ValueError(
            f"expected a causal language model, found the encoder {name!r} ({config.model_type}), whose tokens see those after "
            "them: give a model that generates text"
        )


def check_tokenizer(name: str, tokenizer: Any) -> None:
    """Refuse a tokenizer with which no example can be written.

    Raises:
        ValueError: If it has no eos token, or its chat template cannot be rendered.
    """
    if getattr(tokenizer, "chat_template", None):
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "Who?"}], add_generation_prompt=True)
        except Exception as error:  # whatever a template of somebody else's does wrong, the advice is the same
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(
                f"{name!r}: expected a chat template that renders a question, found one that fails ({said}): mend chat_template"
            ) from error
    encode(tokenizer, "Who?", "He.")  # raises where there is no eos token
    padding_id(tokenizer)


def check_examples(
    tokenizer: Any, splits: Mapping[str, Sequence[Example]], max_length: int, config: Any = None
) -> None:
    """Refuse examples that the model cannot read.

    Args:
        tokenizer: Of the model.
        splits: The examples, by split.
        max_length: Where they are cut off.
        config: Of the model; None where it is not known, and then neither context nor vocabulary are compared.

    Raises:
        ValueError: If nothing is left of an answer, an example is longer than the model's context, or has a token that
            is not in the model's vocabulary; if a benchmark's prompt leaves no room for what is generated after it. The
            message names split and example.
    """
    text = None if config is None else config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or math.inf
    vocabulary = getattr(text, "vocab_size", None) or math.inf
    usual, tasks = apart(splits)
    _check_prompts(tokenizer, tasks, context)
    for split, rows in usual.items():
        for number, row in enumerate(rows, start=1):
            expected = ""
            try:
                whole = encode_example(tokenizer, row)
                expected = "expected a question that leaves room for its answer: "
                ids = shortened(whole, max_length, row["question"] or row["answer"]).input_ids
            except ValueError as error:
                raise ValueError(f"{split}, example {number}: {expected}{error}") from error
            if len(ids) > context:
                raise ValueError(
                    f"{split}, example {number}: expected at most the {context} tokens of the model's context, found {len(ids)} in "
                    f"{row['answer']!r:.80}: use --max-length {context}, or a model with a longer context"
                )
            if max(ids) >= vocabulary:
                token = tokenizer.convert_ids_to_tokens([max(ids)])[0]
                raise ValueError(
                    f"{split}, example {number}: expected tokens of the model's vocabulary of {vocabulary}, found {token!r}, number "
                    f"{max(ids)}: the tokenizer is another model's, or the embeddings were not resized to it"
                )
    if padding_id(tokenizer) >= vocabulary:
        raise ValueError(
            f"expected a pad token in the model's vocabulary of {vocabulary}, found number {padding_id(tokenizer)}: resize the "
            "embeddings, or let pad_token be the eos token"
        )


def _check_prompts(tokenizer: Any, tasks: Mapping[str, Sequence[Example]], context: float) -> None:
    for split, rows in tasks.items():
        for number, row in enumerate(rows, start=1):
            if row[TASK] != CONTINUATION:
                continue  # questions and texts that are too long are cut, as their authors do, with a warning
            room = row["max_new_tokens"]
            needed = len(prefix_ids(tokenizer, row["prompt"])) + room
            if needed > context:
                raise ValueError(
                    f"{split}, example {number}: expected a prompt that leaves room for {room} tokens in the model's context of {context}, "
                    f"found one that needs {needed} with them: give a model with a longer context"
                )


def check_weights(name: str, model: nn.Module, found: Mapping[str, Any]) -> None:
    """Refuse a model whose weights are not all there: it would unlearn something that was never learned.

    Args:
        name: Of the model, for the message.
        model: As it was loaded.
        found: What Transformers says about the loading.

    Raises:
        ValueError: If tensors are missing, have other shapes, are on the meta device, or are not finite.
    """
    expected = f"{name!r}: expected the weights of {type(model).__name__}, as its config.json describes it, found"
    if mismatched := sorted(found.get("mismatched_keys", ()), key=str):
        key, there, wanted = mismatched[0]
        raise ValueError(
            f"{expected} {len(mismatched)} tensors of another shape: {key} is {list(there)} and not {list(wanted)}; give the folder of "
            "one model"
        )
    if missing := sorted(found.get("missing_keys", ())):
        raise ValueError(
            f"{expected} {_few(missing)} missing, which Transformers fills at random: give a model with all its weights"
        )
    if meta := [key for key, weight in model.named_parameters() if weight.is_meta]:
        raise ValueError(f"{expected} {_few(meta)} on the meta device, without numbers: load it on a device")
    floating = ((key, weight) for key, weight in model.named_parameters() if weight.is_floating_point())
    if broken := [key for key, weight in floating if not math.isfinite(float(weight.detach().sum()))]:
        raise ValueError(f"{expected} NaN or infinity in {_few(broken)}: the file is damaged, or training diverged")


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
