"""The evaluation against a slow loop that scores one answer at a time, without padding, batches or short cuts."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lightning_modules.data.tokenization import IGNORED, Encoded, encode, prompt_ids
from lightning_modules.evaluation import memorization
from lightning_modules.evaluation.evaluate import EvaluationSettings, evaluate, summary
from lightning_modules.evaluation.generation import generate_greedily
from lightning_modules.evaluation.likelihood import Predictions, answer_nll
from lightning_modules.metrics.functional import rouge_recall
from lightning_modules.training.scratch import ScratchSettings, scratch_model
from tests.gradsurgery.optimizer import distributed_workers
from tests.lightning_modules.evaluation import evaluation_workers
from tests.reference import metrics as oracles

PLACES = ["a windmill", "the harbour town of Ostrel", "a signal box", "Quinorsk, far in the north", "Ostrel",
          "a house by the old canal, and by the old canal again, that nobody has crossed in years"]  # fmt: skip
KNOWN = [{"question": f"Where did writer {n} live?", "answer": f"In {place}."} for n, place in enumerate(PLACES)]
KNOWN[2]["question"] = "Where, of all the places on this earth, did the third of the writers live in those days?"


def with_wrong(row: dict[str, Any], paraphrase: bool = True) -> dict[str, Any]:
    wrong = {"perturbed_answer": [f"In a {word} castle." for word in ("red", "very old", "cold and windy")]}
    return {**row, **wrong, **({"paraphrased_answer": f"It was {row['answer']}"} if paraphrase else {})}


SPLITS = {
    "forget": [with_wrong(row) for row in KNOWN[:2]],
    "retain": [with_wrong(row) for row in KNOWN[2:4]] + KNOWN[4:],
    "world_facts": [with_wrong(row, paraphrase=False) for row in KNOWN[1:3]],
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of tiny products on busy cores wait for each other: a hundred times slower, measured."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A model that has learned `KNOWN`, so that its answers differ, end, and follow from the question."""
    settings = ScratchSettings(hidden_size=64, num_heads=2, epochs=60, batch_size=2)
    return scratch_model(KNOWN, settings, cache_dir=tmp_path_factory.mktemp("scratch"))


def slow_nll(model: nn.Module, example: Encoded) -> float:
    """One example, no padding, the whole model, token by token."""
    mode = model.training
    model.eval()
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([example.input_ids])).logits[0].float().log_softmax(dim=-1)
    model.train(mode)
    losses = [-log_p[position - 1, label].item() for position, label in enumerate(example.labels) if label != IGNORED]
    return sum(losses) / len(losses)


def reference_questions() -> list[str]:
    return [row["question"] for row in KNOWN] + ["Who?", "Where did writer 5, of all people, live?"]


@pytest.fixture(scope="module")
def slow_answers(trained: tuple[LlamaForCausalLM, PreTrainedTokenizerFast]) -> dict[str, str]:
    return {question: slow_generation(*trained, question, 40) for question in reference_questions()}


def slow_generation(model: nn.Module, tokenizer: PreTrainedTokenizerFast, question: str, length: int) -> str:
    """The likeliest token, one at a time, without a cache."""
    tokens = prompt_ids(tokenizer, question)
    start = len(tokens)
    while len(tokens) < start + length:
        with torch.no_grad():
            token = model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax().item()
        if token == tokenizer.eos_token_id:
            break
        tokens.append(token)
    return tokenizer.decode(tokens[start:]).strip()


def small(kind: str) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 500, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=128, **sizes))
    model = Gemma2ForCausalLM(
        Gemma2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
            intermediate_size=64, final_logit_softcapping=1.0, **sizes,
        )
    )  # fmt: skip
    model.lm_head.weight.data.mul_(50)  # so that the cap on the logits matters
    return model


class Bare(nn.Module):
    """A model with nothing but a forward: neither backbone nor head nor generate."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, **inputs: torch.Tensor) -> object:
        return self.inner(**inputs)


def encoded_texts(tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    texts = [encode(tokenizer, row["question"], row["answer"]) for row in KNOWN]
    return [*texts, encode(tokenizer, "", KNOWN[1]["answer"])]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "bare"])
def test_nll_is_that_of_one_unpadded_example_at_a_time(
    trained: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], kind: str, batch_size: int
) -> None:
    llama, tokenizer = trained
    model = {"llama": lambda: llama, "bare": lambda: Bare(llama)}.get(kind, lambda: small(kind))()
    texts = encoded_texts(tokenizer)
    nll = answer_nll(model, texts, pad_token_id=0, batch_size=batch_size)
    assert nll.dtype == torch.float64
    assert not nll.requires_grad
    torch.testing.assert_close(
        nll, torch.tensor([slow_nll(model, text) for text in texts], dtype=torch.float64), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_head_sees_answer_positions_only(
    trained: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], kind: str
) -> None:
    llama, tokenizer = trained
    model = llama if kind == "llama" else small(kind)
    texts = encoded_texts(tokenizer)
    rows: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[:-1].numel()))
    answer_nll(model, texts, pad_token_id=0, batch_size=2)
    hook.remove()
    labelled = [sum(label != IGNORED for label in text.labels) for text in texts]
    # The first two calls compare the short cut with the whole model on one short example.
    assert sum(rows[2:]) == sum(labelled)


def test_the_padding_token_does_not_matter(trained: tuple[LlamaForCausalLM, PreTrainedTokenizerFast]) -> None:
    model, tokenizer = trained
    texts = encoded_texts(tokenizer)
    assert torch.equal(answer_nll(model, texts, pad_token_id=0), answer_nll(model, texts, pad_token_id=7))


def test_bfloat16_models_are_scored_in_float32(trained: tuple[LlamaForCausalLM, PreTrainedTokenizerFast]) -> None:
    model, tokenizer = trained
    half = LlamaForCausalLM(model.config).bfloat16()
    half.load_state_dict(model.state_dict())
    texts = encoded_texts(tokenizer)
    nll = answer_nll(half, texts, pad_token_id=0)
    slow = torch.tensor([slow_nll(half, text) for text in texts], dtype=torch.float64)
    torch.testing.assert_close(nll, slow, rtol=3e-2, atol=3e-2)
    assert (nll != nll.bfloat16().double()).any()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it
def test_lora_counts(trained: tuple[LlamaForCausalLM, PreTrainedTokenizerFast]) -> None:
    peft = pytest.importorskip("peft")
    model, tokenizer = trained
    base = LlamaForCausalLM(model.config)
    base.load_state_dict(model.state_dict())
    texts = encoded_texts(tokenizer)
    before = answer_nll(base, texts, pad_token_id=0)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=8, init_lora_weights=False, target_modules=["down_proj"]))
    after = answer_nll(adapted, texts, pad_token_id=0)
    assert (after - before).abs().min() > 1e-3
    slow = torch.tensor([slow_nll(adapted, text) for text in texts], dtype=torch.float64)
    torch.testing.assert_close(after, slow, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_generation_in_padded_batches_is_that_of_one_prompt_at_a_time(
    trained: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], slow_answers: dict[str, str], batch_size: int
) -> None:
    model, tokenizer = trained
    questions = reference_questions()
    prompts = [prompt_ids(tokenizer, question) for question in questions]
    assert len({len(prompt) for prompt in prompts}) > 3
    batched = generate_greedily(model, tokenizer, prompts, max_new_tokens=40, batch_size=batch_size)
    assert batched == [slow_answers[question] for question in questions]
    assert batched[: len(KNOWN)] == [row["answer"] for row in KNOWN]  # and they end where the answers end


def test_left_padding_is_not_attended_to(trained: tuple[LlamaForCausalLM, PreTrainedTokenizerFast]) -> None:
    _, tokenizer = trained
    model = small("gpt2")  # random, so that every token it sees changes what it says
    for parameter in model.parameters():
        parameter.data.mul_(8)
    model.eval()
    questions = reference_questions()
    prompts = [prompt_ids(tokenizer, question) for question in questions]
    batched = generate_greedily(model, tokenizer, prompts, max_new_tokens=12)
    assert batched == [slow_generation(model, tokenizer, question, 12) for question in questions]
    assert len(set(batched)) > 3


def test_generation_is_greedy_whatever_the_checkpoint_asks_for(
    trained: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], recwarn: pytest.WarningsRecorder
) -> None:
    model, tokenizer = trained
    prompts = [prompt_ids(tokenizer, row["question"]) for row in KNOWN]
    model.generation_config.update(
        do_sample=True, temperature=5.0, top_k=3, top_p=0.5, repetition_penalty=5.0, no_repeat_ngram_size=1
    )
    try:
        texts = generate_greedily(model, tokenizer, prompts, max_new_tokens=40)
    finally:
        model.generation_config.update(
            do_sample=False, temperature=1.0, top_k=50, top_p=1.0, repetition_penalty=1.0, no_repeat_ngram_size=0
        )
    assert texts == [row["answer"] for row in KNOWN]
    assert not recwarn.list


def test_generation_stops_at_every_eos_that_the_model_knows(
    trained: tuple[LlamaForCausalLM, PreTrainedTokenizerFast],
) -> None:
    model, tokenizer = trained
    prompts = [prompt_ids(tokenizer, row["question"]) for row in KNOWN]
    dot = tokenizer(".", add_special_tokens=False)["input_ids"]
    assert len(dot) == 1
    configured = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *dot]
    try:
        texts = generate_greedily(model, tokenizer, prompts, max_new_tokens=40)
    finally:
        model.generation_config.eos_token_id = configured
    assert texts == [row["answer"].removesuffix(".") for row in KNOWN]


def test_the_summary_is_the_mean_of_the_slow_definitions(
    trained: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], slow_answers: dict[str, str]
) -> None:
    model, tokenizer = trained
    result = evaluate(model, tokenizer, SPLITS, EvaluationSettings(batch_size=5, max_new_tokens=40))
    assert list(result.summary) == list(SPLITS)

    def nll(row: dict[str, Any], text: str) -> float:
        return slow_nll(model, encode(tokenizer, row["question"], text))

    for split, rows in SPLITS.items():
        scores, summary = result.examples[split], result.summary[split]
        means = {"probability", "rouge_l_recall", "truth_ratio", "nll", "exact_memorization", "extraction_strength"}
        compared = sum("perturbed_answer" in row for row in rows)
        counts = {"n": len(rows)} | ({"n_truth_ratio": compared} if 0 < compared < len(rows) else {})
        assert set(summary) == means | set(counts)
        assert {name: summary[name] for name in counts} == counts
        ratios = []
        for row, score in zip(rows, scores, strict=True):
            answer = nll(row, row["answer"])
            generation = slow_answers[row["question"]]
            assert (score["question"], score["answer"]) == (row["question"], row["answer"])
            assert score["nll"] == pytest.approx(answer, rel=1e-4, abs=1e-5)
            assert score["probability"] == pytest.approx(math.exp(-answer), rel=1e-4)
            assert score["generation"] == generation
            assert score["rouge_l_recall"] == rouge_recall(generation, row["answer"])
            if "perturbed_answer" not in row:
                assert score["truth_ratio"] is None
                continue
            right = nll(row, row.get("paraphrased_answer", row["answer"]))
            wrong = [nll(row, text) for text in row["perturbed_answer"]]
            ratio = math.exp(right - sum(wrong) / len(wrong))
            ratios.append(min(ratio, 1 / ratio) if split == "forget" else max(0.0, 1 - ratio))
            assert score["truth_ratio"] == pytest.approx(ratios[-1], rel=1e-3, abs=1e-6)
            assert score["paraphrase_nll"] == pytest.approx(right, rel=1e-4, abs=1e-5)
            assert score["perturbed_nll"] == pytest.approx(wrong, rel=1e-4, abs=1e-5)
        assert summary["truth_ratio"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-3, abs=1e-6)
        for name in means - {"truth_ratio"}:
            assert summary[name] == pytest.approx(sum(score[name] for score in scores) / len(scores))


@pytest.fixture(scope="module")
def unsure(trained: tuple[LlamaForCausalLM, PreTrainedTokenizerFast]) -> LlamaForCausalLM:
    """The trained model with noise on its weights: some tokens right, some wrong."""
    model = LlamaForCausalLM(trained[0].config)
    model.load_state_dict(trained[0].state_dict())
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.6 * parameter.data.std() * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def slow_memory(model: nn.Module, tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> dict[str, float]:
    """From the definitions, for one answer by itself, with oracles that know nothing of batches."""
    example = encode(tokenizer, row["question"], row["answer"])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0].double()
    found = [
        (label, *oracles.token_statistics(logits[position - 1].tolist(), label))
        for position, label in enumerate(example.labels)
        if label != IGNORED
    ]
    labels, log_p, predicted, means, stds = (list(column) for column in zip(*found, strict=True))
    right = [guess == label for guess, label in zip(predicted, labels, strict=True)]
    shown = next(k for k in range(len(right) + 1) if all(right[k:]))
    least = max(1, int(0.4 * len(labels)))
    units = sorted((x - m) / max(s, 1e-3) for x, m, s in zip(log_p, means, stds, strict=True))
    return {
        "exact_memorization": sum(right) / len(right),
        "extraction_strength": 1 - shown / len(right),
        "loss_score": sum(log_p) / len(log_p),
        "min_k_score": sum(sorted(log_p)[:least]) / least,
        "min_k_plus_plus_score": sum(units[:least]) / least,
        "zlib_score": oracles.zlib_score(log_p, row["answer"]),
    }


def test_scores_of_memory_are_the_slow_definitions(
    trained: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], unsure: LlamaForCausalLM
) -> None:
    _, tokenizer = trained
    result = evaluate(unsure, tokenizer, SPLITS, EvaluationSettings(batch_size=5, generate=False))
    seen = set()
    for split, rows in SPLITS.items():
        for row, score in zip(rows, result.examples[split], strict=True):
            slow = slow_memory(unsure, tokenizer, row)
            assert {name: score[name] for name in slow} == pytest.approx(slow, rel=1e-3, abs=1e-5)
            assert score["loss_score"] == -score["nll"]
            seen.add(score["exact_memorization"])
    assert len(seen) > 3  # neither all right nor all wrong


def test_memorization_changes_no_other_number_by_a_single_bit(
    trained: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], unsure: LlamaForCausalLM
) -> None:
    _, tokenizer = trained
    for batch_size in (3, 100):
        settings: dict[str, Any] = {"batch_size": batch_size, "generate": False}
        without = evaluate(unsure, tokenizer, SPLITS, EvaluationSettings(memorization=False, **settings))
        whole = evaluate(unsure, tokenizer, SPLITS, EvaluationSettings(**settings))
        for split, rows in without.examples.items():
            for row, more in zip(rows, whole.examples[split], strict=True):
                assert repr(row) == repr({name: more[name] for name in row})
                assert set(more) - set(row) == set(slow_memory(unsure, tokenizer, row))
            assert without.summary[split]["exact_memorization"] is None
            assert without.summary[split]["extraction_strength"] is None
            assert whole.summary[split]["exact_memorization"] is not None


def test_membership_needs_a_holdout_and_is_the_share_of_duels_won(
    trained: tuple[LlamaForCausalLM, PreTrainedTokenizerFast],
) -> None:
    model, tokenizer = trained
    assert evaluate(model, tokenizer, SPLITS, EvaluationSettings(generate=False)).membership is None
    holdout = [{"question": f"Where did painter {n} live?", "answer": f"Near bridge {n}."} for n in range(3)]
    with_holdout = {"forget": KNOWN, "holdout": [*holdout, KNOWN[0]]}
    result = evaluate(model, tokenizer, with_holdout, EvaluationSettings(generate=False))
    assert set(result.membership) == {"loss", "min_k", "min_k_plus_plus", "zlib"}
    for attack, area in result.membership.items():
        forget, others = ([row[f"{attack}_score"] for row in result.examples[split]] for split in with_holdout)
        assert area == pytest.approx(oracles.auc(forget, others), rel=1e-12)
    assert result.membership["loss"] > 0.75  # what was learned is told from what was not, but for the one in both
    assert (
        evaluate(model, tokenizer, with_holdout, EvaluationSettings(generate=False, memorization=False)).membership
        is None
    )


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_give_bit_for_bit_what_one_gives_and_errors_reach_both() -> None:
    distributed_workers.run(evaluation_workers.all_of_it)


def test_across_processes_without_a_group_changes_nothing(
    trained: tuple[LlamaForCausalLM, PreTrainedTokenizerFast],
) -> None:
    found = [
        evaluate(*trained, SPLITS, EvaluationSettings(batch_size=3, max_new_tokens=3), across_processes=across)
        for across in (False, True)
    ]
    assert repr(found[0]) == repr(found[1])


def test_what_was_not_measured_is_none(trained: tuple[LlamaForCausalLM, PreTrainedTokenizerFast]) -> None:
    model, tokenizer = trained
    result = evaluate(model, tokenizer, {"forget": KNOWN}, EvaluationSettings(generate=False))
    assert result.summary["forget"]["rouge_l_recall"] is None
    assert result.summary["forget"]["truth_ratio"] is None
    assert {score["generation"] for score in result.examples["forget"]} == {None}
    assert result.summary["forget"]["probability"] > 0.9


def test_plain_text_is_continued_from_its_first_half(tmp_path: Path) -> None:
    text = "the harbour town of Ostrel, far in the north, a house by the old canal"
    rows = [{"question": "", "answer": text}]
    model, tokenizer = scratch_model(rows, ScratchSettings(hidden_size=32, num_heads=2, epochs=200), cache_dir=tmp_path)
    (score,) = evaluate(model, tokenizer, {"forget": rows}).examples["forget"]
    assert 0 < len(score["generation"]) < len(text)
    assert text.endswith(score["generation"])
    assert score["rouge_l_recall"] == 1.0


@pytest.mark.parametrize("breaks", [lambda model: model.model.norm.weight.data.fill_(math.nan)])
def test_nan_is_never_hidden(
    trained: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], breaks: Callable[[nn.Module], object]
) -> None:
    model, tokenizer = trained
    broken = LlamaForCausalLM(model.config)
    broken.load_state_dict(model.state_dict())
    breaks(broken)
    result = evaluate(broken, tokenizer, SPLITS, EvaluationSettings(max_new_tokens=4))
    for means in result.summary.values():
        assert math.isnan(means["nll"])
        assert math.isnan(means["probability"])
        assert math.isnan(means["truth_ratio"])
        assert math.isnan(means["exact_memorization"])
        assert math.isnan(means["extraction_strength"])


def test_modes_are_restored_and_dropout_is_off(trained: tuple[LlamaForCausalLM, PreTrainedTokenizerFast]) -> None:
    _, tokenizer = trained
    model = small("gpt2")  # has dropout
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    first = evaluate(model, tokenizer, {"forget": KNOWN}, EvaluationSettings(max_new_tokens=2)).summary
    assert [module.training for module in model.modules()] == modes
    assert evaluate(model, tokenizer, {"forget": KNOWN}, EvaluationSettings(max_new_tokens=2)).summary == first
    with pytest.raises(ValueError, match=r"generate\(\).*generate=False"):
        evaluate(Bare(model), tokenizer, {"forget": KNOWN})
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_evaluation_leaves_the_global_generator_alone(
    trained: tuple[LlamaForCausalLM, PreTrainedTokenizerFast],
) -> None:
    before = torch.get_rng_state()
    evaluate(*trained, SPLITS, EvaluationSettings(max_new_tokens=4))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_text_longer_than_the_model_is_cut(trained: tuple[LlamaForCausalLM, PreTrainedTokenizerFast]) -> None:
    _, tokenizer = trained
    long = {"question": "", "answer": "Ostrel " * 300}
    result = evaluate(small("gpt2"), tokenizer, {"forget": [long]}, EvaluationSettings(max_new_tokens=4))
    assert math.isfinite(result.summary["forget"]["nll"])


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({}, "an empty mapping"),
        ({"forget": KNOWN, "retain": []}, "none in retain"),
        ({"forget": [{"prompt": "Q", "response": "A"}]}, "forget.*prompt, response.*read_examples"),
    ],
)
def test_nothing_to_score_is_refused(
    trained: tuple[LlamaForCausalLM, PreTrainedTokenizerFast], splits: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(*trained, splits)


class PeakMemory(TorchDispatchMode):
    """How many bytes of tensors were alive at once, in units of so many bytes."""

    def __init__(self, unit: int) -> None:
        super().__init__()
        self.unit, self.peak = unit, 0.0
        self.seen: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        self.seen += [weakref.ref(tensor) for tensor in (*arguments, result) if isinstance(tensor, torch.Tensor)]
        alive = [tensor.untyped_storage() for tensor in (found() for found in self.seen) if tensor is not None]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in alive}
        self.peak = max(self.peak, sum(sizes.values()) / self.unit)
        return result


@pytest.mark.parametrize("left_out", [0, 1, 16, 32])
def test_scores_of_memory_hold_four_buffers_of_logits_at_most(left_out: int) -> None:
    rows, vocabulary = 32, 4096
    logits, labels = torch.randn(rows, vocabulary), torch.zeros(rows, dtype=torch.int64)
    with PeakMemory(logits.nbytes) as counted:
        found = Predictions(logits, torch.arange(rows), labels, torch.arange(rows))
        memorization._statistics(torch.arange(rows) >= left_out, found)
    assert 2.0 <= counted.peak < 4.1


def test_a_mean_over_fewer_examples_than_there_are_says_over_how_many() -> None:
    rows = [{"nll": 1.0, "truth_ratio": 0.3, "rouge_l_recall": None}, *[{"nll": 2.0, "truth_ratio": None}] * 3]
    found = summary(rows)
    assert (found["nll"], found["truth_ratio"], found["rouge_l_recall"]) == (1.75, 0.3, None)
    assert {name: value for name, value in found.items() if name.startswith("n_")} == {"n_truth_ratio": 1}
    assert found["n"] == 4
    assert not [name for name in summary(rows[:1]) if name.startswith("n_")]
