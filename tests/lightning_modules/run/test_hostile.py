"""What somebody else wrote, a model, a config, a folder, data, is read and never obeyed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from lightning_modules import cli
from lightning_modules import folder as outputs
from lightning_modules.ablation.grid import slug
from lightning_modules.run import unlearn as unlearn_command
from lightning_modules.run.loading import check_pretrained, load_pretrained
from tests.lightning_modules.report.reports import Page, make
from tests.lightning_modules.run.small_runs import small_run

WORDS = "<script>alert(1)</script></td></table> [/bold] [red]\x1b[2J\x1b]0;owned\x07 `rm -rf`"
CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"


def test_a_run_on_hostile_words_in_a_folder_with_a_hostile_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = small_run(tmp_path, "--epochs", "1", "--probes", "false")
    for name in ("forget", "retain"):
        rows = json.loads((tmp_path / f"{name}.json").read_text())
        rows = [{**row, "question": WORDS + row["question"], "answer": row["answer"] + WORDS} for row in rows]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    folder = tmp_path / "run [/bold] <script>alert(2)<"
    capsys.readouterr()
    assert cli.main([*arguments, "--output", str(folder)]) == 0
    printed, said = capsys.readouterr()
    assert not re.search(CONTROL, printed + said)
    assert str(folder) in printed.replace("\n", "")
    page = Page((folder / "report.html").read_text(encoding="utf-8"))  # every tag that is opened is closed
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    sources = [
        value or "" for _, has in page.tags for name, value in has.items() if name in ("src", "href", "xlink:href")
    ]
    assert all(source.startswith(("#", "data:image/png;base64,")) for source in sources)
    assert "<script>alert(1)</script></td></table>" in page.text
    assert not re.search(CONTROL, page.text)
    assert not re.search(CONTROL, (folder / "report.md").read_text(encoding="utf-8"))


@pytest.fixture
def with_code(tmp_path: Path) -> Path:
    """A model whose config names Python of its own, which would leave a file."""
    small_run(tmp_path)
    folder = tmp_path / "model"
    config = json.loads((folder / "config.json").read_text())
    named = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of", "auto_map": named}))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\n")
    return folder


def test_a_models_own_code_is_not_run_and_nobody_is_asked(
    with_code: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for load in (load_pretrained, check_pretrained):
        with pytest.raises(FileNotFoundError, match="is a folder without a loadable model"):
            load(str(with_code))
    arguments = ["--model", str(with_code), "--forget", "forget.json", "--retain", "retain.json", "--output", "run"]
    monkeypatch.chdir(with_code.parent)
    assert cli.main(["unlearn", *arguments]) == 1
    assert "without a loadable model" in capsys.readouterr().err
    assert not (with_code.parent / "owned").exists()


YAMLS = {
    "alone": "!!python/object/apply:os.system ['touch owned']",
    "a value": "rule: !!python/object/apply:os.system ['touch owned']",
    "a callback": "callbacks: !!python/object/new:os.system ['touch owned']",
    "a name": "rule_options: {alpha: !!python/name:os.system }",
}


@pytest.mark.parametrize("text", YAMLS.values(), ids=YAMLS)
@pytest.mark.parametrize("command", ["unlearn", "ablate"])
def test_yaml_is_read_without_running_it(
    command: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(text)
    assert cli.main([command, "--config", "config.yaml", "--output", "new"]) == 1
    assert capsys.readouterr().err.startswith("gradsurgery: ")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_so_is_that_of_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (make(tmp_path / "made") / "config.yaml").write_text(YAMLS["a value"])
    assert cli.main(["report", "made"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("name", ["report.html", "report.md", "curves.png", "model"])
def test_a_link_in_a_folder_of_somebody_elses_is_not_written_through(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, outside = make(tmp_path / "theirs"), tmp_path / "mine"
    outside.write_text("mine")
    (folder / name).symlink_to(outside)
    assert cli.main(["report", str(folder)]) == 1
    assert f"found {name} leading out of it" in capsys.readouterr().err
    (folder / "metrics.json").unlink()
    assert cli.main(["unlearn", "--resume", "--output", str(folder)]) == 1
    assert f"found {name} leading out of it" in capsys.readouterr().err
    assert outside.read_text() == "mine"


def test_links_that_stay_inside_and_those_of_loggers_are_none_of_ours(tmp_path: Path) -> None:
    (tmp_path / "logs" / "wandb").mkdir(parents=True)
    (tmp_path / "logs" / "wandb" / "debug.log").symlink_to("/somewhere/else.log")
    (tmp_path / "latest").symlink_to("logs")
    outputs.check_links(tmp_path)
    (tmp_path / "logs" / "wandb" / "debug.log").unlink()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "weights").symlink_to("../../elsewhere")
    with pytest.raises(PermissionError, match="deep/weights"):
        outputs.check_links(tmp_path)


def test_a_config_in_a_folder_does_not_say_where_the_run_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []
    monkeypatch.setattr(unlearn_command, "_unlearn", lambda options: folders.append(options.output.folder))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"output": "/etc/elsewhere", "seed": 1}))
    assert cli.main(["unlearn", "--resume", "--output", str(tmp_path)]) == 0
    assert folders == [tmp_path]


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "..", "a/../../b", "a\\..\\b", "a\x00b", "C:\\b", "~/.ssh"]
)
def test_a_name_in_a_grid_is_no_path(name: str) -> None:
    assert re.fullmatch(r"([a-z0-9]([a-z0-9.-]*[a-z0-9])?)?", slug(name))


def test_seeds_in_a_grid_are_numbers_and_no_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = {"methods": [{"name": "GA"}], "targets": {"forget_probability": [0.05]}, "seeds": {"model": ["../../x"]}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    assert cli.main(["ablate", "--config", str(tmp_path / "grid.yaml"), "--output", str(tmp_path / "new")]) == 1
    assert capsys.readouterr().err.startswith("gradsurgery: ")
    assert [path.name for path in tmp_path.iterdir()] == ["grid.yaml"]
