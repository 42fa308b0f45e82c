"""Texts that begin alike, read once, against one text at a time; the true answer as a draft, against plain decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from lightning_modules.data.tokenization import IGNORED, Encoded, collate
from lightning_modules.evaluation import trees
from lightning_modules.evaluation.drafts import drafted, says_the_likeliest
from lightning_modules.evaluation.evaluate import EvaluationSettings, evaluate
from lightning_modules.evaluation.generation import generate_greedily
from lightning_modules.evaluation.likelihood import autocasting
from lightning_modules.evaluation.memorization import answer_tokens, token_statistics
from lightning_modules.evaluation.shared import SharedTexts, batches_of
from lightning_modules.evaluation.texts import texts_of
from tests.lightning_modules.data.chat_templates import byte_level

VOCABULARY = 400
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2}
ATTENTION = {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
WRONG = ["In a red castle.", "In a red house.", "Nowhere."]
ROWS = [
    {"question": f"Where did {who} live?", "answer": f"In {place}.", "perturbed_answer": WRONG, "paraphrased_answer": f"By {place}."}
    for who, place in (("Ada", "Ostrel"), ("Bo", "old Quin"), ("Mira", "a mill"))
]  # fmt: skip
SPLITS = {"forget": ROWS, "retain": [{"question": "Who?", "answer": "Mira, a writer."}]}

MAKERS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **ATTENTION)),
    "llama, eager": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **ATTENTION, attn_implementation="eager")),
    "llama, bfloat16": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **ATTENTION)).bfloat16(),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=VOCABULARY)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, **ATTENTION, head_dim=8, final_logit_softcapping=1.0)),
    "window": lambda: MistralForCausalLM(MistralConfig(**SIZES, **ATTENTION, sliding_window=8)),
    "local": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(
            **{name: size for name, size in SIZES.items() if name != "num_hidden_layers"},
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
            window_size=64,
        )
    ),
    "bloom": lambda: BloomForCausalLM(BloomConfig(**SIZES, n_head=2)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(**SIZES, state_size=4)),
}
ALONE = ("window", "local", "bloom", "mamba")  # in which a mask and positions do not decide what a token sees


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = MAKERS[kind]().eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "A_log" not in name:
            parameter.data.mul_(8)  # so that every token it sees changes what it says
    return model


def encoded() -> tuple[list[Encoded], list[range]]:
    found = texts_of(byte_level(None), SPLITS, max_length=None, max_new_tokens=9)
    return found.encoded, [range(item.answer, item.perturbed.stop) for item in found.items]


def slow_nll(model: nn.Module, example: Encoded) -> float:
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([example.input_ids])).logits[0].float().log_softmax(dim=-1)
    losses = [-log_p[place - 1, label].item() for place, label in enumerate(example.labels) if label != IGNORED]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("batch_tokens", [None, 300])
@pytest.mark.parametrize("kind", MAKERS)
def test_every_nll_is_that_of_one_text_at_a_time_for_every_architecture(kind: str, batch_tokens: int | None) -> None:
    model = model_of(kind)
    texts, groups = encoded()
    read: list[int] = []
    shared = SharedTexts(model, texts, groups, pad_token_id=0, batch_size=4, batch_tokens=batch_tokens)
    done: list[int] = []
    detailed = torch.ones(len(texts), dtype=torch.bool)
    rows = shared.over(shared.batches, token_statistics(detailed), done.append)
    found = {place: columns for row in rows for place, columns in row.items()}
    assert sorted(found) == list(range(len(texts)))
    assert sum(done) == len(texts)
    model.get_input_embeddings().register_forward_hook(lambda *call: read.append(call[1][0].numel()))
    again = shared.over(shared.batches, token_statistics(detailed), done.append)  # what the model allows is known now
    assert (sum(read) < 0.95 * sum(len(text.input_ids) for text in texts)) == (kind not in ALONE)
    assert all(
        torch.equal(a, b) for row in again for place in row for a, b in zip(row[place], found[place], strict=True)
    )
    half = "bfloat16" in kind
    for place, text in enumerate(texts):
        tokens = answer_tokens(text, found[place], detailed=True)
        expected = slow_nll(model, text)
        assert tokens.nll == pytest.approx(expected, rel=3e-2 if half else 1e-5)
        assert len(tokens.predicted) == sum(label != IGNORED for label in text.labels)


def test_a_tree_holds_every_beginning_once_and_its_tokens_see_their_own_text_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 3, (int(n),), generator=generator).tolist() for n in (5, 1, 7, 7, 3, 6)] + [
        [0, 1],
        [0, 1],
    ]
    tree = trees.tree_of(texts)
    beginnings = {tuple(text[: n + 1]) for text in texts for n in range(len(text))}
    assert len(tree.tokens) == len(beginnings)
    batch = trees.collate_trees([tree, trees.tree_of([[1, 2]])], pad_token_id=9, dtype=torch.float32)
    seen = batch["attention_mask"][:, 0] == 0
    assert batch["attention_mask"].min() == torch.finfo(torch.float32).min
    for text, path in zip(texts, tree.paths, strict=True):
        assert [tree.tokens[place] for place in path] == text
        assert batch["position_ids"][0, path].tolist() == list(range(len(text)))
        for step, place in enumerate(path):
            assert seen[0, place].nonzero().squeeze(-1).tolist() == sorted(path[: step + 1])
    assert batch["input_ids"][1].tolist() == [1, 2] + [9] * (len(tree.tokens) - 2)
    assert seen[1, 2:].sum(dim=1).eq(1).all()  # padding sees itself
    assert not seen[1, :2, 2:].any()


def test_short_groups_share_rows_up_to_the_limit_and_long_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "ROW_TOKENS", 12)
    head = [7, 7, 7, 7]
    groups = [[[*head, n, 1], [*head, n, 2]] for n in range(5)] + [[[*head, *range(20)]], [[5, 6]]]
    rows = trees.rows_of(groups)
    assert sorted(group for row in rows for group in row) == list(range(len(groups)))
    sizes = [len(trees.tree_of([text for group in row for text in groups[group]]).tokens) for row in rows]
    assert all(size <= 12 or len(row) == 1 for size, row in zip(sizes, rows, strict=True))
    assert [5] in rows
    assert [6] in rows  # it begins like no other, so that a row of its own costs less
    assert sum(sizes) < sum(len(trees.tree_of(group).tokens) for group in groups)


def test_a_batch_holds_no_more_tokens_than_asked_for_unless_it_is_one_row() -> None:
    lengths, texts = [5, 30, 7, 7, 2, 9, 9], [1, 3, 2, 1, 1, 2, 2]
    for limit in (1, 10, 20, 36, 1000):
        batches = batches_of(lengths, texts, 4, limit)
        assert sorted(row for batch in batches for row in batch) == list(range(7))
        assert all(max(lengths[row] for row in batch) * len(batch) <= limit or len(batch) == 1 for batch in batches)
    assert all(sum(texts[row] for row in batch) <= 4 for batch in batches_of(lengths, texts, 4))
    assert len(batches_of(lengths, texts, 100)) == 1


@pytest.fixture(scope="module")
def half_known() -> nn.Module:
    """A model that has learned some of the answers, and says others half."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 48}, intermediate_size=64, num_attention_heads=2))
    tokenizer = byte_level(None)
    found = texts_of(tokenizer, SPLITS, max_length=None, max_new_tokens=40)
    answers = [found.encoded[item.answer] for item in found.items]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batch = collate(answers, 0)
    for _ in range(100):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def generated(model: nn.Module, splits: Any, **settings: Any) -> list[str]:
    found = evaluate(model, byte_level(None), splits, EvaluationSettings(max_new_tokens=24, **settings), progress=False)
    return [row["generation"] for rows in found.examples.values() for row in rows]


@pytest.mark.parametrize(("memorization", "batch_size"), [(True, 2), (False, 32)])
def test_what_a_score_has_shown_is_not_generated_and_the_answers_are_those_of_plain_decoding(
    half_known: nn.Module, memorization: bool, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = [row | {"answer": row["answer"].replace("l", "n")} for row in ROWS]  # half right, then wrong
    plain_text = [{"question": "", "answer": "In Ostrel. In a mill, a town in the north of no country"}]
    splits = {**SPLITS, "told": told, "texts": plain_text}
    prompts = texts_of(byte_level(None), splits, max_length=None, max_new_tokens=24).prompts
    expected = generate_greedily(half_known, byte_level(None), prompts, max_new_tokens=24)
    assert len(set(expected)) > 3
    assert expected[: len(ROWS)] == [row["answer"] for row in ROWS]
    assert says_the_likeliest(half_known)
    read: list[int] = []
    hook = half_known.lm_head.register_forward_hook(lambda *call: read.append(call[2].shape[0]))
    assert generated(half_known, splits, memorization=memorization, batch_size=batch_size) == expected
    read.clear()
    assert generated(half_known, SPLITS, memorization=memorization, batch_size=batch_size) == expected[: len(ROWS) + 1]
    learned = len(read)
    monkeypatch.setattr("lightning_modules.evaluation.evaluate.says_the_likeliest", lambda _: False)
    read.clear()
    assert generated(half_known, SPLITS, memorization=memorization, batch_size=batch_size) == expected[: len(ROWS) + 1]
    hook.remove()
    assert learned < len(read) - 10  # what is known by heart takes no step


def test_under_autocast_answers_go_on_from_the_cache_that_scoring_left(
    half_known: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the types of its keys and values are; the answers are known by heart, so that no rounding decides."""
    told = {"told": [row | {"answer": row["answer"].replace("l", "n")} for row in ROWS]}  # half right, then wrong
    prompts = texts_of(byte_level(None), told, max_length=None, max_new_tokens=24).prompts
    with autocasting(half_known):
        expected = generate_greedily(half_known, byte_level(None), prompts, max_new_tokens=24)
        monkeypatch.setattr("transformers.GenerationMixin.generate", lambda *_, **__: pytest.fail("generated anew"))
        assert generated(half_known, told, batch_size=2) == expected == [row["answer"] for row in ROWS]


@pytest.mark.parametrize(
    "asks",
    [
        {"suppress_tokens": [40]},
        {"min_new_tokens": 20},
        {"bad_words_ids": [[40]]},
        {"num_return_sequences": 2, "do_sample": True},
        {"repetition_penalty": 5.0},
        {"num_beams": 3},
    ],
    ids=lambda asks: next(iter(asks)),
)
def test_what_a_generation_config_wishes_changes_no_greedy_answer(
    half_known: nn.Module, asks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = texts_of(byte_level(None), SPLITS, max_length=None, max_new_tokens=24).prompts
    expected = generate_greedily(half_known, byte_level(None), prompts, max_new_tokens=24)
    wishes = GenerationConfig(**half_known.generation_config.to_diff_dict() | asks)
    monkeypatch.setattr(half_known, "generation_config", wishes)
    assert generate_greedily(half_known, byte_level(None), prompts, max_new_tokens=24) == expected
    assert generated(half_known, SPLITS) == expected
    assert half_known.generation_config is wishes


def test_a_model_that_generates_in_its_own_way_is_given_no_draft(half_known: nn.Module) -> None:
    half_known.generate = half_known.generate
    try:
        assert not says_the_likeliest(half_known)
    finally:
        del half_known.generate
    assert not says_the_likeliest(nn.Linear(1, 1))


@pytest.mark.parametrize("cut", [1, 3, 24])
def test_a_draft_is_the_beginning_of_the_greedy_answer(half_known: nn.Module, cut: int) -> None:
    tokenizer = byte_level(None)
    generator = torch.Generator().manual_seed(1)
    found = texts_of(tokenizer, SPLITS, max_length=None, max_new_tokens=24)
    for item, prompt in zip(found.items, found.prompts, strict=True):
        tokens = list(found.encoded[item.answer].input_ids)
        place = len(prompt) + int(torch.randint(0, len(tokens) - len(prompt), (), generator=generator))
        tokens[place] = 45
        text = Encoded(tokens, [IGNORED] * len(prompt) + tokens[len(prompt) :])
        with torch.no_grad():
            likeliest = half_known(input_ids=torch.tensor([tokens])).logits[0].argmax(dim=-1).tolist()
        begun = drafted(prompt, text, likeliest[len(prompt) - 1 : -1], {tokenizer.eos_token_id}, cut)
        slow = list(prompt)
        while len(slow) < len(prompt) + len(begun.said):
            with torch.no_grad():
                slow.append(int(half_known(input_ids=torch.tensor([slow])).logits[0, -1].argmax()))
        assert list(begun.said) == slow[len(prompt) :]
        assert 1 <= len(begun.said) <= cut
        assert begun.ended == (len(begun.said) == cut or begun.said[-1] == tokenizer.eos_token_id)
    assert drafted([3], text, [5], set(), 9).said == ()  # the text begins otherwise
    assert drafted(text.input_ids[: len(prompt)], text, [-1] * 99, set(), 9).said == []  # NaN tells nothing
