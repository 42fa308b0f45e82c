"""The device that is not there: it raises where CUDA does, allows what CUDA allows, and changes no number."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import gradsurgery as gs
from lightning_modules.evaluation import likelihood
from tests.lightning_modules.evaluation.evaluation_workers import model_and_tokenizer
from tests.reference.pretend_cuda import CUDA, PretendedCuda, pretended_cuda

MIXED = "Expected all tensors to be on the same device"
WRONG: dict[str, Callable[[Tensor, Tensor], object]] = {
    "scores and a mask": lambda there, here: there.masked_fill(here > 0, 0.0),
    "a selection by a mask": lambda there, here: torch.masked_select(there, here > 0),
    "a sum": lambda there, here: there + here,
    "numbers that are stacked": lambda there, here: torch.stack([there[0, 0], here[0, 0]]),
    "a product": lambda there, here: there @ here,
    "a lookup": lambda there, here: nn.functional.embedding(here.long(), there),
    "gathered logits": lambda there, here: there.gather(1, here.long()),
    "an index on the device": lambda there, here: here[there.long()],
    "numbers that are put": lambda there, here: there.index_put_((torch.tensor([0]),), here[:1]),
    "a number of the CPU that is added to": lambda there, here: here[0, 0].add_(there[0, 0]),
    "equal": torch.equal,
}
ALLOWED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a number of the CPU": lambda there, here: there * here[0, 0],
    "an index of the CPU": lambda there, here: there[here.long()],
    "a mask of the CPU": lambda there, here: there[here > 0],
    "a copy": lambda there, here: there.copy_(here),
    "a move": lambda there, here: there + here.to(there),
    "a conversion": lambda there, here: here.to(there.device, torch.float64).to(there),
    "what is like it": lambda there, here: torch.rand_like(there) + there.new_zeros(2, 2),
    "in the backward pass": lambda there, here: torch.autograd.grad(there.requires_grad_().cumprod(0).sum(), there)[0],
    "over vmap": lambda there, here: torch.vmap(lambda row: row / row.new_ones(()).to(row.device))(there),
}


@pytest.fixture
def there() -> Iterator[PretendedCuda]:
    with pretended_cuda() as mode:
        yield mode


@pytest.mark.parametrize("name", WRONG)
def test_devices_that_are_mixed_raise(name: str, there: PretendedCuda) -> None:
    with pytest.raises(RuntimeError, match=MIXED):
        WRONG[name](torch.ones(2, 2, device="cuda"), torch.ones(2, 2))


@pytest.mark.parametrize("name", ALLOWED)
def test_what_cuda_allows_is_allowed_and_stays_on_the_device(name: str, there: PretendedCuda) -> None:
    found = ALLOWED[name](torch.ones(2, 2, device="cuda"), torch.ones(2, 2))
    assert found.device == CUDA
    assert found.is_cuda
    assert not found.cpu().is_cuda


def test_numbers_are_not_read_by_numpy_nor_drawn_by_a_generator_of_the_cpu(there: PretendedCuda) -> None:
    numbers = torch.zeros(2, device="cuda")
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        numbers.numpy()
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        torch.rand(2, device="cuda", generator=torch.Generator())
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        numbers.normal_(generator=torch.Generator())
    assert torch.rand(2, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).device == CUDA
    with pytest.raises(RuntimeError, match="does nothing there"), torch.autocast("cpu"):
        numbers @ numbers


def test_the_device_draws_from_a_generator_of_its_own(there: PretendedCuda) -> None:
    torch.manual_seed(1)
    first = torch.rand(3)
    torch.manual_seed(1)
    drawn = torch.rand(3, device="cuda")
    assert torch.equal(torch.rand(3), first)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3, device="cuda"), drawn)


def test_draws_differ_and_a_draw_that_is_refused_leaves_the_generator_of_the_cpu(there: PretendedCuda) -> None:
    like = torch.zeros(3, device="cuda")
    assert not torch.equal(torch.rand_like(like), torch.rand_like(like))
    torch.manual_seed(1)
    expected = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        torch.multinomial(like, 5)
    assert torch.equal(torch.get_rng_state(), expected)


def test_a_module_moves_with_its_optimizer_and_files_say_where_tensors_were(
    there: PretendedCuda, tmp_path: Path
) -> None:
    model = nn.Linear(2, 2)
    weight = model.weight
    model.to("cuda")
    assert weight is model.weight
    assert weight.device == copy.deepcopy(model).weight.device == CUDA
    with torch.autocast("cuda", torch.bfloat16):
        assert model(torch.ones(1, 2, device="cuda")).dtype == torch.bfloat16
    model(torch.ones(1, 2, device="cuda")).sum().backward()
    torch.optim.AdamW(model.parameters()).step()
    assert weight.grad is not None
    assert weight.grad.device == CUDA
    torch.save({"there": weight.detach(), "here": torch.ones(1)}, tmp_path / "saved.pt")
    loaded = torch.load(tmp_path / "saved.pt")
    assert (loaded["there"].device, loaded["here"].device.type) == (CUDA, "cpu")
    assert torch.load(tmp_path / "saved.pt", map_location="cpu")["there"].device.type == "cpu"


def test_lightning_takes_the_device_and_afterwards_nothing_of_it_is_left() -> None:
    with pretended_cuda():
        trainer = L.Trainer(
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
        )
        assert trainer.strategy.root_device == CUDA
    assert not torch.cuda.is_available()
    assert torch.ones(1).device.type == "cpu"
    assert "device" not in vars(torch.Tensor)


def test_a_fault_in_a_call_of_ours_is_found(there: PretendedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = model_and_tokenizer()
    encoded = [likelihood.Encoded(tokens, tokens) for tokens in ([1, 5, 2], [1, 6, 7, 2])]

    def scores() -> Tensor:
        return likelihood.answer_nll(made.to("cuda"), encoded, pad_token_id=0, batch_size=2)

    scores()
    monkeypatch.setattr(likelihood, "device_of", lambda _: torch.device("cpu"))
    with pytest.raises(RuntimeError, match=MIXED):
        scores()


def test_a_step_gives_the_numbers_of_the_cpu() -> None:
    def trained(device: str) -> Tensor:
        torch.manual_seed(0)
        model, inputs = nn.Linear(4, 3).to(device), torch.randn(2, 5, 4).to(device)
        optimizer = gs.GRU(torch.optim.AdamW(model.parameters(), lr=0.1), guard="update")
        for _ in range(3):
            optimizer.join(forget=-model(inputs[0]).square().mean(), retain=model(inputs[1]).square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.weight.detach().cpu()

    expected = trained("cpu")
    with pretended_cuda() as mode:
        assert torch.allclose(trained("cuda"), expected, rtol=1e-5, atol=1e-6)
        assert mode.operations > 50
