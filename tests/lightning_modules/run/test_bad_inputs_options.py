"""Bad options, on the command line and in a file: refused by name before any weight is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lightning_modules.run.bad_inputs import Row, changed, given, laid

PROOF = "code-was-executed"


def value(flag: str, found: str, *said: str) -> Row:
    """A row with one option that has a wrong value."""
    return given(f"{flag} {found}", f"--{flag}", found, said=said or (f"--{flag}",))


def between(flag: str, *values: str) -> list[Row]:
    return [value(flag, found, f"--{flag} ", "found") for found in values]


NUMBERS = [
    *(row for flag in ("epochs", "score-every", "batch-size", "accumulate") for row in between(flag, "0", "-3")),
    *(row for flag in ("max-length", "max-new-tokens", "evaluation-examples") for row in between(flag, "0")),
    *(row for flag in ("warmup-steps", "lora-rank", "weight-decay") for row in between(flag, "-1")),
    *(row for flag in ("retain-weight", "retain-inside") for row in between(flag, "-0.5")),
    *between("evaluation-batch-size", "0"),
    *between("evaluation-batch-tokens", "0"),
    *between("lr", "0", "-1"),
    *between("collapse-below", "0", "1.5"),
    *between("best-below", "1"),
    *between("stop-below", "1", "-0.1"),
    *between("seed", "-1", "4294967296"),
    value("lora-rank", "1000000", "--lora-rank: expected at most the model's width, 8, found 1000000"),
    value("lr", "1e400", "--lr: expected a finite number, found inf"),
    value("max-norm", "0", "max_norm: expected a positive number, found 0"),
    value("ema-decay", "1", "ema_decay: expected the old value's weight in [0, 1), found 1"),
    value("ema-decay", "-0.1", "ema_decay: expected the old value's weight in [0, 1), found -0.1"),
    value("devices", "0", "--devices to be auto or a number of devices, found '0'"),
    value("devices", "two", "--devices to be auto or a number of devices, found 'two'"),
]
TYPES = [value(flag, "many") for flag in ("epochs", "warmup-steps", "seed", "lr", "max-norm", "probes", "rule-options")]
TYPES += [
    value("epochs", "2.5"),
    value("lr", "nan"),
    value("lr", ""),
    value("guard", "banana"),
    value("scope", "layer"),
]
TYPES += [value("metric", "l1"), value("method", "banana"), value("start-model", "banana"), value("tofu", "forget11")]
NAMES = [
    value("rule", "grue", "--rule: expected one of", "found 'grue'; did you mean gru or gu?"),
    value("forget-loss", "simpno", "--forget-loss: expected one of", "found 'simpno'; did you mean simnpo"),
    value("retain-loss", "kl", "--retain-loss: expected one of", "found 'kl'"),
    value("optimizer", "AdamZ", "--optimizer: expected a class of torch.optim", "found 'AdamZ'"),
    value("optimizer", "LBFGS", "--optimizer: expected a class of torch.optim", "found 'LBFGS'"),
    value("optimizer", "lr_scheduler", "--optimizer: expected a class of torch.optim", "found 'lr_scheduler'"),
    value("optimizer", "Muon", "can step every parameter of a model, with options that it knows, found Muon"),
    value("optimizer-options", "{epsilon: 1e-4}", "options that it knows, found AdamW with {'epsilon': 0.0001}"),
    given(
        "asked words of a refusal",
        "--forget-loss",
        "idk",
        "--keep-asked-words",
        "true",
        said=("--keep-asked-words: expected",),
    ),
    value("retain-noise", "-1", "expected --retain-noise"),
    value("retain-anchor", "-1", "expected --retain-anchor"),
    value("learning-rate", "1", "--learning-rate"),
    Row("a word too many", lambda _: [*changed(), "surplus"], ("surplus",)),
    Row("no value", lambda _: [*changed(), "--lr"], ("--lr",)),
    Row("no command", lambda _: [], ("unlearn",)),
    Row("an unknown command", lambda _: ["unlern"], ("unlern",)),
    Row("another command's option", lambda _: ["evaluate", "--lr", "1"], ("--lr",)),
]
SETTINGS = [
    value("rule-options", "{alpha: 5}", "expected options that", "rule gru know, found", "'alpha'"),
    given("c", "--rule", "cagrad", "--rule-options", "{c: -5}", said=("c: expected a non-negative number, found -5",)),
    given(
        "NaN in c", "--rule", "cagrad", "--rule-options", "{c: .nan}", said=("--rule-options, c: expected a finite",)
    ),
    given("what hamu needs", "--rule", "hamu", said=("rule hamu know, found", "'gain' and 'radius'")),
    value("loss-options", "{beta: 1}", "expected options that ceu", "'beta'; ceu has none"),
    given(
        "beta", "--forget-loss", "npo", "--loss-options", "{beta: 0}", said=("beta: expected a number > 0, found 0",)
    ),
    given(
        "NaN in beta",
        "--forget-loss",
        "npo",
        "--loss-options",
        "{beta: .nan}",
        said=("beta: expected a finite number",),
    ),
    given("no option", "--forget-loss", "npo", "--loss-options", "{nll: 1}", said=("'nll'; npo has beta",)),
    value("dual", "{foo: 1}", "expected options that", "dual variable know", "'foo'"),
    value("dual", "{limit: .nan}", "--dual, limit: expected a finite number, found nan"),
    value("uld", "{foo: 1}", "--uld: expected lora_alpha", "found foo"),
    given(
        "layers in parts",
        "--method",
        "uld",
        "--uld",
        "{num_layers: 1.5}",
        said=("num_layers: expected a whole number",),
    ),
    given(
        "a weight below 0", "--method", "uld", "--uld", "{weight: -1}", said=("--uld, weight: expected a number >= 0",)
    ),
]


def benchmark(title: str, *options: str, said: tuple[str, ...], model: str = "model") -> Row:
    """A row without files of examples."""
    return Row(title, lambda _: ["unlearn", "--model", model, "--output", "out", *options], said)


PAIRS = [
    value("uld", "{weight: 1}", "--uld: expected --method uld with it, found --method surgery"),
    value("retain-loss", "dpo", "--retain-loss: expected a loss that keeps answers, found dpo"),
    value("retain-loss", "idk", "--retain-loss: expected a loss that keeps answers, found idk"),
    value("retain-loss", "jensun", "--retain-loss: expected a loss that keeps answers, found jensun", "jensen_shannon"),
    value("start-model", "adapters_off", "expected --start-model adapters_off with adapters", "choose copy"),
    given("logits on disk", "--start-model", "precomputed", "--forget-loss", "undial",
          said=("--start-model precomputed: expected losses that compare log-likelihoods, found undial",)),
    given("kept logits on disk", "--start-model", "precomputed", "--retain-loss", "kl_divergence",
          said=("found kl_divergence", "choose copy or adapters_off")),
    value("lora-init", "fila", "expected --lora-rank with --lora-init fila"),
    given("probes of ULD", "--method", "uld", "--probes", said=("--probes, --best-below: expected a run with surgery",)),
    given("a search of ULD's rate", "--method", "uld", "--lr", "auto", said=("--lr auto: expected a run with surgery",)),
    given("a search in shards", "--strategy", "fsdp2", "--lr", "auto", said=("--lr auto: expected a model that one",)),
    value("lr", "fast", "--lr", "fast"),
    given("probes of two answers", "--probes", said=("--probes: expected enough answers to forget", "found 2")),
    Row("the default's probes of two answers",
        lambda _: ["unlearn", "--forget", "forget.json", "--retain", "retain.json", "--output", "out"],
        ("expected enough answers to forget", "found 2; give --probes none, or at least 3 answers")),
    given("surgery of ULD", "--method", "uld", "--rule", "gem", "--optimizer", "SGD", "--devices", "2",
          said=("--rule, --optimizer, --devices: expected a run with surgery, found --method uld",)),
    given("recomputed shards", "--strategy", "fsdp2", "--gradient-checkpointing",
          said=("--strategy fsdp2: expected no --gradient-checkpointing", "smaller --batch-size")),
    given("ULD's batches by length", "--method", "uld", "--group-by-length", "--gradient-checkpointing",
          said=("--group-by-length, --gradient-checkpointing: expected a run with surgery, found --method uld",)),
    given("ULD of what has no wrong answers", "--method", "uld", said=("2 of 2 without perturbed_answer",)),
    value("tofu", "forget10", "expected either --forget and --retain, or --tofu, found both"),
    value("tofu-dir", "here", "expected --tofu with --tofu-dir"),
    value("muse", "news", "expected either --forget and --retain, or --muse, found both"),
    value("muse", "bbc", "--muse"),
    value("wmdp", "chem", "--wmdp"),
    value("muse-dir", "here", "expected --muse with --muse-dir, for example --muse news"),
    value("wmdp-dir", "here", "expected --wmdp with --wmdp-dir, for example --wmdp cyber"),
    benchmark("two benchmarks", "--muse", "news", "--tofu", "forget10", said=("found --tofu and --muse",)),
    benchmark("MUSE from scratch", "--muse", "news", model="scratch", said=("--muse: expected --model, a pre-trained",)),
    benchmark("no WMDP", "--wmdp", "cyber", "--wmdp-dir", "no", said=("expected cyber-forget-corpus/train.json or",)),
    benchmark("no MUSE", "--muse", "books", "--muse-dir", "no", said=("expected raw/forget.json in no",)),
    benchmark("WMDP's bio", "--wmdp", "bio", said=("--wmdp bio: expected its forget corpus", "neither --forget FILE")),
    benchmark("MUSE is taught first", "--muse", "news", "--finetune-first",
              said=("--finetune-first: expected questions and answers to teach first, found --muse",)),
    value("forget-authors", "2", "--forget-authors: expected a model from scratch"),
    Row("one of two files", lambda _: ["unlearn", "--forget", "forget.json"], ("--forget and --retain together",)),
    Row("nothing to forget", lambda _: ["unlearn", "--model", "model"], ("which answers is it to forget?",)),
    Row("too few authors", lambda _: ["unlearn", "--authors", "3"], ("expected at least 5 authors",)),
]  # fmt: skip


def options(title: str, text: str | bytes, *said: str) -> Row:
    """A row with an options file."""
    return laid(title, {"options.yaml": text}, changed(config="options.yaml"), *said)


FILES = [
    Row("no such file", lambda _: changed(config="no.yaml"), ("no.yaml",)),
    Row("a folder", lambda _: changed(config="model"), ("model",)),
    options("torn", "lr: [1", "config"),
    options("empty", ""),
    options("a list", "- lr", "--config options.yaml: expected lines `option: value`, found a list"),
    options("a word alone", "lr", "--config options.yaml: expected lines `option: value`, found a str"),
    options("an unknown name", "learning_rate: 1", "--config options.yaml: expected options, found 'learning_rate'"),
    options("a near name", "ema_dacay: 0.3", "--config options.yaml: ", "'ema_dacay'", "did you mean --ema-decay?"),
    options("a letter too many", "lrr: 3", "--config options.yaml: ", "'lrr', which is none; did you mean --lr?"),
    options(
        "twice", "lr: 1e-5\nseed: 1\nlr: 1e-3", "--config options.yaml: expected YAML with options", "lr is there twice"
    ),
    *(
        options(f"no {name}", f"{name}: null", f"--config options.yaml: expected a value of {name}, found null")
        for name in ("batch_size", "lr_schedule", "devices", "guard", "prompt_format", "finetune")
    ),
    options("a group", "training: {lr: 0.1}", "training"),
    options("a word for a number", "epochs: many", "epochs", "many"),
    options("a list for a number", "lr: [1, 2]", "lr"),
    options("NaN", "lr: .nan", "--lr: expected a finite number, found nan"),
    options("a wrong name", "rule: grue", "did you mean gru"),
    options("an object", f"lr: !!python/object/apply:os.system ['touch {PROOF}']", "python/object/apply:os.system"),
    options("a function", "rule: !!python/name:os.system", "python/name:os.system"),
    options("laughs", "a: &a [x, x]\nb: &b [*a, *a]\nrule: *b", "'a', which is none"),
    options("Latin-1", "rule: gr\xfc".encode("latin-1"), "--config", "save it as UTF-8"),
    options("UTF-16", "rule: gru".encode("utf-16"), "--config", "save it as UTF-8"),
    options("binary", b"\0\0\0", "config"),
    options("a grid", "methods: []\ntargets: {forget_probability: [0.1]}"),
    options("another command's", "log: true", "log"),
]
OUTPUT = [
    Row("a file", lambda _: changed(output="forget.json"), ("--output: expected a folder that can be written",)),
    Row(
        "a file, planned", lambda _: [*changed(output="forget.json"), "--dry-run"], ("that can be written", "is a file")
    ),
    Row("in a file, planned", lambda _: [*changed(output="forget.json/out"), "--dry-run"], ("forget.json is a file",)),
    Row("in a file", lambda _: changed(output="forget.json/out"), ("--output: expected a folder that can be written",)),
    Row("in no place", lambda _: changed(output="/proc/out"), ("--output: expected a folder that can be written",)),
    Row("no name", lambda _: changed(output=""), ("--output: expected the name of a folder, found ''",)),
    Row("NUL", lambda _: changed(output="a\0b"), ("--output: expected the name of a folder, found 'a\\x00b'",)),
    Row("too long", lambda _: changed(output="x" * 300), ("--output: expected a folder that can be written",)),
    laid(
        "a run", {"out/metrics.json": "{}"}, changed(), "--output: expected a new or empty folder, found metrics.json"
    ),
    laid(
        "an unfinished run", {"out/config.yaml": "lr: 1"}, changed(), "found config.yaml of an earlier run", "--resume"
    ),
    laid(
        "a model called base", {"out/base/config.json": "{}"}, changed(), "expected a new or empty folder, found base"
    ),
]


@pytest.mark.parametrize("row", [*NUMBERS, *TYPES, *NAMES, *SETTINGS, *PAIRS], ids=lambda row: row.name)
def test_a_wrong_option_is_refused_in_a_sentence(row: Row, refuse: Callable[[Row], None]) -> None:
    refuse(row)


@pytest.mark.parametrize("row", FILES, ids=lambda row: row.name)
def test_a_wrong_file_of_options_is_refused_and_never_executed(row: Row, refuse: Callable[[Row], None]) -> None:
    refuse(row)
    assert not Path(PROOF).exists()


@pytest.mark.parametrize("row", OUTPUT, ids=lambda row: row.name)
def test_a_folder_that_cannot_be_the_output_is_refused(row: Row, refuse: Callable[[Row], None]) -> None:
    refuse(row)
