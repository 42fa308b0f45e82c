"""Per-token statistics of a model against one example at a time, without padding, and with 50 digits."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from lightning_modules.data.tokenization import IGNORED, Encoded
from lightning_modules.evaluation import likelihood
from lightning_modules.evaluation.likelihood import answer_nll
from lightning_modules.evaluation.memorization import AnswerTokens, answer_token_statistics
from lightning_modules.metrics.functional import extraction_strength, loss_score, min_k_plus_plus_score
from tests.reference import metrics as oracles

PAD, VOCABULARY = 0, 23


def llama(**options: object) -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, initializer_range=0.8, attention_dropout=0.5, **options)  # fmt: skip
    return LlamaForCausalLM(config)


def gemma() -> Gemma2ForCausalLM:
    """Its logits are capped after the head, so that a head by itself gives others."""
    config = Gemma2Config(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=8,
                          num_attention_heads=2, num_key_value_heads=2, final_logit_softcapping=1.0, initializer_range=0.8)  # fmt: skip
    return Gemma2ForCausalLM(config)


def examples() -> list[Encoded]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for prompt, answer in ((3, 4), (1, 1), (5, 9), (2, 6), (4, 2)):
        tokens = torch.randint(1, VOCABULARY, (prompt + answer,), generator=generator).tolist()
        made.append(Encoded(tokens, [IGNORED] * prompt + tokens[prompt:]))
    return made


def slow(model: nn.Module, example: Encoded) -> list[tuple[float, int, float, float]]:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0].double()
    return [
        oracles.token_statistics(logits[position - 1].tolist(), label)
        for position, label in enumerate(example.labels)
        if label != IGNORED
    ]


def statistics(model: nn.Module, encoded: list[Encoded], **options: int) -> list[AnswerTokens]:
    return answer_token_statistics(model, encoded, pad_token_id=PAD, **options)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("make", [llama, gemma])
def test_every_number_equals_the_slow_one(make: object, batch_size: int) -> None:
    model, encoded = make().train(), examples()
    found = statistics(model, encoded, batch_size=batch_size)
    assert model.training
    model.eval()
    for tokens, example in zip(found, encoded, strict=True):
        log_p, predicted, means, stds = zip(*slow(model, example), strict=True)
        labels = [label for label in example.labels if label != IGNORED]
        assert tokens.labels.tolist() == labels
        assert tokens.predicted.tolist() == list(predicted)
        assert tokens.correct.tolist() == [guess == label for guess, label in zip(predicted, labels, strict=True)]
        assert tokens.correct.dtype == torch.bool
        # float32 logits of size 10 and log-softmax: 1e-6 each
        assert tokens.log_probabilities.tolist() == pytest.approx(list(log_p), rel=1e-5, abs=1e-5)
        assert tokens.means.tolist() == pytest.approx(list(means), rel=1e-5, abs=1e-5)
        assert tokens.stds.tolist() == pytest.approx(list(stds), rel=1e-5, abs=1e-5)
        assert {column.dtype for column in tokens} == {torch.float64, torch.int64}


@pytest.mark.parametrize("detailed", [[], [1, 4], [0, 1, 2, 3, 4]])
def test_what_is_not_asked_for_in_detail_is_empty_and_the_rest_the_same_bit_for_bit(detailed: list[int]) -> None:
    model, encoded = llama(), examples()
    nll = answer_nll(model, encoded, pad_token_id=PAD, batch_size=2).tolist()
    whole = answer_token_statistics(model, encoded, pad_token_id=PAD, batch_size=2)
    found = answer_token_statistics(model, encoded, pad_token_id=PAD, batch_size=2, detailed=detailed)
    assert [tokens.nll for tokens in found] == [tokens.nll for tokens in whole] == nll
    for place, (tokens, every) in enumerate(zip(found, whole, strict=True)):
        assert torch.equal(tokens.log_probabilities, every.log_probabilities)
        assert torch.equal(tokens.labels, every.labels)
        for ours, theirs in zip(
            (tokens.predicted, tokens.means, tokens.stds), (every.predicted, every.means, every.stds), strict=True
        ):
            assert torch.equal(ours, theirs) if place in detailed else ours.numel() == 0


def test_the_mean_is_the_nll_that_everything_else_reports() -> None:
    model, encoded = llama(), examples()
    found = loss_score([tokens.log_probabilities for tokens in statistics(model, encoded)])
    torch.testing.assert_close(-found, answer_nll(model, encoded, pad_token_id=PAD), rtol=1e-7, atol=1e-7)


def test_rows_of_logits_are_never_more_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoded = llama(), examples()
    whole = statistics(model, encoded)
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda *call: seen.append(call[1][0].shape[:-1].numel()))
    monkeypatch.setattr(likelihood, "_HEAD_ROWS", 3)
    chunked = statistics(model, encoded)
    shortest = min(len(example.input_ids) for example in encoded)
    assert max(seen) == max(3, shortest)  # the check that the head by itself is the model takes one short example whole
    assert sum(seen) >= sum(len(tokens.labels) for tokens in whole)
    for ours, theirs in zip(chunked, whole, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_progress_is_told_and_nothing_in_gives_nothing_out() -> None:
    done: list[int] = []
    answer_token_statistics(llama(), examples(), pad_token_id=PAD, batch_size=2, advance=done.append)
    assert done == [2, 2, 1]
    assert answer_token_statistics(llama(), [], pad_token_id=PAD) == []


class Fixed(nn.Module):
    """The same logits at every position."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


ONE = [Encoded([1, 2, 0], [IGNORED, 2, 0])]


def test_ruled_out_tokens_count_nothing_and_nan_stays_nan() -> None:
    (tokens,) = statistics(Fixed([0.0, -math.inf, 1.0]), ONE)
    _, _, mean, std = oracles.token_statistics([0.0, 1.0], 0)
    assert tokens.means.tolist() == pytest.approx([mean] * 2, rel=1e-6)
    assert tokens.stds.tolist() == pytest.approx([std] * 2, rel=1e-6)
    assert tokens.predicted.tolist() == [2, 2]
    (tokens,) = statistics(Fixed([0.0, math.nan, 1.0]), ONE)
    assert tokens.predicted.tolist() == [-1, -1]
    assert not tokens.correct.any()
    assert math.isnan(extraction_strength(tokens.predicted, tokens.labels))
    for column in (tokens.log_probabilities, tokens.means, tokens.stds):
        assert column.isnan().all()


def test_certainty_is_no_division_by_zero() -> None:
    (tokens,) = statistics(Fixed([0.0, 0.0, 500.0]), [Encoded([1, 2], [IGNORED, 2])])
    assert tokens.stds.tolist() == [0.0]
    assert min_k_plus_plus_score(*(tokens.log_probabilities, tokens.means, tokens.stds)) == 0.0


def test_the_spread_of_a_nearly_uniform_model_is_not_rounding_noise() -> None:
    """E[x^2] - E[x]^2 would be off by as much as it is: x^2 is 9, known to 5e-7, and the variance 3e-7."""
    logits = (0.002 * torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(0))).tolist()
    (tokens,) = statistics(Fixed(logits), ONE)
    _, _, mean, std = oracles.token_statistics(logits, 0)
    assert std < 1e-3
    assert tokens.stds.tolist() == pytest.approx([std] * 2, rel=1e-3)
    assert tokens.means.tolist() == pytest.approx([mean] * 2, rel=1e-6)
