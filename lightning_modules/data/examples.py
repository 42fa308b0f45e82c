"""Examples: questions and answers, conversations and texts, of the shapes that users have them in."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lightning_modules.data.rows import read_rows

Example = dict[str, Any]
Item = TypeVar("Item")

_ACCEPTED = "question and answer, prompt and response, messages, or text"
_PAIRS = (("question", "answer"), ("prompt", "response"))
_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHOWN = 12  # columns in a message: a table can have thousands
# A chat template may render them: of a turn, and of a whole conversation.
_UNREAD = ("tool_calls", "function_call", "reasoning_content", "thinking")
_UNREAD_BESIDE = ("tools", "functions", "documents", "chat_template_kwargs")


def read_examples(path: str | Path) -> list[Example]:
    """Reads a file of examples into `{"question", "answer"}` dictionaries.

    Args:
        path: `.json` (an array of objects, or one object on each line as in TOFU's files), `.jsonl`, `.csv` or
            `.parquet`. A row has

            - `question` and `answer`, or `prompt` and `response`;
            - or `messages`, `[{"role", "content"}, ...]`: the last assistant turn is the answer, the turns before it,
              joined by line breaks, are the question. Conversations of more than a user's and an assistant's turn keep
              their turns up to the answer as `messages`, for tokenizers with a chat template. All that the
              assistant says in them is trained on and scored; with `last_turn_only`, true, the answer alone;
            - or `text`, plain text: an example with an empty question.

            `paraphrased_answer` and `paraphrased_question` (strings) and `perturbed_answer` (a list of strings) are
            kept where they are present; in a CSV file the list is written as JSON. Other columns are dropped.

    Returns:
        One dictionary for each row, in the order of the file: `question`, `answer` and those of the above that it has.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is empty or broken, or has unknown columns or values of a wrong type; the message names
            the row or line.
        ImportError: for Parquet without pyarrow.
    """
    examples: list[Example] = []
    places: dict[tuple[str, str], list[str]] = {}
    for where, row in read_rows(path):
        example = as_example(row, f"{path}, {where}")
        if not example["question"] and not _is_text(row):
            raise ValueError(
                f'{path}, {where}: the question is empty: expected one, or plain text as {{"text": ...}} without a question'
            )
        examples.append(example)
        places.setdefault((example["question"], example["answer"]), []).append(where)
    if not examples:
        raise ValueError(f"{path} is empty: expected at least one row with {_ACCEPTED}")
    if repeated := [same for same in places.values() if len(same) > 1]:
        warnings.warn(
            f"{path}: {len(repeated)} of {len(places)} examples are there more than once, the first of them in "
            f"{' and '.join(repeated[0][:3])}: each counts as often as it is there; remove those that are there by mistake",
            stacklevel=2,
        )
    return examples


def evenly_spaced(rows: Sequence[Item], count: int, *, centred: bool = False) -> list[Item]:
    """At most `count` of the rows, evenly spaced and in their order.

    Args:
        rows: n rows, cut into as many blocks as rows are wanted.
        count: How many are wanted; all rows where there are fewer.
        centred: Take the middle row of every block instead of the first.

    Example:
        >>> evenly_spaced([0, 1, 2, 3, 4, 5], 3), evenly_spaced([0, 1], 3)
        ([0, 2, 4], [0, 1])
        >>> evenly_spaced([0, 1, 2, 3, 4, 5], 2, centred=True)
        [1, 4]
    """
    count = min(count, len(rows))
    return [rows[(2 * index + centred) * len(rows) // (2 * count)] for index in range(count)]


def as_example(row: object, where: str = "this example") -> Example:
    """Turns a row of any shape that `read_examples` accepts into `{"question", "answer"}`.

    Args:
        row: the row.
        where: its place, for the error message.

    Raises:
        ValueError: if it has none of the accepted shapes, or a wrong answer is the right one; the message begins with
            `where`.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected an object with {_ACCEPTED}, found {type(row).__name__}")
    question, answer = _question_and_answer(row, where)
    if not answer.strip():
        raise ValueError(f"{where}: the answer is empty: expected some text to learn or to forget")
    if question and not question.strip():
        raise ValueError(
            f"{where}: the question is only white space: expected some text, or plain text without a question"
        )
    example: Example = {"question": question, "answer": answer}
    turns = _turns(row.get("messages"))
    if turns and (unread := [name for name in _UNREAD_BESIDE if row.get(name)]):
        raise ValueError(
            f"{where}: expected messages alone, found {unread[0]} beside them, which is not read: write what the model saw of it into a "
            "turn, and leave the column out"
        )
    plain = [turn["role"] for turn in turns] in ([], ["user", "assistant"])  # question and answer say it all
    if turns and _joined(turns) != (question, answer):
        raise ValueError(
            f"{where}: expected a question and an answer, or messages, found both, and they differ: leave one of them out"
        )
    if question and not plain:
        example["messages"] = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
        if _flag(row, "last_turn_only", where):
            example["last_turn_only"] = True
    # A column that only some rows have is null in the others.
    for name in ("paraphrased_answer", "paraphrased_question"):
        if row.get(name) is not None:
            example[name] = _text(row, name, where)
            if not example[name].strip():
                raise ValueError(f"{where}: the {name} is empty: expected some text, or leave it out")
    if row.get("perturbed_answer") is not None:
        example["perturbed_answer"] = _texts(row["perturbed_answer"], where)
        right = {example[name].strip() for name in ("answer", "paraphrased_answer") if name in example}
        for text in example["perturbed_answer"]:
            if text.strip() in right:
                raise ValueError(
                    f"{where}: expected wrong answers as perturbed_answer, found the right one, {text!r:.80}; leave it out"
                )
    return example


def asked(row: Mapping[str, Any]) -> str | list[Mapping[str, Any]]:
    """Returns what an example's answer answers: the turns before it where there are turns, otherwise the question.

    Example:
        >>> asked({"question": "Who?", "answer": "Ada."})
        'Who?'
    """
    turns = row.get("messages")
    return list(turns[:-1]) if turns else row["question"]


def answered(row: Mapping[str, Any], answer: str) -> Example:
    """Returns the example with another answer, and without what belongs to the old one.

    What the assistant said in the turns before another answer is only read: it may be what is to be forgotten.
    """
    turns = row.get("messages")
    changed: Example = {"question": row["question"], "answer": answer}
    if not turns:
        return changed
    changed["messages"] = [*turns[:-1], {**turns[-1], "content": answer}]
    return changed | ({"last_turn_only": True} if answer != row["answer"] or row.get("last_turn_only") else {})


def numbered(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, int]]:
    """Returns a key for every row: question, answer, and how many rows before it have the same two.

    Example:
        >>> numbered([{"question": "Q", "answer": "A"}, {"question": "Q", "answer": "A"}])
        [('Q', 'A', 0), ('Q', 'A', 1)]
    """
    seen: Counter[tuple[str, str]] = Counter()
    keys: list[tuple[str, str, int]] = []
    for row in rows:
        pair = row["question"], row["answer"]
        keys.append((*pair, seen[pair]))
        seen[pair] += 1
    return keys


def _is_text(row: Any) -> bool:
    """Whether an example is read from the column text, which question and answer, and messages, come before."""
    return "messages" not in row and not any(question in row and answer in row for question, answer in _PAIRS)


def _question_and_answer(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    for question, answer in _PAIRS:
        if question in row and answer in row:
            return _text(row, question, where), _text(row, answer, where)
    if "messages" in row:
        return _last_turn(row["messages"], where)
    if "text" in row:
        return "", _text(row, "text", where)
    columns = [str(name)[:40] for name in row]
    more = f" and {len(columns) - _SHOWN} more" if len(columns) > _SHOWN else ""
    raise ValueError(f"{where}: found the columns {', '.join(columns[:_SHOWN]) or 'none'}{more}; expected {_ACCEPTED}")


def _last_turn(messages: object, where: str) -> tuple[str, str]:
    expected = f'{where}: expected messages as a list of {{"role": ..., "content": text}}'
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{expected}, found {type(messages).__name__ if messages else 'an empty one'}")
    for turn in messages:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str) or "role" not in turn:
            raise ValueError(f"{expected}, found {turn!r:.80}")
        if turn["role"] not in _ROLES:
            raise ValueError(f"{expected} with a role among {', '.join(_ROLES)}, found {turn['role']!r:.80}")
        _checked(turn["content"], "content", where)
        if turn["role"] == "assistant" and not turn["content"].strip():
            raise ValueError(f"{expected}, found an assistant's turn that says nothing")
        if unread := [name for name in _UNREAD if turn.get(name)]:
            raise ValueError(
                f"{expected}, found a turn with {unread[0]}, which is not trained on: write it into the content"
            )
        if turn.get("weight", 1) != 1:
            raise ValueError(
                f"{expected}, found a turn of weight {turn['weight']!r:.20}: weights are not read; last_turn_only: true beside messages "
                "leaves all but the last answer out"
            )
    turns = _turns(messages)
    if not turns:
        raise ValueError(f"{expected} with an assistant turn, found the roles {[turn['role'] for turn in messages]}")
    return _joined(turns)


def _turns(messages: object) -> list[Mapping[str, Any]]:
    """The turns up to the assistant's last one; none if these are no turns, or the assistant says nothing."""
    turns: list[Any] = list(messages) if isinstance(messages, (list, tuple)) else []
    if not all(isinstance(turn, Mapping) and isinstance(turn.get("content"), str) and "role" in turn for turn in turns):
        return []
    answers = [number for number, turn in enumerate(turns, start=1) if turn["role"] == "assistant"]
    return turns[: answers[-1]] if answers else []


def _joined(turns: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    return "\n".join(turn["content"] for turn in turns[:-1]), turns[-1]["content"]


def _flag(row: Mapping[str, Any], name: str, where: str) -> bool:
    value = row.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{where}: expected {name} to be true or false, found {value!r:.80}")
    return bool(value)


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    return _checked(row[name], name, where)


def _checked(value: object, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected {name} to be text, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a pair, and the tokenizer would fail
        raise ValueError(
            f"{where}: expected {name} to be text, found half of a surrogate pair in {value!r:.80}: write the whole character"
        ) from error
    return value


def _texts(value: object, where: str) -> list[str]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:  # Python's own way to write a list, as pandas does
            raise ValueError(
                f'{where}: expected perturbed_answer as a list in JSON, such as ["In Pel.", "In Ros."], found {value!r:.80}'
            ) from error
    elif isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text.strip() for text in value):
        raise ValueError(f"{where}: expected perturbed_answer to be a list of texts, found {value!r:.80}")
    return [_checked(text, "perturbed_answer", where) for text in value]
