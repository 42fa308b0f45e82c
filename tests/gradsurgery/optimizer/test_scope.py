"""The scope by layer: parameter names of real models and wrappers, sorted into the parts of a Transformer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import gradsurgery as gs
from gradsurgery.optimizer.scope import by_layer

NAMES = {
    "model.embed_tokens.weight": "embedding",
    "model.layers.31.self_attn.q_proj.weight": "layer 31 attention",
    "model.layers.3.mlp.experts.7.down_proj.weight": "layer 3 mlp",
    "model.layers.3.block_sparse_moe.gate.weight": "layer 3 mlp",
    "model.layers.3.post_attention_layernorm.weight": "layer 3 norm",
    "model.norm.weight": "final norm",
    "lm_head.weight": "head",
    "transformer.wte.weight": "embedding",
    "transformer.wpe.weight": "embedding",
    "transformer.h.11.attn.c_attn.bias": "layer 11 attention",
    "transformer.h.11.mlp.c_fc.weight": "layer 11 mlp",
    "transformer.h.11.ln_2.weight": "layer 11 norm",
    "transformer.ln_f.bias": "final norm",
    "h.0.ln_1.weight": "layer 0 norm",
    "model.layers.2.pre_feedforward_layernorm.weight": "layer 2 norm",
    "model.layers.2.self_attn.q_norm.weight": "layer 2 attention",
    "gpt_neox.embed_in.weight": "embedding",
    "gpt_neox.layers.4.attention.dense.weight": "layer 4 attention",
    "embed_out.weight": "head",
    "model.decoder.layers.1.fc2.bias": "decoder layer 1 mlp",
    "model.decoder.layers.1.self_attn_layer_norm.bias": "decoder layer 1 norm",
    "encoder.block.5.layer.1.DenseReluDense.wi.weight": "encoder layer 5 mlp",
    "decoder.block.5.layer.1.EncDecAttention.q.weight": "decoder layer 5 attention",
    "backbone.layers.3.mixer.A_log": "layer 3 mixer",
    "model.language_model.layers.3.mlp.up_proj.weight": "layer 3 mlp",
    "model.vision_tower.encoder.layers.3.mlp.fc1.weight": "vision_tower encoder layer 3 mlp",
    "base_model.model.model.layers.7.self_attn.q_proj.lora_A.default.weight": "layer 7 attention",
    "base_model.model.transformer.h.7.mlp.c_fc.lora_B.other.weight": "layer 7 mlp",
    "base_model.model.model.embed_tokens.lora_embedding_A.default": "embedding",
    "base_model.model.lm_head.modules_to_save.default.weight": "head",
    "_orig_mod.model.layers.0._fsdp_wrapped_module.mlp.up_proj.weight": "layer 0 mlp",
    "module.model.norm.weight": "final norm",
    "0.weight": "layer 0",
    "score.weight": "score",
    "tower.3.mlp.experts.7.weight": "tower layer 3 mlp",
    "weight": "weight",
    "0.encoder.layer.3.attention.self.query.weight": "0 encoder layer 3 attention",
}


@pytest.mark.parametrize("name", NAMES)
def test_by_layer_knows(name: str) -> None:
    assert by_layer(name) == NAMES[name]


def models() -> dict[str, Callable[[], nn.Module]]:
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "head_dim": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    gpt2 = transformers.GPT2Config(vocab_size=16, n_embd=8, n_layer=2, n_head=2)
    return {
        "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, **heads)),
        "Gemma": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**small, **heads)),
        "GPT-2": lambda: transformers.GPT2LMHeadModel(gpt2),
    }


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Gemma", "GPT-2"])
def test_by_layer_leaves_nothing_over_in_a_real_model(name: str, lora: bool) -> None:
    model = models()[name]()
    blocks = [f"layer {i} {kind}" for i in range(2) for kind in ("attention", "mlp", "norm")]
    expected = {"embedding", *blocks, "final norm"} | ({"head"} if name == "Llama" else set())
    if lora:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
        expected = {block for block in blocks if not block.endswith("norm")}
    found = {by_layer(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found == expected


def test_by_layer_is_a_scope() -> None:
    model = models()["Llama"]()
    optimizer = gs.GRU(torch.optim.SGD(model.named_parameters(), lr=0.1), scope=by_layer, record_scope=by_layer)
    for name in ("retain", "forget"):
        with optimizer.objective(name):
            model(
                input_ids=torch.arange(6)[None], labels=torch.arange(6)[None] * (1 + (name == "forget"))
            ).loss.backward()
    record = optimizer.combine()
    assert record.block_gram is not None
    assert record.blocks == record.block_names
    assert torch.equal(record.gram, record.block_gram)
