"""What importing costs and promises, and that the documents agree with the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gradsurgery as gs

ROOT = Path(__file__).parents[1]
PAGES = ["examples/README.md", "examples/ablation/README.md", "tests/benchmarks/RESULTS.md"]

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


def test_package_docstrings_list_every_rule_and_every_loss() -> None:
    losses = [*gs.losses.LOSSES, *gs.losses.ROW_LOSSES, *gs.losses.SEQUENCE_LOSSES, "rmu"]
    for package, names in ((gs.rules, [*gs.rules.RULES, *gs.elementwise.ELEMENTWISE]), (gs.losses, losses)):
        for name in names:
            assert f"`{name}`" in (package.__doc__ or ""), name


def test_the_readme_has_exactly_the_two_set_up_lines_and_its_files_exist() -> None:
    text = (ROOT / "README.md").read_text()
    lines = [line.strip() for line in text.splitlines() if re.match(r"\s*pip install .*&&", line)]
    assert lines == [
        "pip install -c constraints.txt '.[lightning]' && gradsurgery unlearn --recipe deep",
        "pip install -c constraints.txt -e '.[lightning,dev]' && pytest",
    ]


class TinyModel(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lm_head = torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.embedding(tokens))


def test_the_readme_code_runs_block_after_block() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    model, labels = TinyModel(), torch.tensor([1, 2, 3])
    names: dict[str, Any] = {
        "torch": torch,
        "gs": gs,
        "model": model,
        "forget_batch": torch.tensor([0, 1]),
        "retain_batch": torch.tensor([2, 3]),
        "forget_loss": lambda model, batch: -model(batch).square().mean(),
        "retain_loss": lambda model, batch: model(batch).square().mean(),
        "hidden_states": model.embedding(torch.cat([labels, labels[-1:]]))[None],
        "labels": torch.cat([labels[:1], labels])[None],
    }
    before = model.lm_head.weight.detach().clone()
    for block in blocks:
        exec(block, names)
    assert not torch.equal(model.lm_head.weight, before)
    assert names["half_way"](torch.eye(2, dtype=torch.float64)).tolist() == [1.0, 0.5]
    torch.testing.assert_close(names["values"], names["patient_unlikelihood"](model(labels), labels))


@pytest.mark.parametrize("page", [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("*.md"))] + PAGES)
def test_every_link_to_a_file_leads_to_one(page: str) -> None:
    for target in re.findall(r"\]\(([^):#]+)[#)]", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target


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
