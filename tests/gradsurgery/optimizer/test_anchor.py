"""An anchor leaves the weights that least squares over the kept inputs themselves would leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import gradsurgery as gs
from tests.gradsurgery.optimizer import anchor_workers, distributed_workers
from tests.reference.anchor import pulled, pulled_tied
from tests.tolerances import SAME, STEPPED_FLOAT32, close

STRENGTHS = [1e-3, 1.0, 30.0]
TOLERANCE = {torch.float64: SAME, torch.float32: STEPPED_FLOAT32}


class Tied(nn.Module):
    """An embedding that is the head too, as in small language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).cumsum(1))


def moved(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Moves every trained weight; returns name -> where it was and where it is."""
    found = {}
    for name, weight in model.named_parameters():
        before = weight.detach().clone()
        weight.data.add_(torch.randn_like(weight))
        found[name] = before, weight.detach().clone()
    return found


def anchored(model: nn.Module, strength: float, *inputs: Tensor, mask: Tensor | None = None) -> gs.LayerAnchor:
    anchor = gs.LayerAnchor(model, strength)
    for batch in inputs:
        with anchor.watch(mask):
            model(batch)
    return anchor


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows", [3, 40], ids=["fewer inputs than directions", "more"])
def test_a_linear_layer_is_pulled_to_the_least_squares_solution(strength: float, dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    layer, batches = nn.Linear(6, 4, dtype=dtype), torch.randn(2, rows, 6, dtype=dtype)
    anchor = anchored(layer, strength, *batches)
    places = moved(layer)
    anchor.pull()
    start, weight = places["weight"]
    close(layer.weight.detach(), pulled(start, weight, batches.flatten(0, 1), strength), TOLERANCE[dtype])
    start, bias = places["bias"]
    close(layer.bias.detach(), start + (bias - start) / (1.0 + strength), TOLERANCE[dtype])


def test_the_strength_goes_with_the_learning_rate() -> None:
    found = []
    for strength, rates in ((2.0, (0.5, 0.25)), (0.5, (2.0, 1.0)), (1.0, (1.0, 0.5))):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 4)).double()
        anchor = anchored(model, strength, torch.tensor([[1, 1, 4]]))
        moved(model)
        for lr in rates:
            anchor.pull(lr)
        found.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    close(found[0], found[1], SAME)
    close(found[0], found[2], SAME)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_gpt2s_layer_whose_weight_is_transposed_is_pulled_alike(strength: float) -> None:
    torch.manual_seed(0)
    layer, batch = Conv1D(4, 6).double(), torch.randn(9, 6, dtype=torch.float64)
    anchor = anchored(layer, strength, batch)
    start, weight = moved(layer)["weight"]
    anchor.pull()
    close(layer.weight.detach(), pulled(start.T, weight.T, batch, strength).T, SAME)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_an_embedding_is_a_layer_of_one_hot_inputs(strength: float) -> None:
    torch.manual_seed(0)
    layer, tokens = nn.Embedding(7, 5, dtype=torch.float64), torch.tensor([[1, 1, 4], [6, 1, 4]])
    anchor = anchored(layer, strength, tokens)
    start, weight = moved(layer)["weight"]
    anchor.pull()
    one_hot = nn.functional.one_hot(tokens.flatten(), 7).double()
    close(layer.weight.detach(), pulled(start.T, weight.T, one_hot, strength).T, SAME)
    assert torch.equal(layer.weight[0], weight[0])  # a token that no kept example has


@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_weight_that_is_embedding_and_head_meets_both_terms(strength: float) -> None:
    torch.manual_seed(0)
    model, tokens = Tied().double(), torch.tensor([[1, 1, 4], [6, 1, 4]])
    inputs = model.embedding(tokens).cumsum(1).detach().flatten(0, 1)
    anchor = anchored(model, strength, tokens)
    start, weight = moved(model)["embedding.weight"]
    anchor.pull()
    close(model.head.weight.detach(), pulled_tied(start, weight, tokens, inputs, strength), SAME)


def test_tokens_that_are_masked_do_not_count() -> None:
    torch.manual_seed(0)
    tokens = torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0]])
    found = []
    for mask, batches in ((tokens != 0, [tokens]), (None, [torch.tensor([[1, 2, 3]]), torch.tensor([[4]])])):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 3)).double()
        anchor = anchored(model, 1.0, *batches, mask=mask)
        moved(model)
        anchor.pull()
        found.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    close(found[0], found[1], SAME)


def test_a_strong_anchor_leaves_kept_outputs_and_frees_what_no_kept_input_reaches() -> None:
    torch.manual_seed(0)
    layer, kept = nn.Linear(6, 4, bias=False, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    before = layer(kept).detach()
    anchor = anchored(layer, 1e8, kept)
    _, after = moved(layer)["weight"]
    anchor.pull()
    close(layer(kept).detach(), before, STEPPED_FLOAT32)  # what is left is of order 1e-8
    elsewhere = torch.linalg.svd(kept).Vh[3:]
    close(elsewhere @ layer.weight.detach().T, elsewhere @ after.T, STEPPED_FLOAT32)


def test_frozen_weights_and_the_layers_of_adapters_below_them_are_left_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    model[0].requires_grad_(requires_grad=False)
    anchor, places = anchored(model, 1.0, torch.randn(9, 6)), moved(model)
    anchor.pull()
    assert torch.equal(model[0].weight, places["0.weight"][1])
    assert not torch.equal(model[1].weight, places["1.weight"][1])


def test_watching_takes_no_graph_changes_nothing_and_leaves_no_hook() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    anchor = gs.LayerAnchor(model, 1.0)
    with anchor.watch():
        assert not model(torch.randn(2, 6)).requires_grad
    with pytest.raises(RuntimeError), anchor.watch():
        model(torch.randn(2, 3))
    assert not any(layer._forward_pre_hooks for layer in model)
    anchor.pull()  # where nothing moved, nothing is pulled
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="found none"):
        failed(model).pull()


def failed(model: nn.Module) -> gs.LayerAnchor:
    anchor = gs.LayerAnchor(model, 1.0)
    with pytest.raises(RuntimeError), anchor.watch():
        model(torch.randn(2, 3))
    return anchor


def test_bfloat16_weights_are_rounded_once() -> None:
    torch.manual_seed(0)
    layer, batch = nn.Linear(6, 4, bias=False, dtype=torch.bfloat16), torch.randn(9, 6, dtype=torch.bfloat16)
    anchor = anchored(layer, 1.0, batch)
    start, weight = moved(layer)["weight"]
    anchor.pull()
    change = (weight - start).double()
    expected = start + (pulled(torch.zeros_like(change), change, batch.double(), 1.0)).float()
    assert torch.equal(layer.weight, expected.bfloat16())


def test_it_holds_a_copy_and_at_most_a_square_for_each_layer() -> None:
    for model in (nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 3)), Tied()):
        anchor = anchored(model, 1.0, torch.tensor([[1, 1, 4]]))
        anchor.pull()
        held = {
            tensor.data_ptr(): tensor.nbytes
            for tensor in (*anchor._start, *(tensor for pulled in anchor._pulls for tensor in pulled.args))
        }
        assert sum(held.values()) <= anchor.memory_estimate() <= 1.5 * sum(held.values())


def test_autocast_and_an_input_that_is_changed_in_place_are_seen_as_they_are() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

        def forward(self, inputs: Tensor) -> Tensor:
            inputs = inputs.clone()
            inputs += self.first(inputs)
            return self.second(inputs)

    torch.manual_seed(0)
    model, batch = Twice(), torch.randn(9, 4)
    with torch.autocast("cpu", torch.bfloat16):
        anchor = anchored(model, 1.0, batch)
        inputs = batch + model.first(batch).detach()
    places = moved(model)
    anchor.pull()
    for layer, seen in (("first", batch), ("second", inputs.float())):
        start, weight = places[f"{layer}.weight"]
        close(getattr(model, layer).weight.detach(), pulled(start, weight, seen, 1.0), STEPPED_FLOAT32)


def test_small_pulls_of_16_bit_weights_are_computed_in_float32() -> None:
    layer = nn.Embedding(2, 1, dtype=torch.bfloat16)
    nn.init.zeros_(layer.weight)
    anchor = anchored(layer, 0.003, torch.tensor([0, 1]))
    layer.weight.data.fill_(1.0)
    anchor.pull()
    assert layer.weight.flatten().tolist() == [float(torch.tensor(1 / 1.003).bfloat16())] * 2


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_the_inputs_of_all_processes_count() -> None:
    distributed_workers.run(anchor_workers.halves_count_as_the_whole)


@pytest.mark.parametrize(
    ("model", "strength", "error", "said"),
    [
        (nn.Linear(2, 2), 0.0, ValueError, "strength: expected a number > 0, found 0.0"),
        (nn.Linear(2, 2), float("inf"), ValueError, "strength: expected a number > 0"),
        (nn.Linear(2, 2).requires_grad_(requires_grad=False), 1.0, ValueError, "weights that require a gradient"),
        (nn.Conv2d(2, 2, 3), 1.0, TypeError, "expected linear layers, embeddings and vectors, .* found weight"),
    ],
)
def test_what_cannot_be_held_is_refused(model: nn.Module, strength: float, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        gs.LayerAnchor(model, strength)


def test_a_pull_before_anything_was_watched_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"pull: expected forward passes of kept examples inside `watch\(\)`"):
        gs.LayerAnchor(nn.Linear(2, 2), 1.0).pull()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("reached", ["read", "written"])
def test_a_tied_weight_is_held_where_one_of_its_layers_was_reached(reached: str) -> None:
    model = nn.ModuleDict({"read": nn.Embedding(5, 3), "written": nn.Linear(3, 5, bias=False)})
    model["written"].weight = model["read"].weight
    anchor = gs.LayerAnchor(model, 1e6)
    with anchor.watch():
        model[reached](torch.arange(5) if reached == "read" else torch.eye(3))
    before = model["read"].weight.detach().clone()
    with torch.no_grad():
        model["read"].weight += 1.0
    anchor.pull()
    torch.testing.assert_close(model["read"].weight, before, atol=1e-4, rtol=0)


def test_layers_that_no_kept_example_came_to_are_told_and_not_held() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 2, bias=False)})
    anchor = gs.LayerAnchor(model, 1e6)
    with anchor.watch():
        model["used"](torch.randn(20, 3))
    places = moved(model)
    said = r"no kept example came to unused \(1 of 2 layers\) with an input other than 0: their matrices are not held"
    with pytest.warns(UserWarning, match=said) as told:
        anchor.pull()
    assert told[0].filename == __file__
    assert torch.equal(model["unused"].weight, places["unused.weight"][1])
    assert not torch.equal(model["used"].weight, places["used.weight"][1])


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.ones(4), r"mask: expected \[B, T\], as attention_mask is, found \[4\]"),
        (torch.ones(2, 1, 1, 4), r"mask: expected \[B, T\], as attention_mask is, found \[2, 1, 1, 4\]"),
        (torch.ones(2, 3), r"found \[2, 3\], which do not fit: enter watch\(attention_mask\) once for each batch"),
    ],
)
def test_a_mask_that_fits_no_input_is_refused_and_nothing_is_counted(mask: Tensor, said: str) -> None:
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 3))
    anchor = gs.LayerAnchor(model, 1.0)
    with pytest.raises(ValueError, match=said), anchor.watch(mask):
        model(torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0]]))
    with pytest.raises(RuntimeError, match="found none"):
        anchor.pull()


def test_a_mask_of_one_batch_around_another_one_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 3))
    first, second = torch.tensor([[1, 2, 3, 0]]), torch.tensor([[4, 0, 0]])
    with pytest.raises(ValueError, match="which do not fit"), gs.LayerAnchor(model, 1.0).watch(first != 0):
        _ = model(first), model(second)


def test_it_watches_in_inference_mode_too() -> None:
    tokens, found = torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0]]), []
    for mode in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 3)).double()
        with mode():
            anchor = anchored(model, 1.0, tokens, mask=tokens != 0)
        moved(model)
        anchor.pull()
        found.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    assert torch.equal(found[0], found[1])
