"""GGUF files as models: the weights that the file holds, dequantised, with its tokenizer; and files that are none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_modules import cli
from lightning_modules.run import models
from lightning_modules.run.identity import model_identity
from lightning_modules.run.models import load_pretrained, load_to_train
from tests.lightning_modules.run.bad_inputs import FILES, QUESTIONS, Row, model_folder

gguf: Any = pytest.importorskip(
    "gguf", reason="GGUF files are read by the package gguf: pip install 'gradsurgery[gguf]'"
)

LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"} | {
    f"model.layers.0.{ours}": f"blk.0.{theirs}" for ours, theirs in LAYER.items()
}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}assistant: {% endif %}"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of queries and keys: the halves of a head alternate."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def halved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order of Transformers again."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, source: Path) -> dict[str, torch.Tensor]:
    """The model of a folder as a GGUF file, its matrices as Q8_0. Returns what the file then holds, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(source)
    config, held = model.config, {}
    file = gguf.GGUFWriter(path, "llama")
    file.add_name("tiny")
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(10000.0)
    file.add_vocab_size(config.vocab_size)
    words = json.loads((source / "tokenizer.json").read_text())["model"]
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("default")
    file.add_token_list(sorted(words["vocab"], key=words["vocab"].get))
    file.add_token_types([3] * 3 + [1] * (len(words["vocab"]) - 3))
    file.add_token_merges([" ".join(pair) for pair in words["merges"]])
    for add, number in ((file.add_pad_token_id, 0), (file.add_bos_token_id, 1), (file.add_eos_token_id, 2)):
        add(number)
    file.add_chat_template(TEMPLATE)
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, weight in model.state_dict().items():
        heads = config.num_attention_heads if "q_proj" in name or "k_proj" in name else 0
        value = interleaved(weight.numpy(), heads) if heads else weight.numpy()
        place = f"{NAMES[name.removesuffix('.weight')]}.weight"
        if value.ndim == 2:
            blocks = gguf.quantize(np.ascontiguousarray(value), kind)
            file.add_tensor(place, blocks, raw_dtype=kind)
            value = gguf.dequantize(blocks, kind)
        else:
            file.add_tensor(place, value)
        held[name] = torch.from_numpy(halved(value, heads) if heads else value.copy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return held


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with a GGUF file alone, the model that it was made of, and the weights that it holds."""
    folder = tmp_path_factory.mktemp("shelf")
    source = model_folder(folder / "source", hidden_size=64, intermediate_size=64, head_dim=32)
    (folder / "alone").mkdir()
    return folder, write(folder / "alone" / "tiny.gguf", source)


def test_its_weights_are_the_dequantised_ones_and_its_tokenizer_is_its_own(shelf: Any, tmp_path: Path) -> None:
    folder, held = shelf
    model, tokenizer = load_pretrained(str(folder / "alone" / "tiny.gguf"))
    found: Any = model.state_dict()
    assert set(found) == set(held)
    assert all(torch.equal(found[name], held[name]) for name in held)
    source: Any = AutoModelForCausalLM.from_pretrained(folder / "source")
    assert any(not torch.equal(found[name], weight) for name, weight in source.state_dict().items())  # it is quantised
    original = AutoTokenizer.from_pretrained(folder / "source")
    assert tokenizer.chat_template == TEMPLATE
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<eos>", "<pad>")
    text = "Who wrote book 3?<eos> Author 3 did."
    assert tokenizer(text, add_special_tokens=False).input_ids == original(text, add_special_tokens=False).input_ids
    # A tokenizer beside the file is the exact one, and is taken.
    shutil.copytree(folder / "alone", tmp_path / "beside")
    original.save_pretrained(tmp_path / "beside")
    assert load_pretrained(str(tmp_path / "beside" / "tiny.gguf"))[1].chat_template is None


def test_every_command_takes_it_and_leaves_an_ordinary_model(
    shelf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, held = shelf
    name = str(folder / "alone" / "tiny.gguf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("lightning_modules.run.unlearn.draw", lambda _: None)
    for file, text in zip(("forget", "retain"), QUESTIONS, strict=True):
        Path(f"{file}.json").write_text(text)
    data = ["--forget", "forget.json", "--retain", "retain.json", "--max-new-tokens", "1"]
    run = ["unlearn", "--model", name, *data, "--epochs", "1", "--accumulate", "1", "--lr", "1e-3", "--finetune-first"]
    assert cli.main([*run, "--finetune", "{epochs: 1}", "--reference", name, "--output", "run"]) == 0
    found = json.loads(Path("run/metrics.json").read_text())
    assert cli.main(["evaluate", "--model", name, *data, "--output", "scored"]) == 0
    scored = json.loads(Path("scored/metrics.json").read_text())["after"]
    assert scored["forget"]["nll"] == pytest.approx(found["reference"]["forget"]["nll"], rel=1e-6)
    left = load_file("run/model/model.safetensors")
    assert set(left) == set(held)
    assert not any(torch.equal(left[key], held[key]) for key in left if "proj" in key)
    config = json.loads(Path("run/model/config.json").read_text())
    assert "quantization_config" not in config
    assert model_identity(name) != model_identity(str(folder / "source"))


def test_an_adapter_is_not_kept_for_a_file_that_peft_cannot_load(shelf: Any) -> None:
    with pytest.raises(
        ValueError, match="--save adapter: expected a model that PEFT can load below the adapter, found the GGUF"
    ):
        load_to_train(str(shelf[0] / "alone" / "tiny.gguf"), "adapter")


def unknown(path: Path) -> None:
    file = gguf.GGUFWriter(path, "frob")
    file.add_name("frob")
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an unknown architecture": (unknown, "GGUF model with architecture frob is not supported"),
    "garbage": (lambda path: path.write_bytes(b"garbage" * 99), "found: "),
    "torn": (lambda path: path.write_bytes(b"GGUF" + bytes([3, 0, 0, 0, 9])), "found: "),
    "empty": (lambda path: path.write_bytes(b""), "found: "),
    "a file that is missing": (lambda path: None, "found: "),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_none_is_refused_in_a_sentence(name: str, refuse: Callable[[Row], None]) -> None:
    make, said = BAD[name]

    def arguments(folder: Path) -> list[str]:
        make(folder / "bad.gguf")
        return ["unlearn", *FILES, "--model", "bad.gguf"]

    where = (
        "is no GGUF file here or on the hub"
        if name == "a file that is missing"
        else "is no GGUF file that can be loaded"
    )
    expected = "expected one of a causal language model of an architecture that Transformers reads"
    refuse(Row(name, arguments, (f"'bad.gguf' {where}: {expected}", said)))


def test_without_the_package_it_is_named(refuse: Callable[[Row], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "find_spec", lambda _: None)
    said = ("expected the package that reads 'bad.gguf', found none: pip install 'gradsurgery[gguf]'",)
    refuse(Row("no package", lambda _: ["unlearn", *FILES, "--model", "bad.gguf"], said))
