"""The command with adapters: what --save leaves, what reads it again, and what is refused before training."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightning_modules import cli
from lightning_modules.data.fictional_authors import fictional_authors
from lightning_modules.run.loading import load_pretrained
from lightning_modules.run.options import UnlearnOptions
from lightning_modules.training import callbacks
from lightning_modules.training.adapters import AdapterSettings, adapt
from lightning_modules.training.scratch import ScratchSettings, scratch_model
from lightning_modules.training.uld import train_assistant
from tests.tolerances import Tolerance, close

pytestmark = pytest.mark.supports("The command", "`--save adapter` or `merged`")

MERGED = Tolerance(2e-6, "W + sigma B A in float32, added up before the product instead of after it")
ROWS = fictional_authors(2)
TINY = ScratchSettings(hidden_size=16, num_layers=1, num_heads=2, epochs=2)
KINDS = {
    "lora": ["--lora-alpha", "3", "--lora-targets", "q_proj,down_proj", "--lora-dropout", "0.2"],
    "dora": ["--lora-kind", "dora"],
    "fila": [
        "--lora-init",
        "fila",
        "--lora-kind",
        "rslora",
        "--lora-alpha",
        "2.5",
        "--lora-targets",
        "[v_proj, up_proj]",
    ],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model in a folder, eight examples to forget, and eight to keep."""
    folder = tmp_path_factory.mktemp("world")
    model, tokenizer = scratch_model(ROWS, TINY, cache_dir=folder / "cache")
    model.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    for name, part in (("forget", ROWS[:8]), ("retain", ROWS[20:28])):
        (folder / f"{name}.json").write_text(json.dumps(part))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr("lightning_modules.run.unlearn.draw", lambda _: None)  # pictures take longer than the run
        yield folder


def data(world: Path) -> list[str]:
    return ["--forget", str(world / "forget.json"), "--retain", str(world / "retain.json"), "--max-new-tokens", "1"]


def unlearn(world: Path, output: Path, *more: str, model: Path | None = None) -> int:
    given = ["--model", str(model or world / "tiny"), *data(world), "--lr", "3e-2", "--warmup-steps", "0"]
    return cli.main(["unlearn", *given, "--accumulate", "1", "--epochs", "2", "--output", str(output), *more])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([[5, 9, 14, 3, 20]])).logits


def metrics(folder: Path) -> Any:
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_adapter_is_the_merged_model_for_peft_and_for_every_command(
    kind: str, world: Path, tmp_path: Path
) -> None:
    given = ["--lora-rank", "2", *KINDS[kind]]
    assert unlearn(world, tmp_path / "merged", *given) == 0
    assert unlearn(world, tmp_path / "kept", *given, "--save", "adapter") == 0
    kept, before = tmp_path / "kept" / "model", logits(AutoModelForCausalLM.from_pretrained(world / "tiny"))
    assert not (kept / "config.json").exists()  # an adapter and no model
    assert not (tmp_path / "kept" / "base").exists()

    original = AutoModelForCausalLM.from_pretrained(world / "tiny")
    loaded = logits(PeftModel.from_pretrained(original, kept))  # as anybody who has PEFT alone
    whole = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "model"))
    close(loaded, whole, MERGED, scale=whole.abs().max())
    assert float((loaded - before).abs().max()) > 1e-3  # it was trained
    assert torch.equal(logits(load_pretrained(str(kept))[0]), loaded)
    assert AutoTokenizer.from_pretrained(kept).get_vocab() == AutoTokenizer.from_pretrained(world / "tiny").get_vocab()
    for split in ("forget", "retain"):
        for name in ("probability", "nll", "truth_ratio"):
            one, other = (metrics(tmp_path / run)["after"][split][name] for run in ("merged", "kept"))
            assert one == pytest.approx(other, rel=1e-5), (split, name)


def test_evaluate_and_unlearn_take_an_adapter_as_the_model(world: Path, tmp_path: Path) -> None:
    assert unlearn(world, tmp_path / "kept", "--lora-rank", "2", "--save", "adapter") == 0
    kept = tmp_path / "kept" / "model"
    assert cli.main(["evaluate", "--model", str(kept), *data(world), "--output", str(tmp_path / "scored")]) == 0
    assert metrics(tmp_path / "scored")["after"] == metrics(tmp_path / "kept")["after"]
    assert unlearn(world, tmp_path / "again", model=kept) == 0  # all weights of the merged model
    for split in ("forget", "retain"):
        start, end = metrics(tmp_path / "again")["before"][split], metrics(tmp_path / "kept")["after"][split]
        assert start["nll"] == pytest.approx(end["nll"], rel=1e-5)
    left = AutoModelForCausalLM.from_pretrained(tmp_path / "again" / "model")
    original = AutoModelForCausalLM.from_pretrained(world / "tiny")
    assert [name for name, _ in left.named_parameters()] == [name for name, _ in original.named_parameters()]


def test_of_the_model_from_scratch_a_copy_is_left_beside_the_adapter(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = load_pretrained(str(world / "tiny"))
    monkeypatch.setattr("lightning_modules.run.loading.scratch_model", lambda *_, **__: copy.deepcopy(tiny))
    given = ["--save", "adapter", "--stop-below", "0", "--epochs", "1", "--probes", "false"]
    assert cli.main(["unlearn", "--lora-rank", "2", *given, *data(world), "--output", str(tmp_path / "run")]) == 0
    config = json.loads((tmp_path / "run" / "model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "run" / "base")
    assert config["task_type"] == "CAUSAL_LM"
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "base")), logits(tiny[0]))
    assert float((logits(load_pretrained(str(tmp_path / "run" / "model"))[0]) - logits(tiny[0])).abs().max()) > 0.0


def test_an_interrupted_run_keeps_the_same_adapter(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--lora-rank", "2", *KINDS["fila"], "--save", "adapter", "--probes", "--epochs", "3"]
    assert unlearn(world, tmp_path / "whole", *given) == 0
    score = callbacks.TradeoffCurve._score

    def interrupted(self: callbacks.TradeoffCurve, trainer: Any, module: Any) -> None:
        if trainer.global_step >= 2:
            raise KeyboardInterrupt
        score(self, trainer, module)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.TradeoffCurve, "_score", interrupted)
        assert unlearn(world, tmp_path / "halves", *given) == 130
    assert cli.main(["unlearn", "--resume", "--output", str(tmp_path / "halves")]) == 0
    names = ("model/adapter_model.safetensors", "model/adapter_config.json", "surgery.csv", "probes.json")
    for name in names:
        assert (tmp_path / "halves" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--save", "adapter"], "expected --lora-rank with --save adapter"),
        (["--lora-alpha", "8"], "expected --lora-rank with --lora-alpha"),
        (["--lora-kind", "dora", "--lora-targets", "q_proj"], "expected --lora-rank with --lora-targets, --lora-kind"),
        (["--lora-rank", "2", "--lora-alpha", "0"], "--lora-alpha > 0, found 0"),
        (["--lora-rank", "2", "--lora-alpha", ".nan"], "--lora-alpha: expected a finite number, found nan"),
        (["--lora-rank", "2", "--lora-dropout", "1"], "--lora-dropout at least 0 and below 1, found 1.0"),
        (["--lora-rank", "2", "--lora-dropout", "-0.1"], "--lora-dropout at least 0 and below 1, found -0.1"),
        (["--lora-rank", "2", "--lora-targets", "[]"], "--lora-targets"),
        (["--lora-rank", "2", "--lora-init", "fila", "--lora-kind", "dora"], "found dora"),
        (["--method", "uld", "--save", "adapter", "--lora-rank", "2"], "found --method uld"),
        (["--method", "uld", "--lora-kind", "rslora"], "found --method uld"),
        (["--method", "uld", "--lora-init", "fila", "--lora-rank", "2"], "found --method uld"),
        (["--method", "uld", "--lora-alpha", "8", "--uld", "{lora_alpha: 9}"], "give one of them"),
        (["--method", "uld", "--lora-targets", "qproj"], "did you mean q_proj"),
        (["--lora-rank", "2", "--lora-targets", "q_proj,qproj"], "found 'qproj'; did you mean q_proj"),
        (["--lora-rank", "2", "--lora-targets", "model.layers.0.self_attn.k_pro"], "did you mean k_proj"),
        (["--lora-rank", "2", "--lora-targets", "q_proj,mlp"], "found 'mlp', a LlamaMLP"),
        (["--lora-rank", "2", "--lora-targets", "lm_head"], "found it tied as"),
        (["--lora-rank", "2", "--lora-targets", "embed_tokens", "--lora-init", "fila"], "linear"),
    ],
)
def test_what_contradicts_itself_is_refused_before_training(
    given: list[str], said: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert unlearn(world, tmp_path / "run", *given) == 1
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message
    assert not list(tmp_path.glob("run/*"))


def test_a_tied_head_can_have_an_adapter_that_is_kept(world: Path, tmp_path: Path) -> None:
    """Merged, it would change the embeddings as well."""
    given = ["--lora-rank", "2", "--lora-targets", "lm_head,q_proj", "--save", "adapter", "--epochs", "1"]
    assert unlearn(world, tmp_path / "run", *given) == 0
    model, _ = load_pretrained(str(tmp_path / "run" / "model"))
    core: Any = model
    assert core.get_base_model().lm_head.base_layer.weight is core.get_base_model().model.embed_tokens.weight
    assert unlearn(world, tmp_path / "again", model=tmp_path / "run" / "model") == 1


def strip(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def half(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: value for name, value in tensors.items() if "q_proj" in name}, path)


def rewrite(**changes: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (strip, "without a loadable model"),
        (half, "is not whole"),
        (rewrite(base_model_name_or_path=None), "names no base_model_name_or_path"),
        (rewrite(base_model_name_or_path="/nowhere/at/all"), "where there is no folder"),
    ],
)
def test_a_broken_adapter_is_refused(
    damage: Any, said: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(world / "tiny")
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    damage(tmp_path / "adapter")
    assert unlearn(world, tmp_path / "run", model=tmp_path / "adapter") == 1
    assert said in capsys.readouterr().err


def test_an_adapter_on_an_adapter_is_merged_and_not_kept(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(world / "tiny")
    adapted: Any = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.05)
    adapted.save_pretrained(tmp_path / "adapter")  # without a tokenizer: that of its base is taken
    assert unlearn(world, tmp_path / "kept", "--lora-rank", "2", "--save", "adapter", model=tmp_path / "adapter") == 1
    assert "found" in (message := capsys.readouterr().err)
    assert "an adapter; merge it" in message
    given = ["--lora-rank", "2", "--epochs", "1", "--forget-loss", "npo", "--start-model", "adapters_off"]
    assert unlearn(world, tmp_path / "run", *given, model=tmp_path / "adapter") == 0
    loaded, merged = logits(adapted), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model"))
    assert 0.0 < float((loaded - merged).abs().max()) < 0.5 * float((loaded - logits(adapted.unload())).abs().max()) + 1


def test_the_options_resolve_to_what_config_yaml_holds() -> None:
    config = UnlearnOptions.of(lora_rank=3, save="adapter", model="tiny").resolved().recorded()
    about = ("save", "lora_rank", "lora_alpha", "lora_targets", "lora_dropout", "lora_kind", "lora_init")
    assert [config[name] for name in about] == ["adapter", 3, 6.0, "all-linear", 0.0, "lora", "default"]
    assert UnlearnOptions().resolved().training.lora_alpha is None
    old = UnlearnOptions.of(method="uld", uld={"lora_alpha": 9}).resolved()
    assert old.training.lora_alpha == old.uld_settings().lora_alpha == 9
    new = UnlearnOptions.of(method="uld", lora_alpha=8, lora_targets="v_proj", lora_dropout=0.1).resolved()
    assert new == new.resolved()
    settings = new.uld_settings()
    assert (settings.lora_alpha, settings.lora_targets, settings.lora_dropout) == (8, "v_proj", 0.1)
    assert UnlearnOptions.of(method="uld").resolved().uld_settings().lora_alpha == 32.0


def test_the_assistant_of_uld_has_the_adapters_of_the_options(world: Path, tmp_path: Path) -> None:
    model, tokenizer = load_pretrained(str(world / "tiny"))
    core: Any = model
    core.model.layers.append(copy.deepcopy(core.model.layers[0]))
    core.model.layers[1].self_attn.layer_idx = 1
    core.config.num_hidden_layers = 2
    given = {"lora_rank": 2, "lora_alpha": 6, "lora_targets": "v_proj", "lora_dropout": 0.1, "uld": {"num_layers": 1}}
    options = UnlearnOptions.of(method="uld", epochs=1, model="tiny", **given).resolved()
    splits = {"forget": ROWS[:8], "retain": ROWS[20:28]}
    trained: Any = train_assistant(model, tokenizer, splits, options.uld_settings())
    trained.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "assistant" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 6.0, 0.1)
    assert config["target_modules"] == ["v_proj"]
    loaded: Any = load_pretrained(str(tmp_path / "model"))[0]
    assert torch.equal(logits(loaded), logits(trained))
    later = options.but(lora_targets=["v_proj", "model.layers.1.mlp.up_proj"])
    with pytest.raises(ValueError, match=r"found model.layers.1.mlp.up_proj, which only later layers"):
        train_assistant(model, tokenizer, splits, later.uld_settings())


def test_every_setting_reaches_peft() -> None:
    settings = AdapterSettings(4, alpha=6, targets=["q_proj"], dropout=0.25, kind="rslora")
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    adapted: Any = adapt(LlamaForCausalLM(config), settings)
    layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 6 / 4**0.5
    assert layer.lora_dropout["default"].p == 0.25
    assert layer.r["default"] == 4
    assert [name for name, module in adapted.named_modules() if hasattr(module, "lora_A")] == [
        "base_model.model.model.layers.0.self_attn.q_proj"
    ]
