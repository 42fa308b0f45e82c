r"""Prompt formats by name, for checkpoints that were taught by other people's code, and formats that users write.

| name | before the answer | the answer | source |
|---|---|---|---|
| `auto` | the tokenizer's chat template, or `Q: {question}\nA:` | see `tokenization` | ours |
| `tofu-llama2` | `[INST] {question} [/INST]` | `{answer}` | locuslab/tofu, config/model_config.yaml, llama2-7b |
| `tofu-phi` | `Question: {question}\n` | `Answer: {answer}` | the same: phi, stablelm, pythia-1.4 |
| `open-unlearning` | the chat template with a system turn on 10 Apr 2025 | see below | locuslab/open-unlearning |
| `...{question}...{answer}` | everything up to `{answer}`, without white space at its end | the rest | the user |

What is before the answer has no labels, and a generation starts after it. Prompt and answer are tokenized in one piece
with the special tokens that the tokenizer itself adds, and eos follows unless it is the last token already: as both
repositories do it (`convert_raw_data_to_model_format` in data_module.py, `preprocess_chat_instance` in
src/data/utils.py). In `tofu-phi` the model learns to say "Answer:" too. TOFU's llama2-7b is also open-unlearning's
Llama-2-7b-chat-hf.

`open-unlearning` renders `[system "You are a helpful assistant.", question, answer]` by the tokenizer's template, with
`date_string` 10 Apr 2025 where the template reads it (configs/model/Llama-3.*-Instruct.yaml). Everything that the
template writes after the invitation to answer is a label, a line break after the end of turn too. Their gemma has no
system turn: it is left out where the template refuses one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from lightning_modules.data.chat import (
    Message,
    conversation_text,
    has_template,
    prompt_text,
    reads,
    set_template_options,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO, OPEN_UNLEARNING = "auto", "open-unlearning"
SYSTEM, DAY = "You are a helpful assistant.", "10 Apr 2025"
_FORMAT = "prompt_format"  # the attribute of a tokenizer that holds its format
_QUESTION, _ANSWER = "{question}", "{answer}"


class Rendered(NamedTuple):
    """An example as text.

    Attributes:
        prompt: what is before the answer.
        whole: prompt and answer; without an answer the prompt.
        special: whether the tokenizer adds its special tokens, because they are not in the text.
    """

    prompt: str
    whole: str
    special: bool


class PromptFormat(Protocol):
    """From a question to text."""

    def __call__(self, tokenizer: PreTrainedTokenizerBase, question: str, answer: str | None) -> Rendered:
        """The example as text; without an answer, its prompt."""
        ...


class Written(NamedTuple):
    """A format that is written down: what is before the answer, with {question}, and what is said, with {answer}."""

    before: str
    said: str

    def __call__(self, tokenizer: PreTrainedTokenizerBase, question: str, answer: str | None) -> Rendered:  # noqa: ARG002 (another format renders by it)
        """As the protocol says."""
        prompt = self.before.replace(_QUESTION, question)
        return Rendered(prompt, prompt if answer is None else prompt + self.said.replace(_ANSWER, answer), special=True)


def by_chat(tokenizer: PreTrainedTokenizerBase, question: str, answer: str | None) -> Rendered:
    """The format `open-unlearning`."""
    turns: list[Message] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    try:
        prompt = prompt_text(tokenizer, turns)
    except ValueError:  # Gemma's refuses a system turn, and open-unlearning gives it none
        del turns[0]
        prompt = prompt_text(tokenizer, turns)
    if answer is None:
        return Rendered(prompt, prompt, special=False)
    whole = conversation_text(tokenizer, [*turns, {"role": "assistant", "content": answer}])
    return Rendered(prompt, whole, special=False)


FORMATS: dict[str, PromptFormat] = {
    "tofu-llama2": Written("[INST] {question} [/INST]", "{answer}"),
    "tofu-phi": Written("Question: {question}\n", "Answer: {answer}"),
    OPEN_UNLEARNING: by_chat,
}
"""The formats with a name, besides `auto`."""


def format_by_name(name: str) -> PromptFormat | None:
    r"""The format of this name, or the one that it writes down; None for `auto`.

    Raises:
        ValueError: if it is no name, and does not have {question} and then {answer}, each once.

    Example:
        >>> format_by_name("User: {question}\nBot: {answer}")
        Written(before='User: {question}\nBot:', said=' {answer}')
    """
    if name == AUTO:
        return None
    if name in FORMATS:
        return FORMATS[name]
    if written := [sign for sign in (r"\n", r"\t") if sign in name]:
        raise ValueError(
            f"--prompt-format: expected a line break as such, found a backslash and a letter, {written[0]}: in bash write $'...' in "
            "place of '...', in a file of options \"...\""
        )
    before, found, after = name.partition(_ANSWER)
    if not found or before.count(_QUESTION) != 1 or _QUESTION in after or _ANSWER in after:
        raise ValueError(
            f"--prompt-format: expected {AUTO}, {', '.join(FORMATS)}, or a text with {_QUESTION} and after it {_ANSWER}, each once, found "
            f"{name!r:.200}"
        )
    kept = before if before.endswith(_QUESTION) else before.rstrip()
    return Written(kept, before[len(kept) :] + _ANSWER + after)


def set_format(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None, name: str = AUTO) -> None:
    """Sets how this tokenizer writes questions and answers from now on, in training, scoring and generation alike.

    Args:
        tokenizer: its attributes are set; they are not saved with it.
        options: of its chat template, see `chat.set_template_options`.
        name: see `format_by_name`.

    Raises:
        ValueError: as these two; if the format needs a chat template and there is none, or leaves one that has options
            unused.
    """
    form, given = format_by_name(name), dict(options or {})
    if isinstance(form, Written) and given:
        raise ValueError(
            f"--chat-template-kwargs: expected a format that uses the chat template, found --prompt-format {name!r:.80}, which does "
            "not; leave one of them out"
        )
    if form is by_chat:
        if not has_template(tokenizer):
            raise ValueError(
                f"--prompt-format {name}: expected a tokenizer with a chat template, found none; give another format"
            )
        if reads(tokenizer, "date_string"):
            given = {"date_string": DAY} | given
    set_template_options(tokenizer, given)
    setattr(tokenizer, _FORMAT, form)


def format_of(tokenizer: PreTrainedTokenizerBase) -> PromptFormat | None:
    """Returns the format that `set_format` set; None for `auto`."""
    return getattr(tokenizer, _FORMAT, None)


def single_question(question: str | Sequence[Message]) -> str:
    """Returns the question.

    Raises:
        ValueError: if it is a conversation of several turns, for which these formats say nothing.
    """
    if isinstance(question, str):
        return question
    if len(question) == 1 and question[0].get("role") == "user":
        return str(question[0]["content"])
    raise ValueError(
        f"--prompt-format: expected single questions, for which it says how they are written, found a conversation of {len(question)} "
        "turns before the answer; use auto, or give question and answer alone"
    )
