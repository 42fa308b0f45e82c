"""Prompts, samples and layers: what is asked, what is scored, and what is left as it was."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_modules.data.examples import as_example
from lightning_modules.data.tokenization import IGNORED, Encoded, encode, padding_id, prompt_ids
from lightning_modules.evaluation.evaluate import EvaluationSettings, evaluate
from lightning_modules.evaluation.generation import generate_greedily, generate_samples
from lightning_modules.metrics.functional import rouge_recall
from lightning_modules.probes import (
    PromptingSettings,
    SamplingSettings,
    expected_best,
    logit_lens,
    prompting_probe,
    sampling_probe,
)
from lightning_modules.probes import sampling as sampling_module
from lightning_modules.probes.prompting import after_shots, prompts
from lightning_modules.training.probability import answer_probabilities
from tests.lightning_modules.data.chat_templates import CHATML, byte_level
from tests.lightning_modules.evaluation.evaluation_workers import SPLITS, model_and_tokenizer
from tests.reference import probes as oracle
from tests.tolerances import LINEAR, Tolerance, close

SCORED = Tolerance(2e-6, "float32 logits of a small model, in batches of another size and padding")
FORGET: list[dict[str, Any]] = [{**row, "paraphrased_question": f"Tell: {row['question']}"} for row in SPLITS["forget"]]
RETAIN: list[dict[str, Any]] = list(SPLITS["retain"])


@pytest.fixture(scope="module")
def small() -> tuple[Any, Any]:
    return model_and_tokenizer()


# ---- prompts


def test_a_part_of_the_answer_is_given_and_only_the_rest_is_labelled(small: tuple[Any, Any]) -> None:
    _, tokenizer = small
    found = prompts(tokenizer, FORGET, RETAIN, PromptingSettings(prefixes=(0.25, 0.5, 0.99)))
    assert list(found) == ["question", "paraphrase", "prefix_25", "prefix_50", "prefix_99", "few_shot"]
    for name, share in (("question", 0.0), ("prefix_25", 0.25), ("prefix_50", 0.5), ("prefix_99", 0.99)):
        for row, prompt in zip(FORGET, found[name], strict=True):
            whole = encode(tokenizer, row["question"], row["answer"])
            start = len(prompt_ids(tokenizer, row["question"]))
            length = len(whole.input_ids) - start
            given = min(length - 1, round(share * length))
            assert prompt.ids == whole.input_ids[: start + given]
            assert prompt.text.input_ids == whole.input_ids
            labels = [IGNORED] * (start + given) + whole.input_ids[start + given :]
            assert prompt.text.labels == labels
    for row, prompt in zip(FORGET, found["paraphrase"], strict=True):
        assert prompt.text == encode(tokenizer, row["paraphrased_question"], row["answer"])


def test_examples_before_the_question_have_the_format_of_training(small: tuple[Any, Any]) -> None:
    _, tokenizer = small
    text = after_shots(tokenizer, RETAIN[:2], FORGET[0])
    assert tokenizer.decode(prompt_ids(tokenizer, text), skip_special_tokens=True) == (
        f"Q: {RETAIN[0]['question']}\nA: {RETAIN[0]['answer']}\n\nQ: {RETAIN[1]['question']}\nA: {RETAIN[1]['answer']}"
        f"\n\nQ: {FORGET[0]['question']}\nA:"
    )
    for prompt in prompts(tokenizer, FORGET, RETAIN, PromptingSettings(shots=2))["few_shot"]:
        said = tokenizer.decode(prompt.ids)
        assert all(RETAIN[place]["question"] in said for place in (1, 4))  # the middles of two halves
        assert prompt.text.labels[: len(prompt.ids)] == [IGNORED] * len(prompt.ids)


def test_with_a_chat_template_they_are_turns_after_the_system_prompt() -> None:
    tokenizer = byte_level(CHATML)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    row = {
        "question": "Be brief.\nWho?",
        "answer": "Ada.",
        "messages": [*turns, {"role": "assistant", "content": "Ada."}],
    }
    found = after_shots(tokenizer, RETAIN[:1], row)
    assert [turn["role"] for turn in found] == ["system", "user", "assistant", "user"]
    assert [turn["content"] for turn in found[1:3]] == [RETAIN[0]["question"], RETAIN[0]["answer"]]
    assert after_shots(tokenizer, RETAIN[:1], FORGET[0])[-1] == {"role": "user", "content": FORGET[0]["question"]}
    shot = {"question": "Be brief.\nWho?", "answer": "Ada.", "messages": row["messages"]}  # with the same prompt
    assert after_shots(tokenizer, [shot, shot], row) == [*turns, *[row["messages"][-1], turns[1]] * 2]


def test_other_words_take_the_place_of_the_last_user_turn_alone() -> None:
    tokenizer = byte_level(CHATML)
    said = (("system", "Be brief."), ("user", "Who?"), ("assistant", "Ada."), ("user", "When?"), ("assistant", "Now."))
    row = as_example({"messages": [{"role": role, "content": text} for role, text in said]})
    for other in ("When?", "Since when?"):
        (asked,) = prompts(tokenizer, [row | {"paraphrased_question": other}], [])["paraphrase"]
        turns = [*row["messages"][:3], {"role": "user", "content": other}]
        assert asked.text == encode(tokenizer, turns, "Now.", every_turn=False)
        assert asked.ids == prompt_ids(tokenizer, turns)


def test_the_plain_question_scores_as_evaluation_does_and_the_rest_by_hand(small: tuple[Any, Any]) -> None:
    model, tokenizer = small
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = prompting_probe(model, tokenizer, FORGET, RETAIN, PromptingSettings(max_new_tokens=5, batch_size=2))[
        "attacks"
    ]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    scores = evaluate(model, tokenizer, {"forget": FORGET}, EvaluationSettings(max_new_tokens=5), progress=False)
    plain = found["question"]
    close(torch.tensor(plain["probability"]), torch.tensor(scores.summary["forget"]["probability"]), SCORED)
    assert plain["rouge_l_recall"] == pytest.approx(scores.summary["forget"]["rouge_l_recall"])
    half = prompts(tokenizer, FORGET, RETAIN)["prefix_50"]
    probable = answer_probabilities(model, [prompt.text for prompt in half], pad_token_id=padding_id(tokenizer))
    close(torch.tensor(found["prefix_50"]["probabilities"]), torch.tensor(probable), SCORED)
    said = generate_greedily(model, tokenizer, [prompt.ids for prompt in half], max_new_tokens=5)
    for prompt, answer, recall in zip(half, said, found["prefix_50"]["rouge_l_recalls"], strict=True):
        assert recall == rouge_recall(answer, tokenizer.decode(prompt.text.input_ids[len(prompt.ids) : -1]).strip())
    for scored in found.values():
        low, high = scored["probability_interval"]
        assert low <= scored["probability"] <= high
        assert (scored["n"], scored["left_out"]) == (5, 0)


def answer_of(text: Encoded) -> list[int]:
    return [label for label in text.labels if label != IGNORED]


def test_a_limit_cuts_the_answers_of_every_way_of_asking_as_evaluation_does(small: tuple[Any, Any]) -> None:
    model, tokenizer = small
    limit = max(len(encode(tokenizer, row["question"], row["answer"]).input_ids) for row in FORGET) - 2
    settings = PromptingSettings(max_new_tokens=5, max_length=limit)
    found = prompting_probe(model, tokenizer, FORGET, RETAIN, settings)["attacks"]
    how = EvaluationSettings(max_new_tokens=5, max_length=limit)
    with pytest.warns(UserWarning, match="lose their end"):
        scores = evaluate(model, tokenizer, {"forget": FORGET}, how, progress=False).summary["forget"]
    close(torch.tensor(found["question"]["probability"]), torch.tensor(scores["probability"]), SCORED)
    assert found["question"]["rouge_l_recall"] == pytest.approx(scores["rouge_l_recall"])
    asked = prompts(tokenizer, FORGET, RETAIN, settings)
    for name in ("paraphrase", "few_shot"):
        same = [answer_of(prompt.text) for prompt in asked["question"]]
        assert [answer_of(prompt.text) for prompt in asked[name]] == same
    whole = prompts(tokenizer, FORGET, RETAIN)["question"]
    assert [prompt.rest for prompt in asked["question"]] == [answer_of(prompt.text) for prompt in whole]
    assert any(answer_of(prompt.text) != prompt.rest for prompt in asked["prefix_50"])


def test_what_cannot_be_asked_is_left_out_and_counted(small: tuple[Any, Any]) -> None:
    model, tokenizer = small
    longest = max(len(prompt.text.input_ids) for prompt in prompts(tokenizer, FORGET, RETAIN)["few_shot"])
    narrow = copy.deepcopy(model)
    narrow.config.max_position_embeddings = longest - 1
    found = prompting_probe(narrow, tokenizer, FORGET, RETAIN, PromptingSettings(max_new_tokens=1))["attacks"]
    assert found["few_shot"]["left_out"] >= 1
    assert found["few_shot"]["n"] + found["few_shot"]["left_out"] == 5
    assert found["question"]["left_out"] == 0
    text = [{"question": "", "answer": SPLITS["forget"][0]["answer"]}]
    only = prompting_probe(model, tokenizer, text, RETAIN, PromptingSettings(max_new_tokens=1))["attacks"]
    assert list(only) == ["question", "prefix_25", "prefix_50"]
    with pytest.raises(ValueError, match="prompting_probe: expected examples to forget"):
        prompting_probe(model, tokenizer, [], RETAIN)


def test_of_a_short_answer_one_token_is_given_and_one_is_left(small: tuple[Any, Any]) -> None:
    _, tokenizer = small
    row = {"question": FORGET[0]["question"], "answer": FORGET[0]["answer"].split()[0]}
    whole, start = encode(tokenizer, row["question"], row["answer"]), len(prompt_ids(tokenizer, row["question"]))
    assert len(whole.input_ids) - start == 2  # the word, and the end of the text
    found = prompts(tokenizer, [row], RETAIN, PromptingSettings(prefixes=(0.05, 0.95)))
    for name in ("prefix_5", "prefix_95"):
        assert found[name][0].ids == whole.input_ids[: start + 1]


def test_texts_without_a_question_are_no_examples_of_answering(small: tuple[Any, Any]) -> None:
    _, tokenizer = small
    texts = [{"question": "", "answer": row["answer"]} for row in RETAIN]
    settings = PromptingSettings(shots=2)
    assert prompts(tokenizer, FORGET, [*texts, *RETAIN], settings) == prompts(tokenizer, FORGET, RETAIN, settings)
    assert "few_shot" not in prompts(tokenizer, FORGET, texts, settings)


def test_of_an_answer_without_a_word_no_recall_is_taken(small: tuple[Any, Any]) -> None:
    model, tokenizer = small
    rows = [*FORGET[:2], {"question": FORGET[2]["question"], "answer": "?!"}]
    found = prompting_probe(model, tokenizer, rows, RETAIN, PromptingSettings(max_new_tokens=4))["attacks"]["question"]
    assert (found["n"], len(found["probabilities"]), len(found["rouge_l_recalls"])) == (3, 3, 2)
    assert found["rouge_l_recall"] == pytest.approx(sum(found["rouge_l_recalls"]) / 2)
    sampled = sampling_probe(model, tokenizer, rows, SamplingSettings(samples=2, max_new_tokens=4))
    assert (sampled["n"], len(sampled["values"])) == (2, 2)


@pytest.mark.parametrize("wrong", [{"prefixes": (0.0,)}, {"prefixes": (1.0,)}, {"shots": 0}, {"max_new_tokens": 0}])
def test_prompts_outside_their_domain_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"prompting_probe, .*expected"):
        PromptingSettings(**wrong)


# ---- samples


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=7), st.data())
def test_the_expected_best_is_the_mean_over_all_choices(scores: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(scores)))
    assert expected_best(scores, k) == pytest.approx(oracle.expected_best(scores, k), abs=1e-12)


def test_more_answers_than_there_are_cannot_be_drawn() -> None:
    for k in (0, 3):
        with pytest.raises(ValueError, match="expected 1 <= k <= 2"):
            expected_best([0.1, 0.2], k)


def test_samples_differ_repeat_by_their_seed_and_leave_the_random_state(small: tuple[Any, Any]) -> None:
    model, tokenizer = small
    model = copy.deepcopy(model)
    model.generation_config.top_k, model.generation_config.top_p = 1, 0.1  # a checkpoint may ask for it; not heard
    asked = [prompt_ids(tokenizer, row["question"]) for row in FORGET]
    state = torch.get_rng_state()
    said = [generate_samples(model, tokenizer, asked, max_new_tokens=6, sampling={"seed": seed}) for seed in (0, 0, 1)]
    assert said[0] == said[1] != said[2]
    assert torch.equal(torch.get_rng_state(), state)
    greedy = generate_greedily(model, tokenizer, asked, max_new_tokens=6)
    assert generate_samples(model, tokenizer, asked, max_new_tokens=6, sampling={"temperature": 1e-6}) == greedy
    assert said[0] != greedy


def test_every_token_can_be_drawn_and_not_only_the_fifty_likeliest() -> None:
    """Which are all that Transformers draws from unless it is told otherwise."""
    tokenizer = byte_level(None)
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=8, n_embd=8, n_layer=1, n_head=1))
    model.lm_head.weight.data.mul_(1e-2)  # hardly a token is likelier than another, and none exactly as likely
    said = generate_samples(model.eval(), tokenizer, [[5]] * 1500, max_new_tokens=1, batch_size=1500)
    assert len(set(said)) > 70


def test_the_best_of_many_samples_is_scored(small: tuple[Any, Any]) -> None:
    model, tokenizer = small
    found = sampling_probe(model, tokenizer, FORGET, SamplingSettings(samples=6, max_new_tokens=4))
    assert [point["k"] for point in found["points"]] == [1, 2, 4, 6]
    assert [len(recalls) for recalls in found["values"]] == [6] * 5
    for point in found["points"]:
        best = [oracle.expected_best(recalls, point["k"]) for recalls in found["values"]]
        assert point["rouge_l_recall"] == pytest.approx(sum(best) / 5)
        assert point["interval"][0] <= point["rouge_l_recall"] <= point["interval"][1]
    means = [point["rouge_l_recall"] for point in found["points"]]
    assert means == sorted(means)
    with pytest.raises(ValueError, match="sampling_probe: expected a question"):
        sampling_probe(model, tokenizer, [{"question": "", "answer": "Some text."}])


def test_samples_of_no_temperature_are_the_greedy_answer(small: tuple[Any, Any]) -> None:
    model, tokenizer = small
    found = sampling_probe(model, tokenizer, FORGET, SamplingSettings(samples=3, temperature=1e-6, max_new_tokens=4))
    asked = [prompt_ids(tokenizer, row["question"]) for row in FORGET]
    greedy = generate_greedily(model, tokenizer, asked, max_new_tokens=4)
    recalls = [rouge_recall(said, row["answer"]) for said, row in zip(greedy, FORGET, strict=True)]
    assert found["values"] == [[recall] * 3 for recall in recalls]
    assert found["temperature"] == 1e-6


# ---- layers


def test_every_layer_is_read_off_as_if_it_were_the_last(small: tuple[Any, Any]) -> None:
    model, tokenizer = small
    encoded = [encode(tokenizer, row["question"], row["answer"]) for row in FORGET]
    found = logit_lens(model.train(), encoded, pad_token_id=padding_id(tokenizer), batch_size=2)
    assert model.training
    model.eval()
    with torch.no_grad():
        expected = [oracle.llama_lens(model, *example) for example in encoded]
    assert [layer["layer"] for layer in found["layers"]] == [0, 1, 2]
    for place, layer in enumerate(found["layers"]):
        mean = sum(values[place] for values in expected) / len(expected)
        close(torch.tensor(layer["probability"]), torch.tensor(mean), SCORED)
    says = answer_probabilities(model, encoded, pad_token_id=padding_id(tokenizer))
    close(torch.tensor(found["layers"][-1]["probability"]), torch.tensor(sum(says) / len(says)), SCORED)


@pytest.mark.filterwarnings("ignore:.*computes all its logits.*")
def test_a_model_whose_norm_is_not_known_is_refused(small: tuple[Any, Any]) -> None:
    _, tokenizer = small
    encoded = [encode(tokenizer, row["question"], row["answer"]) for row in FORGET]
    torch.manual_seed(0)
    sizes = {"n_positions": 64, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).eval()
    assert len(logit_lens(model, encoded, pad_token_id=0)["layers"]) == 2
    model.transformer.norm = torch.nn.LayerNorm(8)  # of the name that other families have, and never called
    with pytest.raises(ValueError, match="logit_lens: expected a final norm whose output is the last hidden states"):
        logit_lens(model, encoded, pad_token_id=0)
    del model.transformer.norm
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="logit_lens: expected a model whose logits are its head"):
        logit_lens(model, encoded, pad_token_id=0)
    with pytest.raises(ValueError, match="logit_lens: expected examples"):
        logit_lens(model, [], pad_token_id=0)


def test_a_diverged_model_has_nan_in_the_lens(small: tuple[Any, Any]) -> None:
    model, tokenizer = small
    spoilt = copy.deepcopy(model)
    next(parameter for name, parameter in spoilt.named_parameters() if "down_proj" in name).data.fill_(math.nan)
    encoded = [encode(tokenizer, row["question"], row["answer"]) for row in FORGET]
    layers = logit_lens(spoilt, encoded, pad_token_id=padding_id(tokenizer))["layers"]
    assert math.isnan(layers[-1]["probability"])


def test_probes_of_two_seeds_share_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def said(_model: Any, _tokenizer: Any, asked: list[Any], *, sampling: dict[str, Any], **_: Any) -> list[str]:
        seeds.append(sampling["seed"])
        return [""] * len(asked)

    monkeypatch.setattr(sampling_module, "generate_samples", said)
    for seed in range(3):
        sampling_probe(*model_and_tokenizer(), SPLITS["forget"], SamplingSettings(samples=4, seed=seed))
    assert len(set(seeds)) == 12


def test_the_final_norm_is_taken_once_of_the_last_layer() -> None:
    """With gains of 1, as a new model has, a second norm changes nothing."""
    model, tokenizer = model_and_tokenizer()
    with torch.no_grad():
        model.model.norm.weight.uniform_(0.2, 3.0, generator=torch.Generator().manual_seed(0))
    encoded = [encode(tokenizer, row["question"], row["answer"]) for row in SPLITS["forget"]]
    found = logit_lens(model, encoded, pad_token_id=padding_id(tokenizer))["layers"][-1]["probability"]
    says = answer_probabilities(model, encoded, pad_token_id=padding_id(tokenizer))
    expected = torch.tensor(sum(says) / len(says))
    close(torch.tensor(found), expected, LINEAR[torch.float32], scale=expected)
