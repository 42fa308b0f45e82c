"""What importing costs and promises, and that the documents agree with the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import gradsurgery as gs

ROOT = Path(__file__).parents[1]

BLOCKED = """
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""
EXTRAS = {
    "lightning",
    "lightning_modules",
    "transformers",
    "torchmetrics",
    "jsonargparse",
    "rich",
    "datasets",
    "peft",
    "scipy",
    "matplotlib",
}


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_core_needs_torch_alone() -> None:
    code = (
        BLOCKED.format(blocked=EXTRAS)
        + """
import torch, gradsurgery as gs
p = torch.nn.Parameter(torch.ones(2))
optimizer = gs.GRU(torch.optim.SGD([p], lr=0.1))
optimizer.join(forget=p.sum(), retain=p[0]).backward()
optimizer.step()
"""
    )
    finished = python(code)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("missing", ["lightning", "jsonargparse", "transformers"])
def test_a_missing_extra_is_named_with_the_way_to_install_it(missing: str) -> None:
    code = BLOCKED.format(blocked={missing})
    finished = python(f"{code}\nfrom lightning_modules.cli import main\nraise SystemExit(main(['unlearn']))")
    assert finished.returncode == 1
    assert missing in finished.stderr
    assert "gradsurgery[lightning]" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_the_core_never_imports_the_lightning_modules() -> None:
    for path in (ROOT / "gradsurgery").rglob("*.py"):
        assert "lightning_modules" not in path.read_text(), path


def test_the_readme_lists_every_rule_and_every_loss() -> None:
    text = (ROOT / "README.md").read_text()
    losses = [*gs.losses.LOSSES, *gs.losses.ROW_LOSSES, *gs.losses.SEQUENCE_LOSSES, "rmu"]
    for name in [*gs.rules.RULES, *gs.elementwise.ELEMENTWISE, *losses]:
        assert re.search(rf"`(gs\.losses\.)?{name}`", text), name


def test_the_readme_has_exactly_the_two_set_up_lines_and_its_files_exist() -> None:
    text = (ROOT / "README.md").read_text()
    lines = [line.strip() for line in text.splitlines() if re.match(r"\s*pip install .*&&", line)]
    assert lines == [
        "pip install -c constraints.txt '.[lightning]' && gradsurgery unlearn",
        "pip install -c constraints.txt -e '.[lightning,dev]' && pytest",
    ]
    for target in re.findall(r"\]\(([^):]+)\)", text):
        assert (ROOT / target).exists(), target


def test_no_tofu_text_and_no_path_of_one_machine_is_in_the_tree() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in tracked.stdout.splitlines():
        path = ROOT / name
        if (
            path.suffix in (".py", ".md", ".toml", ".yml", ".yaml", ".txt")
            and path.name != Path(__file__).name
            and path.exists()
        ):
            assert "/work/" not in path.read_text(), name
