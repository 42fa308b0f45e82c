"""The picture drawn of a GEffectLogger's file."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_modules as lm
from lightning_modules.report.g_effect import heat_map

COLUMNS = ["step", "layer", "norm_forget", "norm_retain", "g_effect_retain", "cosine_retain"]


def test_the_public_module_has_the_logger_too() -> None:
    assert lm.g_effect.heat_map is heat_map
    assert lm.g_effect.GEffectLogger is lm.callbacks.GEffectLogger


def write(path: Path, rows: list[tuple[Any, ...]], columns: list[str] = COLUMNS) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def pixels(path: Path) -> Tensor:
    from matplotlib.image import imread

    return torch.from_numpy(imread(path))[..., :3]


def share(image: Tensor, colour: tuple[float, float, float]) -> float:
    return float(((image - torch.tensor(colour)).abs().amax(-1) < 0.02).float().mean())


DEEP_RED, DEEP_BLUE, WHITE_MIDDLE, GREY = (
    (0.404, 0.0, 0.122),
    (0.020, 0.188, 0.380),
    (0.969, 0.969, 0.969),
    (0.612, 0.639, 0.686),
)


def test_conflict_is_red_and_agreement_blue_around_zero(tmp_path: Path) -> None:
    layers = ["embedding", "layer 0 mlp", "layer 1 mlp", "layer 2 mlp"]
    cosine = {"embedding": "nan", "layer 0 mlp": -0.5, "layer 1 mlp": 0.0, "layer 2 mlp": 0.5}
    rows = [(step, name, 1, 1, 0, cosine[name]) for step in range(1, 4) for name in layers]
    heat_map(write(tmp_path / "g.csv", rows), tmp_path / "g.png")
    image = pixels(tmp_path / "g.png")
    for colour in (DEEP_RED, DEEP_BLUE, WHITE_MIDDLE, GREY):
        assert share(image, colour) > 0.08, colour
    down = [
        int((image - torch.tensor(c)).abs().amax(-1)[:, 300].argmin())
        for c in (GREY, DEEP_RED, WHITE_MIDDLE, DEEP_BLUE)
    ]
    assert down == sorted(down)


@pytest.mark.parametrize("cosines", [(0.0, 0.0), ("nan", "nan"), (0.3, "nan")])
def test_degenerate_files_are_drawn(tmp_path: Path, cosines: tuple[Any, Any]) -> None:
    heat_map(write(tmp_path / "g.csv", [(1, f"x{i}", 1, 1, 0, c) for i, c in enumerate(cosines)]), tmp_path / "g.png")
    assert share(pixels(tmp_path / "g.png"), GREY if "nan" in cosines else WHITE_MIDDLE) > 0.2


def test_layers_stand_in_their_order_whatever_the_files(tmp_path: Path) -> None:
    from lightning_modules.report.g_effect import _grouped

    names = ["layer 10 mlp", "layer 10 norm", "layer 2 mlp", "layer 2 norm", "head", "encoder layer 1 mlp", "layer 7"]
    assert _grouped(dict.fromkeys(names)) == [
        ("mlp", ["layer 2 mlp", "layer 10 mlp"]),
        ("norm", ["layer 2 norm", "layer 10 norm"]),
        ("head", ["head"]),
        ("encoder mlp", ["encoder layer 1 mlp"]),
        ("layer", ["layer 7"]),
    ]


def test_two_protected_objectives_are_drawn_side_by_side(tmp_path: Path) -> None:
    columns = ["step", "layer", "norm_forget", "norm_a", "norm_b", "g_effect_a", "cosine_a", "g_effect_b", "cosine_b"]
    rows = [(step, "layer 0 mlp", 1, 1, 1, 0, -0.5, 0, 0.5) for step in range(1, 3)]
    heat_map(write(tmp_path / "g.csv", rows, columns), tmp_path / "g.png")
    image = pixels(tmp_path / "g.png")
    left, right = image[:, : image.shape[1] // 2], image[:, image.shape[1] // 2 :]
    assert share(left, DEEP_RED) > 0.2
    assert share(right, DEEP_BLUE) > 0.2
    assert share(right, DEEP_RED) < 0.05


@pytest.mark.parametrize(("columns", "rows"), [(COLUMNS, []), (["step", "cosine"], [(1, 0.5)])])
def test_other_files_are_refused(tmp_path: Path, columns: list[str], rows: list[Any]) -> None:
    with pytest.raises(ValueError, match="GEffectLogger"):
        heat_map(write(tmp_path / "g.csv", rows, columns), tmp_path / "g.png")
    assert not (tmp_path / "g.png").exists()
