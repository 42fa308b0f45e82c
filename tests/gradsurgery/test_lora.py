"""FILA against a dense float64 oracle: the importance, the factors, the model that must not change, and what is saved."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradsurgery as gs
from gradsurgery import lora
from gradsurgery.lora import low_rank as _low_rank
from tests.reference import lora as reference
from tests.tolerances import Tolerance, close

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SINGLE = Tolerance(5e-6, "float32 gradients of a two-layer model, squared and divided: a few dozen roundings of 6e-8")
RESIDUAL: dict[torch.dtype, Tolerance] = {
    torch.float32: Tolerance(1e-6, "W is split in two float32 parts of its own size and added up again, layer after layer"),
    torch.float64: Tolerance(1e-12, "the residual of the float32 factors, in float64"),
    torch.bfloat16: Tolerance(2e-2, "each weight is rounded once more to 8 bits, and so is every activation: 6e-3 measured"),
}  # fmt: skip
RELOADED = Tolerance(1e-6, "the same float32 weights, added up in another order")
FACTORS = Tolerance(2e-5, "float32 factors of a float64 decomposition; B reaches ten times the weight where s is small")
OPTIMAL = 1.002

CONFIG = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**CONFIG, intermediate_size=24, max_position_embeddings=32)
    return transformers.LlamaForCausalLM(config).to(dtype)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=16, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    )


def adapted(model: nn.Module, rank: int = 3, **options: Any) -> Any:
    return peft.get_peft_model(
        model, peft.LoraConfig(**{"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"} | options)
    )


def batches(number: int, size: int = 3, seed: int = 0) -> list[dict[str, Tensor]]:
    """Batches of different lengths, whose rows have padding and different numbers of answer tokens."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(number):
        tokens = torch.randint(3, 16, (size, 6 + index), generator=generator)
        lengths = torch.randint(4, 7 + index, (size, 1), generator=generator)
        mask = torch.arange(6 + index) < lengths
        labels = tokens.masked_fill((torch.arange(6 + index) < 2) | ~mask, -100)
        found.append({"input_ids": tokens, "attention_mask": mask.long(), "labels": labels})
    return found


FORGET, RETAIN = batches(3, seed=1), batches(4, seed=2)
TOKENS = torch.tensor([[1, 5, 9, 3, 7]])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.double()


def layers(model: Any, adapter: str = "default") -> dict[str, Any]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if adapter in getattr(module, "lora_A", ())
    }


def random_importance(model: Any, adapter: str = "default", seed: int = 0) -> dict[str, Tensor]:
    """Rows that differ by factors of up to 100."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, layer in layers(model, adapter).items():
        shape = layer.get_base_layer().weight.shape
        rows = 10 ** (2 * torch.rand(shape[0], 1, generator=generator))
        found[f"{name}.weight"] = rows * torch.rand(shape, generator=generator)
    return found


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that must be as it was: parameters, gradients, flags, modes, random state."""
    found: dict[str, Any] = {name: module.training for name, module in model.named_modules()}
    for name, parameter in model.named_parameters():
        gradient = None if parameter.grad is None else parameter.grad.clone()
        found[f"parameter {name}"] = (parameter.detach().clone(), gradient, parameter.requires_grad)
    return found | {"random": torch.get_rng_state()}


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    torch.testing.assert_close(snapshot(model), before, rtol=0.0, atol=0.0)


# Importance


@pytest.mark.parametrize("kind", [llama, gpt2])
@pytest.mark.parametrize("per", ["batch", "example"])
def test_importance_is_the_ratio_of_fishers(per: str, kind: Any) -> None:
    model = kind()
    found = lora.fisher_importance(model, FORGET, RETAIN, eps=1e-4, per=per)
    split = {
        "batch": lambda parts: parts,
        "example": lambda parts: [{k: v[i : i + 1] for k, v in part.items()} for part in parts for i in range(3)],
    }[per]
    wanted = [reference.fisher(model, split(parts), list(found)) for parts in (FORGET, RETAIN)]
    for name, values in found.items():
        expected = wanted[0][name] / (wanted[1][name] + 1e-4)
        assert values.dtype == torch.float32
        close(values.double(), expected, SINGLE, scale=expected.max())


@pytest.mark.parametrize("parts", [2, 5])
def test_read_in_parts_a_batch_counts_as_one(parts: int) -> None:
    """As processes read it; a batch may have fewer rows than parts, and a part no answer token."""
    wanted = lora.fisher_importance(llama(), FORGET, RETAIN, eps=1e-4)
    hidden = [batch | {"labels": batch["labels"].clone()} for batch in FORGET]
    hidden[0]["labels"][1] = -100
    for batch, expected in ((FORGET, wanted), (hidden, lora.fisher_importance(llama(), hidden, RETAIN, eps=1e-4))):
        found = lora.fisher_importance(llama(), batch, RETAIN, eps=1e-4, parts=parts)
        for name, values in expected.items():
            close(found[name], values, SINGLE)


def test_modules_that_share_a_weight_have_its_importance_both() -> None:
    model = llama()
    apart = lora.fisher_importance(model, FORGET, RETAIN)
    first, second = (f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1))
    model.get_submodule(second).weight = model.get_submodule(first).weight
    shared = lora.fisher_importance(model, FORGET, RETAIN)
    assert list(shared) == list(apart)
    wanted = [reference.fisher(model, parts, [f"{first}.weight"])[f"{first}.weight"] for parts in (FORGET, RETAIN)]
    expected = wanted[0] / (wanted[1] + 1e-5)
    for name in (first, second):
        close(shared[f"{name}.weight"].double(), expected, SINGLE, scale=expected.max())


def test_importance_covers_what_peft_adapts_under_plain_names() -> None:
    model = llama()
    plain = lora.fisher_importance(model, FORGET, RETAIN)
    wrapped = adapted(model)
    assert set(plain) == {f"{name}.weight" for name in layers(wrapped)}
    assert "lm_head.weight" not in plain
    through_adapters = lora.fisher_importance(wrapped, FORGET, RETAIN)
    assert through_adapters.keys() == plain.keys()
    for name in plain:
        close(through_adapters[name], plain[name], SINGLE, scale=plain[name].max())


def test_importance_follows_the_adapters_targets_and_modules() -> None:
    some = lora.fisher_importance(adapted(llama(), target_modules=["q_proj", "lm_head"]), FORGET, RETAIN)
    assert set(some) == {*(f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)), "lm_head.weight"}
    chosen = lora.fisher_importance(llama(), FORGET, RETAIN, modules=lambda name: name == "lm_head")
    assert set(chosen) == {"lm_head.weight"}


@pytest.mark.parametrize("wrap", [lambda model: model, adapted])
def test_measuring_leaves_no_trace(wrap: Any) -> None:
    model = wrap(llama()).train()
    list(model.modules())[5].eval()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    for parameter in parameters[1:4]:
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    before = snapshot(model)

    def drawing(parts: list[Any]) -> Any:
        for part in parts:
            torch.rand(3)  # as a DataLoader does
            yield part

    with torch.no_grad():
        lora.fisher_importance(model, drawing(FORGET), drawing(RETAIN))
    assert_untouched(model, before)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in parameters)

    def failing() -> Any:
        yield FORGET[0]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk"):
        lora.fisher_importance(model, FORGET, failing())
    assert_untouched(model, before)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in parameters)


def test_gradients_do_not_pile_up() -> None:
    model = llama()
    alive: list[int] = []

    def count(_: Tensor) -> None:
        alive.append(sum(parameter.grad is not None for parameter in model.parameters()))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    lora.fisher_importance(model, FORGET, RETAIN)
    assert len(alive) == 14 * 7
    assert max(alive) == 1


def test_batches_without_answer_tokens_count_nothing() -> None:
    masked = [{**FORGET[0], "labels": torch.full_like(FORGET[0]["labels"], -100)}]
    found = lora.fisher_importance(llama(), FORGET + masked, masked + RETAIN)
    wanted = lora.fisher_importance(llama(), FORGET, RETAIN)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_importance_in_bfloat16_is_accumulated_in_float32() -> None:
    """300 equal batches: in bfloat16 a sum of more than 256 equal terms stands still."""
    model = llama(torch.bfloat16)
    one = lora.fisher_importance(model, FORGET[:1], RETAIN[:1])
    many = lora.fisher_importance(model, FORGET[:1] * 300, RETAIN[:1])
    for name in one:
        assert one[name].dtype == torch.float32
        close(many[name], one[name], Tolerance(1e-4, "300 float32 sums"), scale=one[name].max())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forget_batches": []}, "forget_batches: expected at least one batch"),
        ({"retain_batches": iter(())}, "retain_batches: expected at least one batch"),
        ({"retain_batches": [{**RETAIN[0], "labels": torch.full((3, 6), -100)}]}, "found 1 batches with none"),
        ({"eps": 0.0}, "eps"),
        ({"parts": 0}, "parts: expected at least 1"),
        ({"eps": float("nan")}, "eps"),
        ({"per": "token"}, "per: expected 'batch' or 'example', found 'token'"),
        ({"modules": lambda name: False}, "none chosen"),
    ],
)
def test_measuring_refuses(arguments: dict[str, Any], message: str) -> None:
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        lora.fisher_importance(model, **{"forget_batches": FORGET, "retain_batches": RETAIN} | arguments)
    assert_untouched(model, before)


def test_one_generator_for_both_sides_is_refused() -> None:
    stream = iter(FORGET)
    with pytest.raises(ValueError, match="a generator can be read only once"):
        lora.fisher_importance(llama(), stream, stream)


def test_a_model_that_diverged_raises() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN or infinity in 14 of 14"):
        lora.fisher_importance(model, FORGET, RETAIN)


# The decomposition


@pytest.mark.parametrize("spectrum", ["gaussian", "slow", "fast", "spikes", "heavy rows"])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_large_matrices_are_within_two_thousandths(rank: int, spectrum: str) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(520, 600, generator=generator)
    index = torch.arange(1, 601).float()
    if spectrum == "heavy rows":
        matrix = torch.exp(3 * torch.randn(520, 1, generator=generator)) * matrix
    elif spectrum != "gaussian":
        powers = {"slow": index**-0.3, "fast": torch.exp(-index / 30), "spikes": torch.where(index <= 5, 100.0, 1.0)}
        matrix = matrix @ torch.diag(powers[spectrum])
    values, vectors = _low_rank.leading(matrix, rank, torch.Generator().manual_seed(1))
    best = torch.linalg.svdvals(matrix.double())
    vectors = vectors.double()
    error = (matrix.double() - matrix.double() @ vectors @ vectors.T).norm()
    assert error <= OPTIMAL * best[rank:].square().sum().sqrt()
    close(vectors.T @ vectors, torch.eye(rank, dtype=torch.float64), Tolerance(2e-6, "float32 orthogonalisation"))
    close(
        values.double(), best[:rank], Tolerance(3e-2, "leading values of a crowd, as the error allows"), scale=best[0]
    )


def test_a_large_matrix_of_low_rank_is_found_exactly() -> None:
    matrix = torch.randn(600, 5) @ torch.randn(5, 700)
    values, vectors = _low_rank.leading(matrix, 8, torch.Generator().manual_seed(0))
    assert (matrix - matrix @ vectors @ vectors.T).norm() <= 1e-5 * matrix.norm()
    assert (values[5:] <= 1e-5 * values[0]).all()


def test_the_decomposition_depends_on_the_seed_only() -> None:
    matrix = torch.randn(520, 520)
    state = torch.get_rng_state()
    first, second = (_low_rank.leading(matrix, 4, torch.Generator().manual_seed(3))[1] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, _low_rank.leading(matrix, 4, torch.Generator().manual_seed(4))[1])


# FILA


@pytest.mark.parametrize("kind", [llama, gpt2])
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, "lora_alpha": 5}, {"rank_pattern": {"up_proj|c_attn": 2}}]
)
def test_factors_are_those_of_the_formula(kind: Any, options: dict[str, Any]) -> None:
    plain = kind()
    originals = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    model = adapted(plain, fan_in_fan_out=kind is gpt2, **options)
    importance = random_importance(model)
    assert lora.fila_(model, importance, eps=1e-2) is model
    for name, layer in layers(model).items():
        key, a, b = f"{name}.weight", layer.lora_A["default"].weight, layer.lora_B["default"].weight
        transpose = (lambda matrix: matrix.T) if kind is gpt2 else (lambda matrix: matrix)
        weight, weighing = transpose(originals[key]), transpose(importance[key])
        scaling, rank = layer.scaling["default"], layer.r["default"]
        product, residual = reference.fila(weight, weighing, rank, scaling, 1e-2)
        size = float(weight.abs().max())
        close((b @ a).detach().double(), product, FACTORS, scale=size)
        close(transpose(layer.get_base_layer().weight).detach().double(), residual, FACTORS, scale=size)
        norms = a.norm(dim=1).double()
        expected = torch.linalg.svdvals(weighing.double().sum(1).sqrt()[:, None] * weight.double())[:rank] / scaling
        close(norms.square(), expected, FACTORS, scale=expected[0])  # sqrt(S) stands on either side


def test_weighted_error_is_optimal_where_the_plain_one_is_not() -> None:
    plain = llama()
    originals = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    model = adapted(plain)
    importance = random_importance(model)
    lora.fila_(model, importance)
    for name, layer in layers(model).items():
        key = f"{name}.weight"
        s = importance[key].double().sum(1).sqrt()[:, None]
        product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        best = reference.least_error(originals[key], importance[key], 3)
        assert best * (1 - 1e-6) <= (s * (originals[key].double() - product.double())).norm() <= OPTIMAL * best
        unweighted, _ = reference.fila(originals[key], torch.ones_like(importance[key]), 3, 1.0, 0.0)
        assert (s * (originals[key].double() - unweighted)).norm() > OPTIMAL * best


@pytest.mark.parametrize("dtype", RESIDUAL)
def test_the_output_is_unchanged_at_the_start(dtype: torch.dtype) -> None:
    plain = llama(dtype)
    before = logits(plain)
    model = adapted(plain)
    lora.fila_(model, lora.fisher_importance(model, FORGET, RETAIN))
    close(logits(model), before, RESIDUAL[dtype], scale=before.abs().max())
    with model.disable_adapter():  # the adapters contribute to the output
        assert (logits(model) - before).abs().max() > 10 * RESIDUAL[dtype].relative * before.abs().max()
    merged = logits(model.merge_and_unload())
    close(merged, before, RESIDUAL[dtype], scale=before.abs().max())


def test_in_bfloat16_each_weight_is_rounded_once() -> None:
    plain = llama(torch.bfloat16)
    originals = {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}
    model = adapted(plain)
    lora.fila_(model, random_importance(model))
    for name, layer in layers(model).items():
        product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        residual = (originals[f"{name}.weight"].float() - product).bfloat16()
        assert layer.get_base_layer().weight.dtype == torch.bfloat16
        close(
            layer.get_base_layer().weight.float(),
            residual.float(),
            Tolerance(2.0**-7, "a tie"),
            scale=residual.abs().max(),
        )


def test_adapters_in_bfloat16_leave_the_residual_of_what_they_are() -> None:
    """The rounded factors are subtracted: otherwise their rounding would change the output too."""
    plain = llama()
    before = logits(plain)
    model = adapted(plain)
    for layer in layers(model).values():
        layer.lora_A.bfloat16(), layer.lora_B.bfloat16()
    lora.fila_(model, random_importance(model))
    for layer in layers(model).values():
        layer.lora_A.float(), layer.lora_B.float()
    close(logits(model), before, RESIDUAL[torch.float32], scale=before.abs().max())


def test_the_same_call_gives_the_same_adapters_and_draws_nothing() -> None:
    models = [adapted(llama()) for _ in range(2)]
    importance = random_importance(models[0])
    state = torch.get_rng_state()
    for model in models:
        lora.fila_(model, importance)
    assert torch.equal(torch.get_rng_state(), state)
    first, second = ([layer.lora_B["default"].weight for layer in layers(model).values()] for model in models)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rows_and_layers_without_importance() -> None:
    """Rows with s = 0 get B = 0, a layer with s = 0 keeps PEFT's start, nothing is NaN, and everything can be trained."""
    plain = llama()
    before = logits(plain)
    model = adapted(plain)
    importance = random_importance(model)
    rows, empty, tiny = (f"model.layers.0.mlp.{name}_proj" for name in ("up", "gate", "down"))
    importance[f"{rows}.weight"][:20] = 0.0  # 4 rows of 24 are left, for a rank of 3
    importance[f"{empty}.weight"].zero_()
    importance[f"{tiny}.weight"][:8] *= 1e-20
    start = {name: layer.lora_A["default"].weight.detach().clone() for name, layer in layers(model).items()}
    lora.fila_(model, importance)
    found = layers(model)
    assert not found[rows].lora_B["default"].weight[:20].any()
    assert found[rows].lora_B["default"].weight[20:].all()
    assert torch.equal(found[empty].lora_A["default"].weight, start[empty])
    assert not found[empty].lora_B["default"].weight.any()
    assert found[tiny].lora_B["default"].weight[:8].norm() <= 1e-3 * found[tiny].lora_B["default"].weight[8:].norm()
    close(logits(model), before, RESIDUAL[torch.float32], scale=before.abs().max())
    reference.cross_entropy(model, FORGET[0])[0].backward()
    for layer in found.values():
        for matrix in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            assert matrix.isfinite().all()
        for direction in (
            layer.lora_A["default"].weight.grad.norm(dim=1),
            layer.lora_B["default"].weight.grad.norm(dim=0),
        ):
            assert direction.isfinite().all()
        moving = layer.lora_A["default"].weight.grad.norm(dim=1) + layer.lora_B["default"].weight.grad.norm(dim=0)
        assert (moving > 0.0).all()


@pytest.mark.parametrize("rows", [2, 0])
def test_a_rank_beyond_the_weights(rows: int) -> None:
    """Weights of rank 2 (and 0) under adapters of rank 3."""
    plain = llama()
    with torch.no_grad():
        plain.model.layers[0].mlp.up_proj.weight[rows:] = 0.0
    before = logits(plain)
    model = adapted(plain)
    lora.fila_(model, random_importance(model))
    layer = layers(model)["model.layers.0.mlp.up_proj"]
    assert (layer.lora_B["default"].weight.norm(dim=0) > 0.0).tolist() == [index < rows for index in range(3)]
    assert (layer.lora_A["default"].weight.norm(dim=1) > 0.0).all()
    close(logits(model), before, RESIDUAL[torch.float32], scale=before.abs().max())


def test_the_copy_of_the_start_is_not_trained() -> None:
    model = adapted(llama())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    lora.fila_(model, random_importance(model))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


def test_only_the_named_adapter_is_started() -> None:
    plain = llama()
    before = logits(plain)
    model = adapted(plain)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    first = {name: layer.lora_A["default"].weight.detach().clone() for name, layer in layers(model).items()}
    keys = layers(model)["model.layers.0.mlp.up_proj"].get_base_layer().weight.clone()
    with pytest.warns(UserWarning, match=r"set_adapter\('second'\)"):
        lora.fila_(model, random_importance(model, "second"), adapter_name="second")
    for name, layer in layers(model).items():
        assert torch.equal(layer.lora_A["default"].weight, first[name])
        assert not layer.lora_B["default"].weight.any()
    assert torch.equal(layers(model)["model.layers.0.mlp.up_proj"].get_base_layer().weight, keys)
    model.set_adapter("second")
    close(logits(model), before, RESIDUAL[torch.float32], scale=before.abs().max())


def test_what_else_reads_the_weights_keeps_the_original_ones() -> None:
    plain = llama()
    held = {name: parameter.detach() for name, parameter in plain.named_parameters()}
    before = {name: values.clone() for name, values in held.items()}
    model = adapted(plain)
    parameters = set(map(id, model.parameters()))
    lora.fila_(model, random_importance(model))
    assert all(torch.equal(held[name], before[name]) for name in held)
    assert parameters <= set(map(id, model.parameters()))  # an optimizer created before still has the right ones
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable)


def replaced(key: str, value: Tensor | None) -> Any:
    def change(importance: dict[str, Tensor]) -> None:
        if value is None:
            del importance[key]
        else:
            importance[key] = value

    return change


LAST = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced(LAST, None), f"expected an entry {LAST}"),
        (replaced(LAST, torch.ones(24, 16)), r"expected shape \[16, 24\], found \[24, 16\]"),
        (replaced(LAST, torch.ones(16)), r"expected shape \[16, 24\], found \[16\]"),
        (replaced(LAST, -torch.ones(16, 24)), "finite numbers >= 0"),
        (replaced(LAST, torch.full((16, 24), torch.nan)), "finite numbers >= 0"),
        (replaced(LAST, torch.full((16, 24), torch.inf)), "finite numbers >= 0"),
    ],
)
def test_a_wrong_importance_changes_nothing(change: Any, message: str) -> None:
    model = adapted(llama())
    importance = random_importance(model)
    change(importance)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        lora.fila_(model, importance)
    assert_untouched(model, before)


def quantised(model: Any) -> None:
    layer = layers(model)["model.layers.1.mlp.down_proj"].get_base_layer()
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)


def tied(model: Any) -> None:
    found = layers(model)
    found["model.layers.1.mlp.up_proj"].base_layer.weight = found["model.layers.1.mlp.gate_proj"].base_layer.weight


def trained(model: Any) -> None:
    layers(model)["model.layers.1.mlp.down_proj"].lora_B["default"].weight.data.fill_(0.1)


@pytest.mark.parametrize(
    ("options", "prepare", "arguments", "message"),
    [
        ({}, quantised, {}, "down_proj.weight: expected a plain floating-point weight, found Parameter of torch.int8"),
        ({}, tied, {}, "found it tied as"),
        ({}, trained, {}, "does nothing yet"),
        ({"init_lora_weights": "pissa"}, None, {}, "does nothing yet"),
        ({}, lambda model: model.merge_adapter(), {}, "unmerge_adapter"),
        ({"use_dora": True}, None, {}, "DoRA"),
        ({"lora_alpha": 0}, None, {}, r"q_proj.weight: expected a scaling .* above 0, .*found 0.0"),
        ({"lora_alpha": -4}, None, {}, r"expected a scaling .* above 0, .*found -"),
        (
            {"target_modules": ["embed_tokens"]},
            None,
            {},
            "expected an adapter on a linear layer, found one on Embedding",
        ),
        ({}, None, {"adapter_name": "other"}, "adapter_name: expected one of default, found 'other'"),
        ({}, None, {"eps": -1.0}, "eps"),
    ],
)
def test_what_fila_cannot_start_is_refused(options: Any, prepare: Any, arguments: Any, message: str) -> None:
    model = adapted(llama(), **options)
    importance = {
        f"{name}.weight": torch.ones_like(layer.get_base_layer().weight) for name, layer in layers(model).items()
    }
    if prepare:
        prepare(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        lora.fila_(model, importance, **arguments)
    assert_untouched(model, before)


def test_a_second_start_is_refused() -> None:
    model = adapted(llama())
    lora.fila_(model, random_importance(model))
    with pytest.raises(ValueError, match="an earlier fila_"):
        lora.fila_(model, random_importance(model))


def test_other_objects_are_refused() -> None:
    with pytest.raises(TypeError, match=r"expected a PeftModel .* found LlamaForCausalLM"):
        lora.fila_(llama(), {})
    with pytest.raises(TypeError, match="expected a PeftModel"):
        lora.save_pretrained(llama(), "nowhere")
    prompts = peft.get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="expected an adapter of type LORA"):
        lora.fila_(prompts, {})


def test_a_large_layer_takes_the_iteration() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(530, 520, bias=False)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.layer(inputs)

    plain, inputs = Model(), torch.randn(3, 530)
    weight, before = plain.layer.weight.detach().clone(), plain(inputs).detach()
    model = adapted(plain, rank=8, target_modules=["layer"])
    importance = 10 ** (2 * torch.rand(520, 1)) * torch.rand(520, 530)
    lora.fila_(model, {"layer.weight": importance})
    layer = layers(model)["layer"]
    product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    error = (importance.double().sum(1).sqrt()[:, None] * (weight.double() - product.double())).norm()
    assert error <= OPTIMAL * reference.least_error(weight, importance, 8)
    close(model(inputs), before, Tolerance(1e-5, "float32 sums of 530 terms"))


# Saving


def train(model: Any, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    for step in range(steps):
        reference.cross_entropy(model, FORGET[step % len(FORGET)])[0].backward()
        optimizer.step()
        optimizer.zero_grad()


LOAD = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
with torch.no_grad():
    print(json.dumps(model(torch.tensor(json.loads(sys.argv[3]))).logits.tolist()))
"""


def test_a_fresh_process_without_gradsurgery_loads_the_same_model(tmp_path: Path) -> None:
    plain = llama()
    plain.save_pretrained(tmp_path / "base")
    model = adapted(plain)
    lora.fila_(model, lora.fisher_importance(model, FORGET, RETAIN))
    train(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    arguments = [
        sys.executable,
        "-c",
        LOAD,
        str(tmp_path / "base"),
        str(tmp_path / "adapter"),
        json.dumps(TOKENS.tolist()),
    ]
    output = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    wanted = logits(model)
    close(
        torch.tensor(json.loads(output.splitlines()[-1]), dtype=torch.float64),
        wanted,
        RELOADED,
        scale=wanted.abs().max(),
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 7}},
        {"use_rslora": True, "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 7}},
        {"lora_alpha": 5},
    ],
)
def test_a_plain_load_gives_the_same_model(options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(llama(), **options)
    lora.fila_(model, random_importance(model))
    train(model)
    before, config = snapshot(model), copy.deepcopy(model.peft_config["default"].to_dict())
    model.save_pretrained(str(tmp_path))
    assert_untouched(model, before)
    assert model.peft_config["default"].to_dict() == config | {
        "base_model_name_or_path": model.peft_config["default"].base_model_name_or_path
    }
    loaded = peft.PeftModel.from_pretrained(llama(), str(tmp_path))
    wanted = logits(model)
    close(logits(loaded), wanted, RELOADED, scale=wanted.abs().max())
    assert (logits(llama()) - wanted).abs().max() > 1e-2 * wanted.abs().max()  # training has changed something


def test_a_plain_load_in_bfloat16_is_right_to_bfloat16(tmp_path: Path) -> None:
    model = adapted(llama(torch.bfloat16))
    lora.fila_(model, random_importance(model))
    train(model)
    model.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(llama(torch.bfloat16), str(tmp_path))
    wanted = logits(model)
    close(logits(loaded), wanted, RESIDUAL[torch.bfloat16], scale=wanted.abs().max())


def test_peft_alone_would_save_another_model(tmp_path: Path) -> None:
    """Why save_pretrained is replaced: the adapter alone, on the original weights, is wrong."""
    model = adapted(llama())
    lora.fila_(model, random_importance(model))
    peft.PeftModel.save_pretrained(model, str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(llama(), str(tmp_path))
    assert (logits(loaded) - logits(model)).abs().max() > 0.1 * logits(model).abs().max()


def test_several_adapters_are_saved_each_in_its_way(tmp_path: Path) -> None:
    model = adapted(llama())
    model.add_adapter("plain", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    lora.fila_(model, random_importance(model))
    train(model)
    model.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(llama(), str(tmp_path))
    close(logits(loaded), logits(model), RELOADED, scale=logits(model).abs().max())
    loaded.load_adapter(str(tmp_path / "plain"), "plain")
    assert loaded.peft_config["default"].r == 6
    assert loaded.peft_config["plain"].r == 2
    model.save_pretrained(str(tmp_path / "chosen"), selected_adapters=["plain"])
    assert not (tmp_path / "chosen" / "adapter_config.json").exists()


def test_a_copy_and_a_given_state_are_saved_as_they_are(tmp_path: Path) -> None:
    model = adapted(llama())
    lora.fila_(model, random_importance(model))
    twin = copy.deepcopy(model)
    train(twin)
    twin.save_pretrained(str(tmp_path / "copy"))
    model.save_pretrained(str(tmp_path / "given"), state_dict=twin.state_dict())
    wanted = logits(twin)
    for folder in ("copy", "given"):
        loaded = peft.PeftModel.from_pretrained(llama(), str(tmp_path / folder))
        close(logits(loaded), wanted, RELOADED, scale=wanted.abs().max())
    partial = {name: values for name, values in twin.state_dict().items() if "fila_" not in name}
    with pytest.raises(ValueError, match=r"state_dict: expected an entry .*fila_A_default"):
        model.save_pretrained(str(tmp_path / "partial"), state_dict=partial)
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion"):
        model.save_pretrained(str(tmp_path / "twice"), path_initial_model_for_weight_conversion="initial")


def test_a_checkpoint_restores_base_adapters_and_what_was_subtracted(tmp_path: Path) -> None:
    """A resumed run loads a checkpoint into a model that was started from other importances."""
    model, resumed = adapted(llama()), adapted(llama())
    lora.fila_(model, random_importance(model, seed=0))
    lora.fila_(resumed, random_importance(resumed, seed=1))
    train(model)
    torch.save(model.state_dict(), tmp_path / "checkpoint")
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint", weights_only=True))
    assert torch.equal(logits(resumed), logits(model))
    resumed.save_pretrained(str(tmp_path / "adapter"))
    loaded = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "adapter"))
    close(logits(loaded), logits(model), RELOADED, scale=logits(model).abs().max())
    with pytest.raises(RuntimeError, match="fila_A_default"):
        adapted(llama()).load_state_dict(torch.load(tmp_path / "checkpoint", weights_only=True))


def test_models_without_fila_are_saved_as_by_peft(tmp_path: Path) -> None:
    model = adapted(llama())
    train(model)
    lora.save_pretrained(model, str(tmp_path / "ours"))
    model.save_pretrained(str(tmp_path / "theirs"))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


# Training


@pytest.mark.parametrize("rule", ["sum", "gru", "cagrad"])
@pytest.mark.parametrize("loss", ["inverted_hinge", "ceu"])
def test_fila_trains_with_any_loss_and_rule(loss: str, rule: str, memorised: nn.Module) -> None:
    model = adapted(copy.deepcopy(memorised))
    lora.fila_(model, lora.fisher_importance(model, FORGET[:1], RETAIN[:1]))
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizer = gs.GradientSurgery(torch.optim.AdamW(trainable, lr=1e-3), rule=rule)
    forgotten, kept = probability(model, FORGET[0]), probability(model, RETAIN[0])
    assert min(forgotten, kept) > 0.8
    frozen = {name: values.clone() for name, values in model.named_parameters() if not values.requires_grad}
    losses: list[float] = []
    for _ in range(25):
        terms = {}
        for name, function, batch in (
            ("forget", gs.losses.by_name(loss), FORGET[0]),
            ("retain", gs.losses.cross_entropy, RETAIN[0]),
        ):
            tokens = gs.losses.answer_tokens(model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"])
            terms[name] = gs.losses.token_mean(function(*tokens), tokens[1])
        optimizer.join(**terms).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(terms["forget"].detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert probability(model, FORGET[0]) < forgotten - 0.2
    assert probability(model, RETAIN[0]) > probability(model, FORGET[0]) + 0.2
    assert all(torch.equal(values, frozen[name]) for name, values in model.named_parameters() if name in frozen)


def probability(model: nn.Module, batch: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return float(torch.exp(-reference.cross_entropy(model, batch)[0]))


@pytest.fixture(scope="module")
def memorised() -> nn.Module:
    """A model that knows the first forget and the first retain batch."""
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        for batch in (FORGET[0], RETAIN[0]):
            tokens = gs.losses.answer_tokens(model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"])
            gs.losses.cross_entropy(*tokens).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model
