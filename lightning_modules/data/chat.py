r"""Conversations by a tokenizer's chat template: what the assistant says in them, and where it ends its turns.

The whole conversation is rendered, and what the assistant says is taken out of it by its place:

- it begins where the rendering of the turns before it ends, with the template's own invitation to answer
  (`add_generation_prompt`), so that training and scoring start where generation starts;
- it ends with the token by which the template ends a turn (`<|im_end|>`, `<end_of_turn>`, `<|eot_id|>`, `</s>`), which
  is often not the tokenizer's eos. What the template writes after that (a line break) nobody has to say.

A template that ends a turn with nothing but white space gets the tokenizer's eos there, because an answer without an
end would never stop.

Options of the template, such as `{"enable_thinking": False}`, stand on the tokenizer beside the template, see
`set_template_options`: training, scoring and generation read them there and cannot disagree. A template that asks for
today's date (`strftime_now`) is told `DATE`, whatever the day: tokens are a function of the data alone.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
"""A turn of a conversation: `{"role": ..., "content": text}`."""

DATE = date(2024, 7, 26)
"""What a template is told that asks for today's date: the day that Llama 3.1's template names where it is told none."""

_OPTIONS = "chat_template_kwargs"  # the attribute of a tokenizer that holds its template's options
_TODAY = "strftime_now"  # the function by which templates ask for today's date
_DIRECTIVES = "aAwdbBmyYHIpMSfzZjUWcxX"  # of strftime
_UNPADDED = "dmHIMSj"  # those that Linux also writes without leading zeros, as %-d
_MARK = "GradsurgeryAnswer"  # stands in for an answer; letters only, so that no template trims or escapes it


class Spoken(NamedTuple):
    """A rendered conversation, and what the assistant says in it.

    Attributes:
        text: the conversation up to the end of its last turn.
        spans: for each answer its first character in `text`, and the one after its end of turn.
        unended: whether the template leaves the last turn without an end.
    """

    text: str
    spans: list[tuple[int, int]]
    unended: bool


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def set_template_options(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> None:
    """Sets what the chat template of this tokenizer is told from now on, wherever a conversation is rendered.

    Args:
        tokenizer: its attribute `chat_template_kwargs` is set; it is not saved with the tokenizer.
        options: variables of the template, such as `{"date_string": "1 Jan 2025"}` or `{"enable_thinking": False}`.
            `strftime_now` takes a day as `YYYY-MM-DD`, which the template is told as today's.

    Raises:
        ValueError: if there are options and no template, the template does not read one of them, or the day is none.
    """
    if options and not has_template(tokenizer):
        raise ValueError(
            f"chat_template_kwargs: expected a tokenizer with a chat template, found none, so {', '.join(options)} would change nothing: "
            "leave them out"
        )
    ours = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"tools", "documents"}
    for name in options:
        if name in ours or name == "messages":
            raise ValueError(
                f"chat_template_kwargs: expected variables of the template, found {name!r}, which every conversation sets"
            )
        if not reads(tokenizer, name):
            raise ValueError(
                f"chat_template_kwargs: expected variables that the chat template reads, found {name!r}, which does not occur in it"
            )
    if _TODAY in options:
        _today(options)
    setattr(tokenizer, _OPTIONS, dict(options))


def reads(tokenizer: PreTrainedTokenizerBase, name: str) -> bool:
    """Whether the tokenizer's chat template has a word such as the name of one of its variables."""
    return re.search(rf"\b{re.escape(name)}\b", _template(tokenizer)) is not None


def template_options(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns what the chat template of this tokenizer is told, see `set_template_options`."""
    return dict(getattr(tokenizer, _OPTIONS, None) or {})


def date_told(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns the day that the chat template is told as today's, if it asks for one and no option gives it."""
    asks = has_template(tokenizer) and _TODAY in _template(tokenizer)
    return None if not asks or {_TODAY, "date_string"} & set(template_options(tokenizer)) else f"{DATE:%d %b %Y}"


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """Returns the conversation so far, with the template's invitation to answer.

    Raises:
        ValueError: if the template refuses the conversation.
    """
    return _render(tokenizer, messages, invite=True)


def conversation_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """Returns the whole conversation as the template writes it.

    Raises:
        ValueError: if the template refuses the conversation.
    """
    return _render(tokenizer, messages)


def spoken(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, every_turn: bool = True) -> Spoken:
    """Renders a conversation and finds what the assistant says in it.

    Cost: two or three renderings for each answer.

    Args:
        tokenizer: with a chat template.
        messages: the turns; the last one is the assistant's.
        every_turn: False takes the last answer alone.

    Returns:
        The rendered text, and the places of the answers in it. An earlier answer ends with the template's end of turn
        where the template writes the same one there as at the end; otherwise with its own last character.

    Raises:
        ValueError: if the template refuses the conversation, does not render an answer as it is, renders a prompt that
            is no beginning of the conversation, or ends a turn by text that is no token of the tokenizer.
    """
    final = len(messages) - 1
    around_last = _around(tokenizer, messages, final)
    closing = _closing(tokenizer, around_last[1])
    ends = [str(end) for end in (_last_token(tokenizer, closing), tokenizer.eos_token) if end]
    said = [
        dict(turn) | {"content": without_ends(str(turn["content"]), ends)} if turn["role"] == "assistant" else turn
        for turn in messages
    ]
    whole = _render(tokenizer, said)
    spans: list[tuple[int, int]] = []
    for number, turn in enumerate(said):
        if turn["role"] != "assistant" or not (every_turn or number == final):
            continue
        alike = number == final and said[:final] == list(messages[:final])
        before, after = around_last if alike else _around(tokenizer, said, number)
        first, last = _start(tokenizer, said, number, whole, before), len(whole) - len(after)
        if first > last or not whole.endswith(after) or str(turn["content"]).strip() not in whole[first:last]:
            raise ValueError(
                f"expected a chat template that renders the answer {turn['content']!r:.80} as it is, found {whole[first:]!r:.200}: change "
                "the answer, or give the tokenizer another chat_template"
            )
        spans.append((first, last + (len(closing) if after.startswith(closing) else 0)))
    return Spoken(whole[: spans[-1][1]], spans, not closing)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the token by which the chat template ends an answer; None without a template, or if it ends with nothing.

    Raises:
        ValueError: if the template refuses a question and an answer, or ends the answer by text that is no token.
    """
    if not has_template(tokenizer):
        return None
    conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
    token = _last_token(tokenizer, _closing(tokenizer, _around(tokenizer, conversation, 1)[1]))
    place: Any = tokenizer.convert_tokens_to_ids(token) if token else None
    return place


def written_before_answers(tokenizer: PreTrainedTokenizerBase) -> str:
    r"""Returns what the chat template itself writes where the assistant begins to speak; mostly nothing.

    Qwen3's is an empty thought, `<think>\n\n</think>\n\n`, which its option `enable_thinking: false` puts into the
    prompt.

    Raises:
        ValueError: if the template refuses a question and an answer.
    """
    if not has_template(tokenizer):
        return ""
    conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
    before, prompt = _around(tokenizer, conversation, 1)[0], prompt_text(tokenizer, conversation[:1])
    return before[len(prompt) :] if before.startswith(prompt) else ""


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, invite: bool = False) -> str:
    from jinja2 import TemplateError  # a dependency of chat templates, which few runs have

    options = template_options(tokenizer)
    template = _template(tokenizer)
    if _TODAY in template:
        template = _with_date(template, _today(options))
        options.pop(_TODAY, None)
    try:
        rendered: Any = tokenizer.apply_chat_template(
            [dict(turn) for turn in messages],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=invite,
            **options,
        )
    except (TemplateError, TypeError) as error:  # the second is what an expression of the template raises
        raise ValueError(
            "expected a conversation that the tokenizer's chat template renders, found that it refuses one of the roles "
            f"{', '.join(str(turn['role']) for turn in messages)}: {error}; give conversations as the template takes them (a system text "
            "can stand in the first user turn), or another chat_template"
        ) from error
    return str(rendered)


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.get_chat_template())


def _today(options: Mapping[str, Any]) -> date:
    day = options.get(_TODAY, DATE)
    try:
        return day if isinstance(day, date) else datetime.strptime(str(day), "%Y-%m-%d").date()
    except ValueError as error:
        raise ValueError(f"chat_template_kwargs: expected {_TODAY} as a day, such as {DATE}, found {day!r}") from error


@lru_cache(maxsize=16)
def _with_date(template: str, day: date) -> str:
    """The template, in which `strftime_now` tells this day: a macro, because Transformers passes no functions on."""
    moment = datetime(day.year, day.month, day.day)
    filters = {f"%{letter}": f"{moment:%{letter}}" for letter in _DIRECTIVES}
    filters |= {f"%-{letter}": filters[f"%{letter}"].lstrip("0") or "0" for letter in _UNPADDED}
    replaced = "".join(
        f"|replace({json.dumps(name)}, {json.dumps(value)})" for name, value in [*filters.items(), ("%%", "%")]
    )
    # An empty expression at the end, because a block would swallow a line break that the template begins with.
    return f"{{% macro {_TODAY}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}{{{{ '' }}}}{template}"


def _around(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], number: int) -> tuple[str, str]:
    """What the template writes before and after the text of one turn."""
    marked = [*messages[:number], dict(messages[number]) | {"content": _MARK}, *messages[number + 1 :]]
    before, found, after = _render(tokenizer, marked).partition(_MARK)
    if not found or _MARK in after:
        raise ValueError(
            f"expected a chat template that renders the assistant's turn {number + 1} of {len(messages)} once, found it "
            f"{'more than once' if found else 'left out'}: give the tokenizer another chat_template"
        )
    return before, after


def _start(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], number: int, whole: str, before: str
) -> int:
    """The place in the rendered conversation where an answer begins."""
    prompt = prompt_text(tokenizer, messages[:number]) if number else before
    if whole.startswith(prompt):
        return len(prompt)
    if number < len(messages) - 1 and whole.startswith(before):
        return len(before)  # earlier turns are only read, and some templates write them without what invites an answer
    same = next((place for place, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
    raise ValueError(
        "expected a chat template whose prompt is the beginning of the whole conversation, found that the prompt goes on with "
        f"{prompt[same:]!r:.80} where the conversation goes on with {whole[same:]!r:.80}: tell the template to render both alike "
        "(--chat-template-kwargs, for example {enable_thinking: false}), or give the tokenizer another chat_template"
    )


def _closing(tokenizer: PreTrainedTokenizerBase, after: str) -> str:
    """What ends the last answer: everything up to the first token that is whole in the vocabulary; or nothing."""
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    found = [(after.find(token), -len(token), token) for token in tokens if token.strip() and token in after]
    if found:
        place, _, token = min(found)
        return after[: place + len(token)]
    if after.strip():
        raise ValueError(
            "expected a chat template that ends an answer by a special token of the tokenizer, at which generation can stop, found the "
            f"text {after!r:.80}: add it with tokenizer.add_special_tokens, or give the tokenizer another chat_template"
        )
    return ""


def _last_token(tokenizer: PreTrainedTokenizerBase, closing: str) -> str:
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    return max((token for token in tokens if token.strip() and closing.endswith(token)), key=len, default="")


def without_ends(text: str, ends: Sequence[str]) -> str:
    r"""The text without ends of turn that it has itself, and the white space after them: another one is written.

    Example:
        >>> without_ends("In Ros.</s>\n", ["</s>"]), without_ends("In Ros.\n", ["</s>"])
        ('In Ros.', 'In Ros.\n')
    """
    while (end := next((end for end in ends if text.rstrip().endswith(end)), None)) is not None:
        text = text.rstrip()[: -len(end)]
    return text
