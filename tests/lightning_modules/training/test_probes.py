"""The two probes: plain loops on copies of the model, which they never touch."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import lightning_modules as lm
from lightning_modules.data.tokenization import Encoded
from lightning_modules.training.adapter_settings import AdapterSettings
from lightning_modules.training.adapters import adapt
from lightning_modules.training.callbacks import (
    QuantizationProbe,
    RelearnSettings,
    mean_probabilities,
    quantization_probe,
    quantize_,
    relearn_probe,
    round_to_nearest,
)
from tests.lightning_modules.training.test_callbacks import VOCABULARY, Bigram, examples
from tests.reference import callbacks as oracle
from tests.tolerances import Tolerance, close

pytestmark = pytest.mark.filterwarnings("ignore:.*computes all its logits.*")

ROUNDED = Tolerance(
    1e-6, "a float32 product and quotient of numbers of order 1; no value is near the middle of two levels"
)
HALF = Tolerance(3e-2, "a few bfloat16 products of numbers of order 1, which are exact to 4e-3")
RELEARNED = Tolerance(2e-5, "as STEPPED_FLOAT32: eight float32 steps of AdamW on numbers of order 1")


# ---- RelearnProbe


@pytest.mark.parametrize("mode", [True, False])
def test_the_probe_is_a_plain_loop_on_a_copy(mode: bool) -> None:
    model, forget, retain = Bigram().train(mode), examples(8, 3), examples(3, 4)
    model.table.grad = torch.ones_like(model.table)
    before, state = model.table.detach().clone(), torch.get_rng_state()
    with torch.no_grad():  # Lightning may call from there
        settings = RelearnSettings(steps=8, every=3, lr=0.05, batch_size=2)
        found = relearn_probe(model, forget, retain, pad_token_id=0, settings=settings)
    assert torch.equal(model.table, before)
    assert torch.equal(model.table.grad, torch.ones_like(before))
    assert model.training is mode
    assert torch.equal(torch.get_rng_state(), state)
    taught, rest = [forget[2], forget[6]], [row for index, row in enumerate(forget) if index not in (2, 6)]
    assert [point["step"] for point in found["points"]] == [0, 3, 6, 8]
    assert (found["taught"], found["rest"]) == (2, 6)
    for point in found["points"]:
        table = oracle.relearned(before, taught, point["step"], 0.05)
        for name, rows in (("taught", taught), ("rest", rest), ("retain", retain)):
            expected = sum(oracle.probability(table, *row) for row in rows) / len(rows)
            close(torch.tensor(point[name]), torch.tensor(expected), RELEARNED)
    assert found["points"][-1]["taught"] > found["points"][0]["taught"]


def test_batches_of_a_part_see_every_taught_answer_in_turn() -> None:
    seen: list[int] = []

    class Watched(Bigram):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
            if torch.is_grad_enabled():
                seen.extend(input_ids[:, 0].tolist())
            return super().forward(input_ids)

    forget = [Encoded([first, 1, 2], [-100, 1, 2]) for first in range(8)]
    relearn_probe(Watched(), forget, pad_token_id=0, settings=RelearnSettings(steps=4, batch_size=2, share=0.5))
    assert sorted(seen) == sorted([1, 3, 5, 7] * 2)
    assert sorted(seen[:4]) == [1, 3, 5, 7]


@pytest.mark.parametrize(("every", "times"), [(2, 3), (3, 3), (4, 2), (9, 2)])
def test_every_answer_is_scored_once_at_every_point_and_no_more(every: int, times: int) -> None:
    seen: list[int] = []

    class Watched(Bigram):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
            if not torch.is_grad_enabled():
                seen.extend(input_ids[:, 0].tolist())
            return super().forward(input_ids)

    forget = [Encoded([first, 1, 2], [-100, 1, 2]) for first in range(8)]
    settings = RelearnSettings(steps=4, every=every, batch_size=2, share=0.5)
    found = relearn_probe(Watched(), forget, pad_token_id=0, settings=settings)
    assert len(found["points"]) == times
    assert [seen.count(rest) for rest in (0, 2, 4, 6)] == [times] * 4
    assert found["points"][-1]["rest"] == pytest.approx(sum(found["values"]) / 4, rel=1e-6)


def test_a_bfloat16_model_is_taught_in_float32() -> None:
    model = Bigram().to(torch.bfloat16)
    found = relearn_probe(model, examples(8, 3), pad_token_id=0, settings=RelearnSettings(steps=4, lr=1e-4))
    assert found["points"][-1]["taught"] > found["points"][0]["taught"]
    assert model.table.dtype == torch.bfloat16


def test_under_autocast_every_step_reads_the_weights_as_they_are() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))
    settings = RelearnSettings(steps=20, every=20, lr=1e-2)
    exact, cast = (
        relearn_probe(model, examples(8, 3), pad_token_id=0, settings=replace(settings, autocast=autocast))
        for autocast in (False, True)
    )
    close(torch.tensor(cast["points"][0]["rest"]), torch.tensor(exact["points"][0]["rest"]), HALF)
    assert cast["points"][0]["rest"] != exact["points"][0]["rest"]
    assert exact["points"][-1]["taught"] > 0.9
    close(torch.tensor(cast["points"][-1]["taught"]), torch.tensor(exact["points"][-1]["taught"]), HALF)


def test_what_else_is_taught_leaves_all_forget_answers_to_be_tested() -> None:
    model, forget, lessons = Bigram(), examples(8, 3), examples(5, 9)
    before = model.table.detach().clone()
    settings = RelearnSettings(steps=6, every=6, lr=0.05, batch_size=5)
    found = relearn_probe(model, forget, pad_token_id=0, settings=settings, lessons=lessons)
    table = oracle.relearned(before, lessons, 6, 0.05)
    values = [oracle.probability(table, *row) for row in forget]
    assert (found["taught"], found["rest"]) == (5, 8)
    close(torch.tensor(found["values"]), torch.tensor(values), RELEARNED)
    assert found["interval"][0] < found["points"][-1]["rest"] < found["interval"][1]
    change = table - before
    close(torch.tensor(found["displacement"]), change.double().norm().float(), RELEARNED, scale=change.norm())
    relative = change.double().norm() / before.double().norm()
    close(torch.tensor(found["relative_displacement"]), relative.float(), RELEARNED, scale=relative)
    # One answer is enough to be looked at where none is taught.
    assert relearn_probe(model, forget[:1], pad_token_id=0, settings=settings, lessons=lessons)["rest"] == 1
    with pytest.raises(ValueError, match="expected lessons to teach, found none"):
        relearn_probe(model, forget, pad_token_id=0, lessons=[])


def test_adapters_are_taught_in_the_place_of_the_weights() -> None:
    model, forget = llama(), examples(8, 3)
    before = copy.deepcopy(model.state_dict())
    settings = RelearnSettings(steps=5, every=5, lr=0.02, batch_size=2, lora_rank=2)
    found = relearn_probe(model, forget, pad_token_id=0, settings=settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert found["lora_rank"] == 2
    assert found["points"][-1]["taught"] > found["points"][0]["taught"]
    # B is zero at the start and takes five steps of at most .02 a number, A stays small: so far the weights can go.
    assert 0.0 < found["displacement"] < 20.0
    assert found == relearn_probe(model, forget, pad_token_id=0, settings=settings)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"lora_rank": -1},
        {"every": 0},
        {"batch_size": 0},
        {"lr": 0.0},
        {"lr": math.inf},
        {"share": 0.0},
        {"share": 1.0},
    ],
)
def test_a_probe_outside_its_domain_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="relearn_probe: expected"):
        relearn_probe(Bigram(), examples(4, 0), pad_token_id=0, settings=RelearnSettings(**wrong))


# ---- QuantizationProbe


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_takes_the_nearest_level_of_the_row(bits: int) -> None:
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(bits))
    weight[2] = 0.0
    weight[3, 4:] = 0.0
    found = round_to_nearest(weight, bits)
    close(found.double(), oracle.rounded(weight, bits), ROUNDED, scale=weight.abs().amax())
    assert torch.equal(round_to_nearest(weight.T, bits, dim=0), found.T)
    assert all(len(row.unique()) <= 2**bits - 1 for row in found)
    assert torch.equal(round_to_nearest(found, bits), found) or bits > 2  # levels of two bits are exact


def test_rounding_hides_no_nan_and_refuses_other_bits() -> None:
    weight = torch.tensor([[1.0, math.nan], [math.inf, 1.0], [1.0, 0.5]])
    found = round_to_nearest(weight, 4)
    assert found[0].isnan().all()
    assert found[1].isnan().any()
    assert found[2].isfinite().all()
    assert round_to_nearest(torch.ones(2, 2, dtype=torch.bfloat16), 4).dtype == torch.bfloat16
    for bits in (1, 17):
        with pytest.raises(ValueError, match="2 to 16 bits"):
            round_to_nearest(weight, bits)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=False, **sizes)).eval()


def test_every_linear_weight_but_the_head_is_rounded() -> None:
    model, plain = llama(), llama()
    quantize_(model, 3)
    for (name, found), (_, weight) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        linear = ("_proj" in name) and name.endswith("weight")
        assert torch.equal(found, round_to_nearest(weight, 3) if linear else weight), name
        assert not linear or not torch.equal(found, weight)


def test_gpt2_has_its_neurons_in_columns() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    weight = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    head = model.lm_head.weight.detach().clone()
    quantize_(model, 3)
    assert torch.equal(model.transformer.h[0].attn.c_attn.weight, round_to_nearest(weight.T, 3).T)
    assert torch.equal(model.lm_head.weight, head)


def test_experts_in_one_tensor_are_refused_and_not_left_as_they_are() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=VOCABULARY, num_key_value_heads=2, num_local_experts=2, **sizes)
    model = MixtralForCausalLM(config)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"2 tensors that hold those of several experts, such as model.*experts"):
        quantize_(model, 4)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="linear layers"):
        quantize_(Bigram(), 4)


def test_the_probe_scores_rounded_copies_and_leaves_the_model() -> None:
    model, splits = llama(), {"forget": examples(3, 1), "retain": examples(3, 2)}
    before = copy.deepcopy(model.state_dict())
    points = quantization_probe(model, splits, pad_token_id=0, bits=(8, 2))["points"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [point["bits"] for point in points] == [None, 8, 2]
    for point, rounded in zip(points, (llama(), quantize_(llama(), 8), quantize_(llama(), 2)), strict=True):
        assert point == {"bits": point["bits"], **mean_probabilities(rounded, splits, pad_token_id=0)}
    assert len({point["forget"] for point in points}) == 3


def test_adapters_are_merged_before_rounding_and_stay_in_the_model() -> None:
    adapted, splits = adapt(llama(), AdapterSettings(rank=2)), {"forget": examples(3, 1)}
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    points = quantization_probe(adapted, splits, pad_token_id=0, bits=(3,))["points"]
    assert any("lora_B" in name for name, _ in adapted.named_parameters())
    merged = quantize_(copy.deepcopy(adapted).merge_and_unload(), 3)
    assert points[1]["forget"] == mean_probabilities(merged, splits, pad_token_id=0)["forget"]


def test_probes_of_sharded_weights_are_refused_by_every_process_before_training(tmp_path: Path) -> None:
    """After training the first process would wait for the others, which have gone on."""
    probe = QuantizationProbe({"forget": []}, pad_token_id=0, folder=tmp_path)
    trainer = L.Trainer(accelerator="cpu", strategy=ModelParallelStrategy(), devices=1, logger=False)
    with pytest.raises(RuntimeError, match="expected a model that one process holds whole, found sharded weights"):
        probe.setup(trainer, lm.UnlearningModule(llama()), "fit")
