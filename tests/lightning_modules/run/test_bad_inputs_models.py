"""Bad models and tokenizers: refused in a sentence, most of them before their weights are loaded, and never executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from lightning_modules.run.compatible import check_weights
from lightning_modules.run.loading import load_pretrained
from tests.lightning_modules.run.bad_inputs import FILES, QUESTIONS, Row, changed, given, model_folder, status

FOLDER = ("'model' is a folder without a loadable model: expected config.json, safetensors and a tokenizer, found:",)
NOWHERE = ("is neither a folder nor a model on the hub: expected config.json", "found:")
ALL_OF = ("expected the weights of LlamaForCausalLM",)
PROOF = "code-was-executed"
Spoil = Callable[[Path], Any]


def model(title: str, spoil: Spoil, *said: str, loads: bool = False) -> Row:
    """A row in which the good model's folder is spoilt."""

    def arguments(folder: Path) -> list[str]:
        spoil(folder / "model")
        return ["unlearn", *FILES]

    return Row(title, arguments, said, loads)


def named(title: str, name: str, *said: str) -> Row:
    return Row(title, lambda _: changed(model=name), said or NOWHERE)


def wrote(name: str, content: str | bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def without(*names: str) -> Spoil:
    return lambda folder: [(folder / name).unlink() for name in names]


def edited(name: str, **changes: Any) -> Spoil:
    """Other values in a JSON file; None takes a key away."""

    def spoil(folder: Path) -> None:
        values = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))

    return spoil


def weights(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        save_file(change(load_file(path)), path, {"format": "pt"})

    return spoil


def queries(change: Callable[[Tensor], Tensor]) -> Spoil:
    return weights(lambda held: {key: change(value) if "q_proj" in key else value for key, value in held.items()})


def instead(kind: Any, config: Any) -> Spoil:
    """Another model in the folder, beside the tokenizer."""

    def spoil(folder: Path) -> None:
        without("config.json", "model.safetensors")(folder)
        kind(config).save_pretrained(folder)

    return spoil


def cut(name: str, kept: int) -> Spoil:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:kept])


def sharded(index: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "elsewhere")
        (folder / "model.safetensors.index.json").write_text(index)

    return spoil


class Code:
    def __reduce__(self) -> Any:
        return os.system, (f"touch {PROOF}",)


def pickled(save: Callable[[Any, Path], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        without("model.safetensors")(folder)
        save({"weight": Code()}, folder / "pytorch_model.bin")

    return spoil


def remote(folder: Path) -> None:
    edited("config.json", model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})(folder)
    (folder / "own.py").write_text(f"open({PROOF!r}, 'w')\n")


def adapter(then: Spoil) -> Spoil:
    """An adapter of the good model, spoilt; its base is beside it."""

    def spoil(folder: Path) -> None:
        shutil.copytree(folder, folder.with_name("base"))
        adapted: Any = get_peft_model(
            LlamaForCausalLM.from_pretrained(folder), LoraConfig(r=2, target_modules="all-linear")
        )
        adapted.peft_config["default"].base_model_name_or_path = "base"
        without("config.json", "model.safetensors")(folder)
        adapted.save_pretrained(folder)
        then(folder)

    return spoil


BERT = BertConfig(vocab_size=300, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
T5 = T5Config(vocab_size=300, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
LLAMA = LlamaConfig(vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
SHARDS = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001.safetensors"}}
NAMES = [
    named("a folder that is missing", "no/such/folder"),
    named("a hub name, offline", "somebody/some-model"),
    named("a file", "forget.json"),
    named("no name", ""),
    named("control characters", "mo\ndel\x1b[31m", "'mo\\ndel\\x1b[31m'"),
    named("NUL", "mo\0del", "'mo\\x00del'"),
    named("too long a name", "a" * 5000),
    named("an address", "https://huggingface.co/gpt2"),
    named("a folder without a model", "..", "'..' is a folder without a loadable model"),
]
CONFIGURATION = [
    model("no config", without("config.json"), *FOLDER, "Unrecognized model"),
    model("torn config", cut("config.json", 40), *FOLDER, "not a valid JSON file"),
    model("config of a list", wrote("config.json", "[]"), *FOLDER),
    model("binary config", wrote("config.json", b"\xff\xfe\0"), *FOLDER, "not a valid JSON file"),
    model("heads that do not divide", edited("config.json", num_attention_heads=3), *FOLDER, "not a multiple"),
    model("a size in words", edited("config.json", hidden_size="eight"), *FOLDER, "expected int, got str"),
    model("unknown architecture", edited("config.json", model_type="frob"), *FOLDER, "`frob`"),
    model("code of its own", remote, *FOLDER, "custom code"),
    model("an encoder", instead(BertModel, BERT), "expected a causal language model, found the encoder 'model' (bert)"),
    model(
        "an encoder with a head", instead(BertForMaskedLM, BERT), "found the encoder 'model' (bert)", "generates text"
    ),
    model("encoder and decoder", instead(T5ForConditionalGeneration, T5), "found 'model' of the type t5"),
]
NO_ROOM = (
    "expected weights that fit into the memory of",
    "free, found 6.4 TB in 'model' (1,600,000,000,472 numbers in float32)",
    "--dtype bfloat16 takes half",
)
LOADING = [
    model("weights that no machine holds", edited("config.json", vocab_size=10**11), *NO_ROOM),
    given("an unknown attention", "--attn-implementation", "frob",
          said=("--attn-implementation: expected one that Transformers knows for 'model'", "found 'frob'")),
    given("no attention", "--attn-implementation", " ", said=("--attn-implementation: expected a name, found ' '",)),
    given("a revision of a folder", "--revision", "main", said=("--revision: expected a model on the hub", "found 'model'")),
    given("a type in which updates are lost", "--dtype", "bfloat16",
          said=("--dtype bfloat16: expected --lora-rank with it, whose adapters are float32, found 0",)),
    given("a precision in which they are", "--precision", "bf16-true", "--lora-rank", "2",
          said=("--precision: expected one under which what is trained keeps small updates, found bf16-true",)),
    given("a type that cannot be split", "--dtype", "bfloat16", "--lora-rank", "2", "--lora-init", "fila",
          said=("--dtype bfloat16: expected adapters that leave the weights as they are, found --lora-init fila",)),
    given("shards of two types", "--dtype", "bfloat16", "--lora-rank", "2", "--strategy", "fsdp2",
          said=("--dtype bfloat16: expected float32 with --strategy fsdp2",)),
    given("an unknown type", "--dtype", "float8", said=("--dtype",)),
    given("a format that is none", "--prompt-format", "tofu", said=("--prompt-format: expected auto, tofu-llama2", "found 'tofu'")),
    given("a format without a template", "--prompt-format", "open-unlearning",
          said=("--prompt-format open-unlearning: expected a tokenizer with a chat template, found none",)),
    given("a plan of what has begun", "--dry-run", "--resume", said=("--resume: expected a run in out",)),
    Row("how nothing is loaded", lambda _: ["unlearn", "--dtype", "bfloat16", "--revision", "main"],
        ("--dtype, --revision: expected --model, which is loaded so, found the model from scratch",)),
    Row("taught in a type in which updates are lost",
        lambda _: ["finetune", "--model", "model", "--data", "forget.json", "--dtype", "bfloat16"],
        ("--dtype bfloat16: expected --lora-rank with it",)),
]  # fmt: skip
TOKENIZER = [
    model("no tokenizer", without("tokenizer.json", "tokenizer_config.json"), *FOLDER, "tokenizer"),
    model("torn tokenizer", cut("tokenizer.json", 30), *FOLDER),
    model("a tokenizer of nothing", wrote("tokenizer.json", '{"version": "1.0"}'), *FOLDER, "KeyError"),
    model("torn tokenizer config", cut("tokenizer_config.json", 30), *FOLDER),
    model("no eos", edited("tokenizer_config.json", eos_token=None), "expected a tokenizer with an eos token"),
    model("another model's tokenizer", lambda folder: model_folder(folder, vocab_size=100),
          "forget, example 1: expected tokens of the model's vocabulary of 100", "another model's"),
    model("a torn template", wrote("chat_template.jinja", "{{ messages"), "chat template", "TemplateSyntaxError"),
    model("a template that refuses", wrote("chat_template.jinja", "{{ raise_exception('no') }}"), "(TemplateError: no)"),
    model("a template of nothing", wrote("chat_template.jinja", "{{ messages[0].foo.bar }}"), "mend chat_template"),
    model("a template that digs", wrote("chat_template.jinja", "{{ ''.__class__.__mro__ }}"), "SecurityError"),
]  # fmt: skip
WEIGHTS = [
    model("no weights", without("model.safetensors"), *FOLDER, "no file named model.safetensors", loads=True),
    model("empty weights", wrote("model.safetensors", b""), *FOLDER, "SafetensorError", loads=True),
    model("weights of garbage", wrote("model.safetensors", b"garbage" * 99), *FOLDER, "SafetensorError", loads=True),
    model("torn weights", cut("model.safetensors", 5000), *FOLDER, "SafetensorError", loads=True),
    model("a shard that is missing", sharded(json.dumps(SHARDS)), *FOLDER, "model-00001.safetensors", loads=True),
    model("a torn index", sharded("{"), *FOLDER, loads=True),
    model("NaN", queries(lambda weight: weight * torch.nan), *ALL_OF, "NaN or infinity in", "q_proj", loads=True),
    model("infinity", queries(lambda weight: weight + torch.inf), *ALL_OF, "NaN or infinity in", loads=True),
    model("another shape", queries(lambda weight: weight[:4].clone()), *ALL_OF, "[4, 8] and not [8, 8]", loads=True),
    model("a tensor that is missing", weights(lambda held: {key: held[key] for key in held if "norm" not in key}),
          *ALL_OF, "layernorm.weight", "missing, which Transformers fills at random", loads=True),
    model("no head", instead(LlamaModel, LLAMA), *ALL_OF, "lm_head.weight missing", loads=True),
    model("a pickle with code", pickled(torch.save), *FOLDER, "would run code, which is never done", loads=True),
    model("a plain pickle with code", pickled(lambda held, path: path.write_bytes(pickle.dumps(held, protocol=2))),
          *FOLDER, "would run code, which is never done; convert them to safetensors", loads=True),
    model("an adapter without a base", adapter(lambda folder: shutil.rmtree(folder.with_name("base"))), *FOLDER, loads=True),
    model("a torn adapter", adapter(cut("adapter_config.json", 40)), *FOLDER, loads=True),
    model("an adapter of nothing", adapter(without("adapter_model.safetensors")), *FOLDER, loads=True),
    model("an unknown adapter", adapter(edited("adapter_config.json", peft_type="FROB")), *FOLDER, "FROB", loads=True),
]  # fmt: skip


@pytest.mark.parametrize("row", [*NAMES, *CONFIGURATION, *LOADING, *TOKENIZER, *WEIGHTS], ids=lambda row: row.name)
def test_it_is_refused_in_a_sentence(row: Row, refuse: Callable[[Row], None]) -> None:
    refuse(row)
    assert not Path(PROOF).exists()


@pytest.mark.parametrize("row", [CONFIGURATION[0], TOKENIZER[4], TOKENIZER[6]], ids=lambda row: row.name)
def test_a_reference_is_refused_like_the_model(row: Row, kitchen: Path, refuse: Callable[[Row], None]) -> None:
    def arguments(folder: Path) -> list[str]:
        return [*row.arguments(folder), "--model", str(kitchen / "model"), "--reference", "model"]

    refuse(Row(row.name, arguments, row.said))


def test_a_model_without_numbers_is_refused() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LLAMA)
    with pytest.raises(
        ValueError, match=r"model\.embed_tokens\.weight, .* on the meta device, without numbers: load it"
    ):
        check_weights("somewhere", model, {})


def test_a_tokenizer_without_template_and_pad_will_do_and_it_is_said_how(
    kitchen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(kitchen / "model", tmp_path / "model")
    edited("tokenizer_config.json", pad_token=None)(folder)
    assert load_pretrained(str(folder))[1].pad_token is None
    monkeypatch.chdir(tmp_path)
    Path("rows.json").write_text(QUESTIONS[0])
    assert status(["finetune", "--model", "model", "--data", "rows.json", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "The tokenizer has no chat template: questions and answers are written as Q: and A:, which" in said
    assert "The tokenizer has no pad token, and needs none: <eos> fills up shorter rows" in said
