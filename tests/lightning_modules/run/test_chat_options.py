"""The chat template on the command line: its options reach every tokenizer, and one example is shown before the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_modules import cli, folder
from lightning_modules.data.chat import template_options
from lightning_modules.run.loading import load_model, load_reference
from lightning_modules.run.options import UnlearnOptions
from lightning_modules.run.reference_log import rows_of_log
from lightning_modules.run.run import Run
from lightning_modules.run.show import show_example
from tests.lightning_modules.data import chat_templates as families
from tests.lightning_modules.data.chat_templates import byte_level

SPLITS: dict[str, Any] = {name: [{"question": "Who?", "answer": "Mira\n[bold]."}] for name in ("forget", "retain")}
FILES = ["--forget", "f.json", "--retain", "r.json"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path, tokenizer = tmp_path_factory.mktemp("model"), byte_level(families.LLAMA3)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def parsed(*arguments: str) -> UnlearnOptions:
    given = vars(cli._make_parser().parse_args(["unlearn", *arguments]).unlearn)
    return UnlearnOptions.of(**{name: given[name] for name in UnlearnOptions.names()})


def test_options_reach_the_model_and_its_reference_and_the_config(model: str, tmp_path: Path) -> None:
    said = "{date_string: 1 Jan 2025}"
    options = parsed(*FILES, "--model", model, "--reference", model, "--chat-template-kwargs", said)
    options.check()
    for load in (load_model, load_reference):
        loaded = load(options, SPLITS)
        assert loaded is not None
        assert template_options(loaded[1]) == {"date_string": "1 Jan 2025"}
    folder.write_config(tmp_path, "unlearn", options.recorded())
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["chat_template_kwargs"] == {
        "date_string": "1 Jan 2025"
    }
    again = parsed("--config", str(tmp_path / "config.yaml"), "--output", "elsewhere")
    assert again.data == options.data


def test_a_day_may_be_a_day_of_yaml(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = parsed(*FILES, "--model", model, "--chat-template-kwargs", "{strftime_now: 2025-01-02}")
    show_example(Run(options, Path(), SPLITS, load_model(options, SPLITS)[1]))
    assert r"Today Date: 02 Jan 2025\n\n<|eot_id|>" in capsys.readouterr().err


def test_an_example_is_shown_with_its_answer_marked_and_the_day_that_the_template_is_told(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = parsed(*FILES, "--model", model)
    tokenizer = load_model(options, SPLITS)[1]
    capsys.readouterr()
    show_example(Run(options, Path(), SPLITS, tokenizer))
    example, day = capsys.readouterr().err.splitlines()
    assert example.startswith("The first forget example, its answer between [[ and ]]: <bos><|start_header_id|>system")
    assert example.endswith(r"assistant<|end_header_id|>\n\n[[Mira\n[bold].<|eot_id|>]]")
    assert "26 Jul 2024" in day
    assert "--chat-template-kwargs" in day


def test_options_that_no_template_reads_are_refused_before_the_work(model: str) -> None:
    wrong = ("--chat-template-kwargs", "{date: 1 Jan 2025}")
    options = parsed(*FILES, "--model", model, "--reference", model, *wrong)
    with pytest.raises(ValueError, match="reads, found 'date'"):
        rows_of_log(options.evaluation, SPLITS, options.data)
    with pytest.raises(ValueError, match="reads, found 'date'"):
        load_model(options, SPLITS)
    with pytest.raises(ValueError, match=r"--chat-template-kwargs.*from scratch"):
        parsed(*wrong).check()


def test_answers_of_which_ceu_would_leave_nothing_are_counted(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_model(parsed(*FILES, "--model", model), SPLITS)[1]
    letter = next(word for word in "abcdefgh" if len(tokenizer.encode(word, add_special_tokens=False)) == 1)
    rows = [{"question": "Who?", "answer": letter}, {"question": "Where?", "answer": "In a place of several tokens"}]
    for loss, counted in (("ceu", True), ("unlikelihood", False)):
        options = parsed(*FILES, "--model", model, "--forget-loss", loss)
        show_example(Run(options, Path(), {"forget": rows}, tokenizer))
        assert ("1 of 2 forget answers have no other: --forget-loss unlikelihood" in capsys.readouterr().err) is counted
