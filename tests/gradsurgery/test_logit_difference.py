"""ULD at inference: the formula, the shared assistant, and decoding with two caches against a loop without caches."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("transformers", reason="LogitDifferenceModel is a Transformers model")
pytest.importorskip("peft", reason="the assistant is a peft model")

from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from gradsurgery.logit_difference import LogitDifferenceModel, assistant, logit_difference, top_logit_mask
from tests.reference import logit_difference as reference
from tests.tolerances import LINEAR, Tolerance, close

ROOT = Path(__file__).parents[2]
VOCABULARY = 23
FLOAT32 = Tolerance(2e-5, "float32 logits of a tiny model, of order 5; a cache changes the order of its sums")
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7], [11]]


def llama(seed: int = 0, layers: int = 4, vocabulary: int = VOCABULARY, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        **sizes,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(
                8.0 if parameter.dim() == 2 else 1.0
            )  # large weights: nearly uniform logits would not tell filters and beams apart
    return model


def trained(base: Any, num_layers: int = 2, seed: int = 1) -> Any:
    """An assistant with an adapter that does something: B is 0 at the start."""
    torch.manual_seed(seed)
    small = assistant(base, num_layers, lora_rank=3)
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return small.eval()


def pair(weight: float = 0.75, rate: float = 0.0, **options: Any) -> LogitDifferenceModel:
    base = llama(**options)
    return LogitDifferenceModel(base, trained(base), weight, rate)


def left_padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
    }


def without_eos(model: Any) -> None:
    """No end-of-sequence token, so that all hypotheses have one length, as in the reference."""
    model.generation_config.eos_token_id = None


# The formula


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(-40, 40), st.integers(-40, 40)), min_size=1, max_size=12),
    st.floats(0.0, 2.0),
    st.sampled_from([0.0, 0.01, 0.13, 0.3, 0.55, 0.9, 1.0]),
    st.booleans(),
)
def test_the_formula_is_the_one_written_out_token_by_token(
    logits: list[tuple[int, int]], weight: float, rate: float, generating: bool
) -> None:
    base, other = ([value / 4 for value in values] for values in zip(*logits, strict=True))
    found = logit_difference(
        torch.tensor(base, dtype=torch.float64),
        torch.tensor(other, dtype=torch.float64),
        weight,
        rate,
        generating=generating,
    )
    expected = reference.difference(base, other, weight, rate, generating)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_the_mask_works_row_by_row_and_on_many_dimensions() -> None:
    logits = torch.randn(3, 4, 50, dtype=torch.float64) * 3
    found = top_logit_mask(logits.log_softmax(-1), 0.07)
    expected = [[reference.stays(row.tolist(), 0.07) for row in matrix] for matrix in logits]
    assert found.tolist() == expected


def test_a_rate_too_small_for_one_token_still_filters_and_keeps_the_best() -> None:
    logits = torch.tensor([0.0, -1.0, -9.0]).log_softmax(
        -1
    )  # the authors' index of the k-th best is -1 here: nothing is filtered
    assert top_logit_mask(logits, 0.01).tolist() == [True, True, False]


def test_ties_with_the_last_of_the_best_stay() -> None:
    p = torch.tensor([0.9, 0.03, 0.03, 0.03, 0.01])
    assert top_logit_mask(p.log(), 0.4).tolist() == [True, True, True, True, False]


def test_without_a_filter_the_authors_log_softmax_gives_the_same_distribution() -> None:
    base, other = torch.randn(2, 5, 40, dtype=torch.float64) * 4
    ours = logit_difference(base, other, 0.8).log_softmax(-1)
    theirs = (base.log_softmax(-1) - 0.8 * other.log_softmax(-1)).log_softmax(-1)
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_arithmetic_is_float32(dtype: torch.dtype) -> None:
    base, other = (torch.randn(2, 6, 30) * 10).to(dtype)
    found = logit_difference(base, other, 0.75, 0.1)
    assert found.dtype == torch.float32
    expected = logit_difference(base.double(), other.double(), 0.75, 0.1)
    assert expected.dtype == torch.float64
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)


def test_nan_is_never_hidden() -> None:
    base, other = torch.zeros(2, 4), torch.zeros(2, 4)
    base[0, 2] = torch.nan
    for generating in (False, True):
        found = logit_difference(base, other, 0.5, 0.5, generating=generating)
        assert found[0].isnan().any()
        assert not found[1].isnan().any()
    other[1, 1] = torch.nan
    assert logit_difference(base, other)[1].isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_outside_its_domain_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        top_logit_mask(torch.zeros(3), rate)
    with pytest.raises(ValueError, match="between 0 and 1"):
        LogitDifferenceModel(llama(), llama(layers=1), 0.5, rate)


@pytest.mark.parametrize("weight", [-0.8, float("nan"), float("inf")])
def test_the_authors_negative_weight_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        logit_difference(torch.zeros(3), torch.zeros(3), weight)
    with pytest.raises(ValueError, match="weight"):
        LogitDifferenceModel(llama(), llama(layers=1), weight)


def test_logits_of_other_shapes_are_refused_instead_of_broadcast() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\] and \[1, 3\]"):
        logit_difference(torch.zeros(2, 3), torch.zeros(1, 3))


# The assistant


@pytest.mark.parametrize("tied", [False, True])
def test_the_assistant_shares_every_weight_and_freezes_it(tied: bool) -> None:
    base = llama(tie_word_embeddings=tied)
    small: Any = assistant(base, 2, lora_rank=3)
    theirs = dict(base.named_parameters(remove_duplicate=False))
    inner = small.get_base_model()
    names = set()
    for name, parameter in inner.named_parameters(remove_duplicate=False):
        if "lora_" in name:
            assert parameter.requires_grad
            continue
        name = name.replace(".base_layer", "")
        assert parameter.data_ptr() == theirs[name].data_ptr(), name
        assert not parameter.requires_grad
        names.add(name)
    assert names == {name for name in theirs if ".layers.2" not in name and ".layers.3" not in name}
    # Seven linear layers in each of two blocks, never the head: rank * (in + out).
    shapes = [p.shape for n, p in theirs.items() if ".layers.0." in n and p.dim() == 2]
    assert sum(p.numel() for p in small.parameters() if p.requires_grad) == 2 * 3 * sum(a + b for a, b in shapes)
    assert {p.data_ptr() for p in inner.parameters() if not p.requires_grad} <= {
        p.data_ptr() for p in base.parameters()
    }


def test_the_untrained_assistant_is_the_model_cut_after_its_first_layers() -> None:
    base, tokens = llama(), torch.tensor([[3, 1, 4, 1, 5]])
    cut = llama(layers=2)
    cut.load_state_dict({k: v for k, v in base.state_dict().items() if ".layers.2" not in k and ".layers.3" not in k})
    close(assistant(base, 2)(input_ids=tokens).logits, cut(tokens).logits, FLOAT32)
    close(assistant(base, 4)(input_ids=tokens).logits, base(tokens).logits, FLOAT32)


def test_building_and_training_the_assistant_leave_the_model_untouched() -> None:
    base, tokens = llama().train(), torch.tensor([[3, 1, 4, 1, 5]])
    base.get_parameter("model.norm.weight").requires_grad_(False)
    before = copy.deepcopy(base.state_dict()), base.config.to_dict(), [p.requires_grad for p in base.parameters()]
    modules, expected = [type(module) for module in base.modules()], base(tokens).logits
    small = assistant(base, 2, lora_rank=3, lora_alpha=7.0, lora_dropout=0.1).train()
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(4):
        small(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in before[0].items())
    assert (base.config.to_dict(), [p.requires_grad for p in base.parameters()]) == before[1:]
    assert [type(module) for module in base.modules()] == modules
    assert all(p.grad is None for p in base.parameters())
    assert base.training
    assert torch.equal(base(tokens).logits, expected)
    assert not torch.allclose(small.eval()(input_ids=tokens).logits, assistant(base, 2)(input_ids=tokens).logits)


def test_merging_the_adapter_into_the_shared_weights_is_refused() -> None:
    base = llama()
    before = copy.deepcopy(base.state_dict())
    small: Any = trained(base)
    for merge in (small.merge_and_unload, small.merge_adapter, small.base_model.merge_and_unload):
        with pytest.raises(RuntimeError, match="base model's own storage"):
            merge()
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in before.items())


def test_the_config_is_a_copy_with_fewer_layers_and_layer_types() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        num_hidden_layers=4,
        **sizes,
        use_sliding_window=True,
        sliding_window=3,
        max_window_layers=2,
    )
    base = Qwen2ForCausalLM(config).eval()
    assert len(base.config.layer_types) == 4
    small = trained(base, 3)
    assert (small.config.num_hidden_layers, small.config.layer_types) == (3, base.config.layer_types[:3])
    assert base.config.num_hidden_layers == 4
    model = LogitDifferenceModel(base, small)
    without_eos(model)
    found = model.generate(torch.tensor([PROMPTS[2]]), max_new_tokens=6, do_sample=False)
    assert found[0].tolist() == reference.greedy(base, small, PROMPTS[2], 6, 0.75, 0.0)


def test_gpt2_works_too() -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=2, n_positions=32)).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(20.0 if parameter.dim() == 2 else 1.0)
    before = copy.deepcopy(base.state_dict())
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        small = trained(base, 1)
    model = LogitDifferenceModel(base, small)
    without_eos(model)
    # GPT-2 counts positions from the left: with padding there, it needs to be told the positions.
    found = model.generate(**left_padded(PROMPTS), max_new_tokens=6, do_sample=False, pad_token_id=0)[:, 7:]
    expected = [reference.greedy(base, small, prompt, 6, 0.75, 0.0)[len(prompt) :] for prompt in PROMPTS]
    assert found.tolist() == expected
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("layers", [0, -1, 5])
def test_a_depth_the_model_does_not_have_is_refused(layers: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 4"):
        assistant(llama(), layers)


def test_state_space_layers_alone_are_refused_because_no_cache_pairs_them() -> None:
    sizes = {"vocab_size": 40, "hidden_size": 16}
    mamba = MambaForCausalLM(MambaConfig(**sizes, num_hidden_layers=2, state_size=4))
    with pytest.raises(TypeError, match="expected a model with layers of attention, found MambaForCausalLM"):
        assistant(mamba, 1, lora_rank=2)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    experts = {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    }
    mixed = Qwen3NextForCausalLM(Qwen3NextConfig(**sizes, **heads, **linear, **experts, num_hidden_layers=4)).eval()
    with pytest.raises(ValueError, match="num_layers: expected at least 4, the first layer with attention"):
        assistant(mixed, 1, lora_rank=2)
    both = LogitDifferenceModel(mixed, assistant(mixed, 4, lora_rank=2), weight=0.5)
    assert both.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, min_new_tokens=2, do_sample=False).shape == (1, 5)


def test_models_without_decoder_layers_or_with_an_adapter_are_refused() -> None:
    with pytest.raises(TypeError, match="found Linear"):
        assistant(torch.nn.Linear(2, 2), 1)
    with pytest.raises(TypeError, match="merge it first"):
        assistant(assistant(llama(), 2), 1)
    with pytest.raises(ValueError, match="lora_rank"):
        assistant(llama(), 1, lora_rank=0)


# The model


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_scoring_gives_the_formula_of_both_models_logits(rate: float) -> None:
    model, batch = pair(0.6, rate), left_padded(PROMPTS)
    with torch.no_grad():
        base, other = (part(**batch).logits for part in (model.base, model.assistant))
        expected = [
            [
                reference.difference(b.tolist(), a.tolist(), 0.6, rate, generating=False)
                for b, a in zip(*rows, strict=True)
            ]
            for rows in zip(base, other, strict=True)
        ]
        output = model(**batch)
    close(output.logits, torch.tensor(expected), FLOAT32, scale=10.0)
    if rate:
        filtered = ~top_logit_mask(base.log_softmax(-1), rate)
        assert filtered.any()
        assert torch.equal(output.logits[filtered], base[filtered])


def test_weight_zero_is_the_base() -> None:
    model, tokens = pair(0.0), torch.tensor([PROMPTS[0]])
    assert torch.equal(model(tokens).logits, model.base(tokens).logits)


def test_labels_give_transformers_own_loss() -> None:
    model, tokens = pair(), torch.tensor([PROMPTS[0], PROMPTS[0][::-1]])
    labels = tokens.clone()
    labels[0, :3] = -100
    output = model(tokens, labels=labels)
    model.base.loss_type = "ForCausalLM"
    close(output.loss, model.base.loss_function(output.logits, labels, VOCABULARY), FLOAT32)
    loss, logits, cache = model(tokens, labels=labels, return_dict=False)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)
    assert cache.get_seq_length() == 5


def test_the_cache_gives_the_same_logits_token_by_token() -> None:
    model, tokens = pair(rate=0.2), torch.tensor([PROMPTS[2], PROMPTS[2][::-1]])
    with torch.no_grad():
        expected = model(tokens, use_cache=False)
        assert expected.past_key_values is None
        cache, found = None, []
        for position in range(tokens.shape[1]):
            output = model(tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache, _ = output.past_key_values, found.append(output.logits)
            assert cache.get_seq_length() == position + 1
    close(torch.cat(found, 1), expected.logits, FLOAT32, scale=10.0)
    assert [len(half.layers) for half in (cache.base, cache.assistant)] == [4, 2]
    close(model(tokens, logits_to_keep=2).logits, expected.logits[:, -2:], FLOAT32, scale=10.0)


def test_cropping_and_selecting_act_on_both_caches() -> None:
    model, tokens = pair(), torch.tensor([PROMPTS[2], PROMPTS[2][::-1], [4] * 7])
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
        cache.crop(-3)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        found = model(torch.full((4, 1), 6), past_key_values=cache).logits[:, 0]
        for row, source in enumerate((0, 0, 2, 2)):
            expected = model(torch.cat([tokens[source, :4], torch.tensor([6])])[None]).logits[0, -1]
            close(found[row], expected, FLOAT32, scale=10.0)
    with pytest.raises(RuntimeError, match="half"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    cache.reset()
    assert cache.get_seq_length() == 0


def test_a_cache_of_one_model_is_refused() -> None:
    model = pair()
    with pytest.raises(TypeError, match="PairedCache, found DynamicCache"):
        model(torch.tensor([[3]]), past_key_values=DynamicCache())


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_greedy_is_the_loop_without_cache_for_left_padded_batches(rate: float) -> None:
    model = pair(rate=rate)
    without_eos(model)
    found = model.generate(**left_padded(PROMPTS), max_new_tokens=8, do_sample=False)[:, 7:]
    expected = [reference.greedy(model.base, model.assistant, p, 8, 0.75, rate)[len(p) :] for p in PROMPTS]
    assert found.tolist() == expected
    uncached = model.generate(**left_padded(PROMPTS), max_new_tokens=8, do_sample=False, use_cache=False)
    assert uncached[:, 7:].tolist() == expected
    alone = model.base.generate(**left_padded(PROMPTS), max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert alone[:, 7:].tolist() != expected, "the assistant changes nothing: this test could not fail"


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_sampling_is_the_loop_without_cache_at_the_same_seed(rate: float) -> None:
    model = pair(rate=rate)
    without_eos(model)
    torch.manual_seed(7)
    found = model.generate(
        **left_padded(PROMPTS), max_new_tokens=8, do_sample=True, temperature=1.3, top_k=0, top_p=1.0
    )
    expected = reference.sample(model.base, model.assistant, PROMPTS, 8, 0.75, rate, 1.3, seed=7)
    assert found[:, 7:].tolist() == [tokens[len(prompt) :] for tokens, prompt in zip(expected, PROMPTS, strict=True)]


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_beam_search_is_the_exhaustive_one_without_cache(rate: float) -> None:
    model = pair(rate=rate)
    without_eos(model)
    found = model.generate(**left_padded(PROMPTS), max_new_tokens=5, num_beams=3, do_sample=False)[:, 7:]
    expected = [reference.beam(model.base, model.assistant, p, 5, 3, 0.75, rate)[len(p) :] for p in PROMPTS]
    assert found.tolist() == expected
    greedy = model.generate(**left_padded(PROMPTS), max_new_tokens=5, do_sample=False)[:, 7:]
    assert greedy.tolist() != expected, "beams never part from greedy: this test could not fail"


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 5.0, "top_k": 0},
        {"num_beams": 4, "num_return_sequences": 4},
        {"do_sample": False},
    ],
)
def test_filtered_tokens_are_never_generated(options: dict[str, Any]) -> None:
    model = pair(2.0, 0.3)
    without_eos(model)
    start = PROMPTS[0]
    number = {} if "num_beams" in options else {"input_ids": torch.tensor([start] * 20)}
    found = model.generate(**{"input_ids": torch.tensor([start]), "max_new_tokens": 8, **options, **number})
    for tokens in {tuple(row.tolist()) for row in found}:
        for length in range(len(start), len(tokens)):
            row = reference.row(model.base, model.assistant, tokens[:length], 2.0, 0.3)
            assert row[tokens[length]] > -torch.inf
            assert (row == -torch.inf).any()


def test_generation_stops_at_eos_and_goes_on_from_a_returned_cache() -> None:
    model = pair()
    tokens = torch.tensor([PROMPTS[0]])
    without_eos(model)
    whole = model.generate(tokens, max_new_tokens=8, do_sample=False)
    first = model.generate(tokens, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    rest = model.generate(first.sequences, max_new_tokens=5, do_sample=False, past_key_values=first.past_key_values)
    assert torch.equal(rest, whole)
    new = whole[0, 5:].tolist()
    stopped = model.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=new[2])
    assert stopped[0, 5:].tolist() == new[: new.index(new[2]) + 1]


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary of 23 tokens, found 29"):
        LogitDifferenceModel(llama(), llama(layers=1, vocabulary=29))


def test_the_base_keeps_its_generation_config_and_config() -> None:
    model = pair()
    model.generation_config.max_new_tokens = 3
    assert model.base.generation_config.max_new_tokens is None
    assert (model.config.vocab_size, model.config.max_position_embeddings) == (VOCABULARY, 2048)
    assert model.config.model_type == "logit_difference"
    assert model.base.config.model_type == "llama"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_changing_dtype_keeps_the_weights_shared(dtype: torch.dtype) -> None:
    model, tokens = pair(), torch.tensor([PROMPTS[0]])
    expected = model(tokens).logits
    model.to(dtype)
    layer = "model.layers.1.self_attn.q_proj"
    ours = model.assistant.get_base_model().get_submodule(layer).base_layer.weight
    assert ours.dtype == dtype
    assert ours.data_ptr() == model.base.get_parameter(f"{layer}.weight").data_ptr()
    if dtype == torch.float64:
        close(model(tokens).logits, expected.double(), FLOAT32, scale=10.0)


def test_an_assistant_that_was_copied_is_shared_again() -> None:
    base = llama()
    small = copy.deepcopy(trained(base))
    weight = small.get_base_model().get_submodule("model.layers.0.mlp.up_proj").base_layer.weight
    target = base.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert weight.data_ptr() != target.data_ptr()
    LogitDifferenceModel(base, small)
    assert weight.data_ptr() == target.data_ptr()


# Saving


FRESH = """
import json, sys, torch
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
refused = []
for name in (folder, folder + "/assistant"):
    try:
        AutoModelForCausalLM.from_pretrained(name)
    except (ValueError, OSError) as error:
        refused.append(str(error))
from gradsurgery.logit_difference import LogitDifferenceModel
models = [LogitDifferenceModel.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)]
tokens = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    torch.save([model(tokens).logits for model in models], folder + "/found.pt")
shared = [
    parameter.data_ptr() == dict(model.base.named_parameters())[name.replace(".base_layer", "")].data_ptr()
    for model in models
    for name, parameter in model.assistant.get_base_model().named_parameters() if "lora_" not in name
]
print(json.dumps({"refused": refused, "classes": [type(m).__name__ for m in models], "shared": all(shared) and bool(shared),
                  "settings": [[m.weight, m.top_logit_filter, m.training] for m in models]}))
"""


def test_a_fresh_process_gives_the_same_logits_and_nothing_gives_the_base_alone(tmp_path: Path) -> None:
    model, tokens = pair(0.6, 0.2), [PROMPTS[0]]
    model.save_pretrained(tmp_path)
    command = [sys.executable, "-c", FRESH, str(tmp_path), json.dumps(tokens)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout.splitlines()[-1])
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits
    for found in torch.load(tmp_path / "found.pt"):
        assert torch.equal(found, expected)
    assert report["classes"] == ["LogitDifferenceModel"] * 2
    assert report["settings"] == [[0.6, 0.2, False]] * 2
    assert report["shared"]
    assert len(report["refused"]) == 2
    assert "logit_difference" in report["refused"][0]
    assert "load the parent folder" in report["refused"][1]


def test_the_saved_adapter_holds_no_weights_of_the_base(tmp_path: Path) -> None:
    model = pair()
    model.save_pretrained(tmp_path)
    size = sum(path.stat().st_size for path in (tmp_path / "assistant").glob("*.safetensors"))
    adapter = sum(p.numel() for n, p in model.assistant.named_parameters() if "lora_" in n) * 4
    assert adapter <= size < adapter + 8192
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in model.base.state_dict().items())


def test_an_assistant_of_its_own_is_saved_whole(tmp_path: Path) -> None:
    model, tokens = LogitDifferenceModel(llama(), llama(seed=5, layers=1), 0.4), torch.tensor([PROMPTS[0]])
    model.save_pretrained(tmp_path)
    again = LogitDifferenceModel.from_pretrained(tmp_path, top_logit_filter=0.1)
    assert (again.weight, again.top_logit_filter) == (0.4, 0.1)
    again.top_logit_filter = 0.0
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_a_changed_weight_is_saved(tmp_path: Path) -> None:
    model = pair()
    model.weight = 0.3
    model.save_pretrained(tmp_path)
    assert LogitDifferenceModel.from_pretrained(tmp_path).weight == 0.3


def test_an_adapter_on_other_weights_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    model = LogitDifferenceModel(llama(), trained(llama(seed=9)))
    with pytest.raises(ValueError, match="on others"):
        model.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="base without an adapter"):
        LogitDifferenceModel(trained(llama(), 4), llama(layers=1)).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    llama(layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="found a llama"):
        LogitDifferenceModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("never", [-torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("weight", [0.0, 0.75, 1.0])
def test_what_both_models_mask_stays_masked(never: float, weight: float) -> None:
    base, assistant = torch.tensor([2.0, 1.0, never]), torch.tensor([1.0, 3.0, never])
    found = logit_difference(base, assistant, weight=weight)
    assert torch.equal(found, torch.tensor([2.0 - weight, 1.0 - 3.0 * weight, never]))
    assert float(found.softmax(-1)[2]) == 0.0


@pytest.mark.parametrize("training", [True, False])
def test_the_assistant_takes_the_mode_of_the_base(training: bool) -> None:
    base = llama().train(training)
    model = LogitDifferenceModel(base, trained(base).train(not training))
    assert {part.training for part in model.modules()} == {training}


def test_a_weight_that_the_assistant_trains_is_not_put_on_the_base() -> None:
    base = llama()
    small = copy.deepcopy(trained(base))
    weight = small.get_base_model().get_submodule("model.layers.0.mlp.up_proj").base_layer.weight.requires_grad_(True)
    LogitDifferenceModel(base, small)
    assert weight.data_ptr() != base.get_parameter("model.layers.0.mlp.up_proj.weight").data_ptr()


def test_an_assistant_that_was_loaded_refuses_to_merge(tmp_path: Path) -> None:
    pair().save_pretrained(tmp_path)
    loaded: Any = LogitDifferenceModel.from_pretrained(tmp_path).assistant
    with pytest.raises(RuntimeError, match="own storage"):
        loaded.merge_and_unload()


def test_the_loss_of_a_micro_batch_is_its_share_of_the_step() -> None:
    """As a trainer asks that accumulates: over the labels of all micro-batches, and not of this one."""
    model = pair()
    rows = torch.randint(0, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(0))
    labels = rows.masked_fill(torch.arange(6) < torch.tensor([[1], [3], [0], [4]]), -100)
    with torch.no_grad():
        whole = model(rows, labels=labels).loss
        number = int((labels[:, 1:] != -100).sum())
        parts = [model(rows[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=number).loss for i in range(4)]
    close(torch.stack(parts).sum(), whole, LINEAR[torch.float32], scale=whole)
