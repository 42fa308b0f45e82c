"""How models are loaded: type of the weights, revision, attention, foreign code; and what is left beside the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import lightning as L
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from lightning_modules import cli
from lightning_modules.run.identity import model_identity
from lightning_modules.run.loading import load_model
from lightning_modules.run.models import load_pretrained, load_to_train
from lightning_modules.run.options import EvaluateOptions, LoadingOptions, UnlearnOptions
from lightning_modules.run.saving import keep_files, whole
from tests.lightning_modules.data.chat_templates import byte_level
from tests.lightning_modules.run.bad_inputs import QUESTIONS, model_folder
from tests.tolerances import Tolerance, close

ROUNDED = Tolerance(2e-2, "one forward pass in bfloat16, whose last place is 2^-8")
HALF = LoadingOptions(dtype="bfloat16")
OWN = """
from transformers import LlamaConfig, LlamaForCausalLM
class C(LlamaConfig):
    model_type = "own"
class M(LlamaForCausalLM):
    config_class = C
"""


@pytest.fixture
def here(kitchen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The good model and the good files in the working folder."""
    shutil.copytree(kitchen / "model", tmp_path / "model")
    for name, text in zip(("forget", "retain"), QUESTIONS, strict=True):
        (tmp_path / f"{name}.json").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("lightning_modules.run.unlearn.draw", lambda _: None)  # pictures take longer than the run
    return tmp_path


def unlearn(output: str, *further: str, model: str = "model") -> int:
    data = ["--forget", "forget.json", "--retain", "retain.json", "--max-new-tokens", "1"]
    steps = ["--epochs", "2", "--accumulate", "1", "--batch-size", "2", "--lr", "1e-2", "--warmup-steps", "0"]
    return cli.main(["unlearn", "--model", model, *data, *steps, "--output", output, *further])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([[5, 9, 14, 3, 20]])).logits.float()


def test_weights_are_held_in_the_type_that_is_asked_for(here: Path) -> None:
    full, half = load_pretrained("model")[0], load_pretrained("model", HALF)[0]
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in full.parameters()} == {torch.float32}
    close(logits(half), logits(full), ROUNDED, scale=logits(full).abs().max())
    assert model_identity("model", HALF) != model_identity("model")  # scores of the one are not those of the other
    given = EvaluateOptions.of(model="model", forget="forget.json", retain="retain.json", dtype="bfloat16")
    assert next(load_model(given, {})[0].parameters()).dtype == torch.bfloat16


def test_adapters_over_bfloat16_weights_are_float32_and_merged_without_loss(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[torch.dtype]] = {}
    fit = L.Trainer.fit

    def watched(self: L.Trainer, module: Any, *rest: Any, **more: Any) -> None:
        for weight in module.model.parameters():
            seen.setdefault("trained" if weight.requires_grad else "held", set()).add(weight.dtype)
        fit(self, module, *rest, **more)

    monkeypatch.setattr(L.Trainer, "fit", watched)
    given = ["--dtype", "bfloat16", "--lora-rank", "2"]
    assert unlearn("merged", *given) == 0
    assert unlearn("kept", *given, "--save", "adapter") == 0
    assert seen == {"trained": {torch.float32}, "held": {torch.bfloat16}}
    base = load_pretrained("model", HALF)[0].float()
    expected = PeftModel.from_pretrained(base, "kept/model").merge_and_unload().state_dict()  # pyright: ignore[reportArgumentType]
    left = load_file("merged/model/model.safetensors")
    assert {weight.dtype for weight in left.values()} == {torch.float32}
    assert all(torch.equal(left[name], expected[name]) for name in left)
    rounded = {name: weight.bfloat16().float() for name, weight in left.items()}
    assert any(not torch.equal(left[name], rounded[name]) for name in left)  # in bfloat16 some of it would be lost
    # The adapter as the model that is trained further: merged in float32, and then held as asked for.
    again = load_to_train("kept/model", loading=HALF)[0]
    whole_one = load_to_train("kept/model")[0]
    for one, other in zip(again.parameters(), whole_one.parameters(), strict=True):
        assert torch.equal(one, other.bfloat16())


def test_a_float32_model_is_merged_as_before(here: Path) -> None:
    model = load_pretrained("model")[0]
    assert whole(model) is model


def test_the_files_beside_the_weights_stay_as_they_were(here: Path) -> None:
    """Byte for byte: Transformers would write its own version and order of keys."""
    generation = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2, "transformers_version": "4.31.0"}
    (here / "model" / "generation_config.json").write_text(json.dumps(generation))
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    (here / "model" / "chat_template.jinja").write_text(
        template + "{% if add_generation_prompt %}assistant: {% endif %}\n"
    )
    settings = here / "model" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 99}, sort_keys=True))
    kept = [path.name for path in (here / "model").iterdir() if "safetensors" not in path.name]
    assert {"generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"} < set(kept)
    assert unlearn("run", "--finetune-first", "--finetune", "{epochs: 1}", "--lora-rank", "1", "--save", "adapter") == 0
    data = ["--data", "retain.json", "--epochs", "1"]
    assert cli.main(["finetune", "--model", "run/model", *data, "--output", "taught"]) == 0  # of an adapter
    for name in set(kept) - {"config.json"}:
        for folder in ("run/base", "run/model", "taught/model"):
            if (folder, name) != ("run/model", "generation_config.json"):  # an adapter generates as its model does
                assert Path(folder, name).read_bytes() == (here / "model" / name).read_bytes(), (folder, name)


@pytest.mark.parametrize(("kind", "kept"), [("qwen2", True), ("logit_difference", False), (None, False)])
def test_a_tokenizer_says_the_same_in_a_folder_of_another_kind(kind: str | None, kept: bool, tmp_path: Path) -> None:
    """Transformers takes Qwen2's own tokenizer for a Qwen2, which splits numbers, and of ULD or an adapter does not know."""
    start, after = tmp_path / "start", tmp_path / "after"
    written = byte_level(None)
    written.save_pretrained(start)
    Qwen2Config(vocab_size=len(written)).save_pretrained(start)
    tokenizer: Any = AutoTokenizer.from_pretrained(start)
    text = "Hello 2020"
    assert tokenizer(text)["input_ids"] != written(text)["input_ids"]  # or this shows nothing
    tokenizer.save_pretrained(after)
    if kind is not None:
        (after / "config.json").write_text(json.dumps({"model_type": kind}))
    keep_files(str(start), LoadingOptions(), after, tokenizer)
    assert AutoTokenizer.from_pretrained(after)(text)["input_ids"] == tokenizer(text)["input_ids"]
    own = (start / "tokenizer_config.json").read_bytes()
    assert ((after / "tokenizer_config.json").read_bytes() == own) == kept


def test_a_revision_is_that_of_the_model_and_not_of_its_reference(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two commits of one model in the cache of the hub."""
    place = here / "hub" / "models--somebody--model"
    for commit, name in (("a" * 40, "main"), ("b" * 40, "older")):
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / name).write_text(commit)
        model_folder(place / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(here / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    shutil.rmtree(here / "model")
    name, older = "somebody/model", LoadingOptions(revision="older")
    main, other = load_pretrained(name)[0], load_pretrained(name, older)[0]
    for model, commit in ((main, "a" * 40), (other, "b" * 40)):
        assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(place / "snapshots" / commit)))
    assert model_identity(name, older) == {"hub": name, "commit": "b" * 40}
    assert model_identity(name) == {"hub": name, "commit": "a" * 40}
    assert unlearn("run", "--revision", "older", "--reference", name, model=name) == 0
    found = json.loads(Path("run/metrics.json").read_text())
    assert found["before"]["forget"]["nll"] != found["reference"]["forget"]["nll"]
    config = Path("run/config.yaml").read_text()
    assert "revision: older" in config
    for file in ("tokenizer_config.json", "generation_config.json"):
        assert Path("run/model", file).read_bytes() == (place / "snapshots" / ("b" * 40) / file).read_bytes()


def test_code_of_a_models_own_runs_only_where_it_is_trusted(here: Path) -> None:
    config = json.loads(Path("model/config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    Path("model/config.json").write_text(json.dumps(config | own))
    Path("model/own.py").write_text(OWN)
    assert unlearn("refused") == 1
    assert unlearn("run", "--trust-remote-code") == 0
    assert type(load_pretrained("run/model", LoadingOptions(trust_remote_code=True))[0]).__name__ == "M"


def test_the_attention_is_the_one_that_is_asked_for(here: Path) -> None:
    plain, eager = load_pretrained("model")[0], load_pretrained("model", LoadingOptions(attn_implementation="eager"))[0]
    assert plain.config._attn_implementation != eager.config._attn_implementation == "eager"  # pyright: ignore


def test_how_it_is_loaded_is_written_down_and_a_resumed_run_keeps_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = UnlearnOptions.of(model="model", forget="f", retain="r", attn_implementation="eager").recorded()
    assert given["dtype"] == "float32"
    assert given["attn_implementation"] == "eager"
    Path("run").mkdir()
    Path("run/config.yaml").write_text(
        "model: model\nforget: forget.json\nretain: retain.json\nattn_implementation: eager\n"
    )
    assert cli.main(["unlearn", "--resume", "--output", "run", "--attn-implementation", "sdpa"]) == 1
    assert "--attn-implementation sdpa (there it is eager)" in capsys.readouterr().err
