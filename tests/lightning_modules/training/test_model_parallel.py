"""UnlearningModule under Lightning's strategies on four processes: the steps of one process, also on an uneven last batch."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import gradsurgery as gs
import lightning_modules as lm
from lightning_modules.data.order import PairDataset, PairSampler, collate_pairs
from lightning_modules.data.tokenization import Encoded
from lightning_modules.run.options.training import SHARDED_PRECISIONS
from lightning_modules.training.adversary import AdversarialModule, AdversarySettings
from lightning_modules.training.sharding import POLICIES, Distributed, blocks, parts
from lightning_modules.training.trainer import trainer_options
from tests.gradsurgery.optimizer import distributed_workers
from tests.gradsurgery.optimizer.distributed_workers import gathered, raises_everywhere
from tests.tolerances import STEPPED_FLOAT32, close

pytestmark = pytest.mark.supports(
    "FSDP2 (`fully_shard`)",
    "by Lightning's `ModelParallelStrategy`, in one dimension and HSDP, with accumulation and clipping",
)

WORLD = 4
VOCABULARY = 11


def examples(count: int, seed: int) -> list[Encoded]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, VOCABULARY, (5 + n % 3,), generator=generator).tolist() for n in range(count)]
    return [Encoded(row, [-100, -100, *row[2:]]) for row in rows]


# Six forget examples: the second batch of four processes has two, and the sampler fills it with the first two again.
PAIRS = PairDataset(examples(6, 1), examples(9, 2))


def llama(*, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(3)
    # Three numbers in a tensor at most are too few for four processes: some hold nothing of it.
    sizes = {"hidden_size": 6, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 3}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.5, tie_word_embeddings=tied, **sizes)
    )


class Data(L.LightningDataModule):
    """The whole of every batch in one process, its share in each of several."""

    def train_dataloader(self) -> DataLoader[Any]:
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        every = [list(PairSampler(PAIRS, num_replicas=WORLD, rank=rank)) for rank in range(WORLD)]
        order = (
            [pair for step in zip(*every, strict=True) for pair in step] if kwargs is None else every[kwargs["rank"]]
        )
        batch = 1 if kwargs else WORLD
        collate = partial(collate_pairs, pad_token_id=0)
        return DataLoader([PAIRS[pair] for pair in order], batch_size=batch, collate_fn=collate)


class Hybrid(lm.UnlearningModule):
    """Two copies of the model, each in two shards."""

    def configure_model(self) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        for part in parts(self.model):
            fully_shard(part, mesh=mesh)


# An end of its own, so that the processes have to agree on the number of steps too.
PERTURBED = partial(lm.UnlearningModule, perturb=lm.PerturbSettings(start=0.1, end=0.4))
ADVERSARIAL = partial(AdversarialModule, adversary=AdversarySettings(0.2, 3))


def trained(strategy: Any = "auto", kind: Any = lm.UnlearningModule) -> Any:
    module = kind(
        llama(),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        surgery=partial(gs.GRU, accumulate=True, guard="update"),
    )
    devices = 1 if strategy == "auto" else WORLD
    options = {"accelerator": "cpu", "strategy": strategy, "devices": devices, "max_epochs": 3}
    trainer = L.Trainer(**trainer_options(**options, accumulate_grad_batches=2, gradient_clip_val=0.5))
    trainer.fit(module, Data())
    assert trainer.global_step == 3
    return module


def four_processes(_: int) -> None:
    os.environ.update(LOCAL_WORLD_SIZE=str(WORLD), GROUP_RANK="0", MASTER_PORT="29500", TORCHELASTIC_RUN_ID="test")
    own: dict[str, Any] = {"cluster_environment": TorchElasticEnvironment(), "process_group_backend": "gloo"}
    alone, perturbed = gathered(trained().model), gathered(trained(kind=PERTURBED).model)
    adversarial = gathered(trained(kind=ADVERSARIAL).model)
    assert not torch.equal(alone, gathered(llama()))
    assert (perturbed - alone).abs().max() > 1e-3
    model_parallel = partial(ModelParallelStrategy, process_group_backend="gloo")
    cases = {
        "ddp": lambda: trained(DDPStrategy(**own)),
        "ddp, bucket views": lambda: trained(DDPStrategy(**own, gradient_as_bucket_view=True)),
        "ddp, perturbed": lambda: trained(DDPStrategy(**own), PERTURBED),
        "ddp, adversarial": lambda: trained(DDPStrategy(**own), ADVERSARIAL),
        "shards": lambda: trained(model_parallel(data_parallel_size=WORLD, tensor_parallel_size=1)),
        "shards, perturbed": lambda: trained(
            model_parallel(data_parallel_size=WORLD, tensor_parallel_size=1), PERTURBED
        ),
        "copies in shards": lambda: trained(model_parallel(data_parallel_size=WORLD, tensor_parallel_size=1), Hybrid),
    }
    for name, case in cases.items():
        found = gathered(case().model)
        try:
            expected = {"perturbed": perturbed, "adversarial": adversarial}.get(name.rpartition(" ")[2], alone)
            close(found, expected, STEPPED_FLOAT32)
            for rank in range(WORLD):
                theirs = found.clone()
                torch.distributed.broadcast(theirs, rank)
                assert torch.equal(theirs, found), f"rank {rank} holds other parameters"
        except AssertionError as error:
            error.add_note(name)
            raise
    with raises_everywhere("expected tensor_parallel_size=1, found 2.*in configure_model of a subclass"):
        trained(model_parallel(data_parallel_size=2, tensor_parallel_size=2))
    with raises_everywhere("adversary: expected weights that every process holds whole, found sharded ones"):
        trained(model_parallel(data_parallel_size=WORLD, tensor_parallel_size=1), ADVERSARIAL)
    with raises_everywhere("drop static_graph"):
        trained(DDPStrategy(**own, static_graph=True))


def shards_of_the_first(rank: int, tied: bool) -> None:
    """The others are given their shards alone, and the structure: names, ties and buffers."""
    model = Distributed(lambda: (llama(tied=tied), "known"))
    assert model.known == "known"
    assert (model.whole is None) == (rank > 0)
    expected = llama(tied=tied)
    found = model.sharded(init_device_mesh("cpu", (WORLD,)))
    assert [name for name, _ in found.named_parameters()] == [name for name, _ in expected.named_parameters()]
    for (name, buffer), (other, value) in zip(found.named_buffers(), expected.named_buffers(), strict=True):
        assert name == other
        assert torch.equal(buffer, value)
    for parameter in found.parameters():
        assert isinstance(parameter, DTensor)
        assert parameter.to_local().shape[0] <= -(-parameter.shape[0] // WORLD)
    assert torch.equal(gathered(found), gathered(expected))
    assert (found.get_output_embeddings().weight is found.get_input_embeddings().weight) == tied
    tokens = torch.randint(VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))
    close(found(input_ids=tokens).logits, expected(input_ids=tokens).logits, STEPPED_FLOAT32)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(2.0)
    model.gather(found)
    if rank == 0:
        assert torch.equal(gathered(model.whole), 2.0 * gathered(expected))


def shared_layers(_: int) -> None:
    def load() -> tuple[LlamaForCausalLM, None]:
        model = llama()
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
        return model, None

    with pytest.raises(ValueError, match=r"found model.layers.0.mlp.up_proj.weight in two of them"):
        Distributed(load).sharded(init_device_mesh("cpu", (WORLD,)))


def everything(rank: int) -> None:
    distributed_workers.each(rank, shards_of_the_first, {"tied": (True,), "not tied": (False,)})
    distributed_workers.each(rank, shared_layers, {"shared": ()})
    four_processes(rank)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_every_strategy_of_four_processes_takes_the_steps_of_one() -> None:
    distributed_workers.run(everything, world=WORLD, patience=4)


def test_the_blocks_are_the_decoder_layers_whatever_stands_around_them() -> None:
    model = llama()
    assert blocks(model) == list(model.model.layers)
    plain = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(3)]), torch.nn.ModuleList())
    assert blocks(plain) == list(plain[0])
    assert blocks(torch.nn.Linear(2, 2)) == []


def test_every_precision_that_the_command_lets_shards_have_has_a_policy() -> None:
    assert tuple(POLICIES) == SHARDED_PRECISIONS
