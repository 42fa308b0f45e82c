"""What benchmarks score, as their authors write it, one example at a time and without batches, caches or padding."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch


def words(text: str) -> list[str]:
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).split()


def longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence, by the table of all beginnings."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, left in enumerate(one):
        for j, right in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if left == right else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def rouge_l_f1(said: str, right: str) -> float:
    found, wanted = words(said), words(right)
    common = longest_common(found, wanted)
    if not common:
        return 0.0
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


@torch.no_grad()
def said_after(model: Any, tokenizer: Any, prompt: str, limit: int) -> str:
    """Greedy, token by token, from the whole text each time."""
    ids = list(tokenizer(prompt)["input_ids"])
    start = len(ids)
    for _ in range(limit):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def verbatim_memorization(model: Any, tokenizer: Any, rows: Sequence[dict[str, str]]) -> float:
    """MUSE: ROUGE-L F1 of 128 tokens after the prompt against the first 128 tokens of the text that goes on there."""
    scores = []
    for row in rows:
        right = tokenizer.decode(tokenizer(row["gt"])["input_ids"][:128], skip_special_tokens=True)
        scores.append(rouge_l_f1(said_after(model, tokenizer, row["prompt"], 128), right))
    return sum(scores) / len(scores)


def knowledge_memorization(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, str]], solved: Sequence[dict[str, str]]
) -> float:
    """MUSE: ROUGE-L F1 of 32 tokens after solved questions and the question, up to what begins the next one."""
    scores = []
    for row in rows:
        prompt = ""
        for shown in solved:
            prompt += "Question: " + shown["question"] + "\nAnswer: " + shown["answer"] + "\n\n"
        prompt += "Question: " + row["question"] + "\nAnswer: "
        said = said_after(model, tokenizer, prompt, 32)
        for end in ("\n\n", "\nQuestion", "Question:"):
            said = said.split(end)[0]
        scores.append(rouge_l_f1(said, row["answer"]))
    return sum(scores) / len(scores)


@torch.no_grad()
def token_log_probabilities(model: Any, ids: Sequence[int]) -> list[float]:
    """Of each token but the first, given all before it."""
    rows = model(torch.tensor([list(ids)])).logits[0].double().log_softmax(-1)
    return [float(rows[place, token]) for place, token in enumerate(ids[1:])]


def muse_auc(model: Any, tokenizer: Any, forget: Sequence[str], holdout: Sequence[str]) -> float:
    """MUSE's own direction: how often a holdout text is more familiar by Min-40% than one of the forget set."""

    def familiar(text: str) -> float:
        likelihoods = sorted(token_log_probabilities(model, tokenizer(text)["input_ids"]))
        least = likelihoods[: int(0.4 * len(likelihoods))]
        return sum(least) / len(least)

    pairs = [(familiar(seen), familiar(unseen)) for seen in forget for unseen in holdout]
    return sum(unseen > seen for seen, unseen in pairs) / len(pairs)


def option_log_likelihoods(model: Any, tokenizer: Any, prompt: str, options: Sequence[str]) -> list[float]:
    """A pass for every option."""
    before = len(tokenizer(prompt)["input_ids"])
    found = []
    for option in options:
        likelihoods = token_log_probabilities(model, tokenizer(prompt + option)["input_ids"])
        found.append(sum(likelihoods[before - 1 :]))
    return found


def accuracy(model: Any, tokenizer: Any, subject: str | None, rows: Sequence[dict[str, Any]]) -> float:
    """As lm-evaluation-harness asks; the subject stands in the row where none is given."""
    right = 0
    for row in rows:
        what = subject or row["subject"].replace("_", " ")
        a, b, c, d = row["choices"]
        prompt = (
            f"The following are multiple choice questions (with answers) about {what}.\n\n"
            f"{row['question'].strip()}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:"
        )
        scores = option_log_likelihoods(model, tokenizer, prompt, [" A", " B", " C", " D"])
        right += scores.index(max(scores)) == row["answer"]
    return right / len(rows)


def wilson(right: int, n: int) -> tuple[float, float]:
    """The shares p whose distance from the observed one is 1.96 of their own standard errors, by bisection."""

    def far(p: float) -> bool:
        return abs(right / n - p) > 1.959963984540054 * (p * (1 - p) / n) ** 0.5

    def edge(inside: float, outside: float) -> float:
        for _ in range(200):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if far(middle) else (middle, outside)
        return inside

    return (0.0 if right == 0 else edge(right / n, 0.0)), (1.0 if right == n else edge(right / n, 1.0))
