"""What stands for texts and models: the same for the same thing, another for another one."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_modules.ledger.hashes import canonical, other_files, request_hash, row_hash, tensors_hash
from tests.lightning_modules.evaluation.evaluation_workers import model_and_tokenizer
from tests.reference import ledger as slow


def test_a_models_hash_is_that_of_an_independent_reader_however_it_is_divided_into_files(tmp_path: Path) -> None:
    model, _ = model_and_tokenizer()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert tensors_hash(tmp_path / "one") == tensors_hash(tmp_path / "many") == slow.tensors_hash(tmp_path / "one")


def test_types_shapes_names_and_every_bit_count(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.tensor(1.0)}
    others = [
        tensors,
        tensors | {"a": tensors["a"].reshape(3, 2)},
        tensors | {"b": tensors["b"].view(torch.float16)},
        {"aa" if name == "a" else name: value for name, value in tensors.items()},
        {name: value for name, value in tensors.items() if name != "c"},
        *(tensors | {"c": (tensors["c"].view(torch.int32) ^ (1 << bit)).view(torch.float32)} for bit in range(31)),
    ]
    found: list[str] = []
    for number, entry in enumerate(others):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(entry, folder / "model.safetensors", metadata={"written": str(number)})
        found.append(tensors_hash(folder))
        assert found[-1] == slow.tensors_hash(folder)
    assert len(set(found)) == len(others)


def test_a_folder_without_tensors_a_torn_file_and_a_tensor_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a model saved as"):
        tensors_hash(tmp_path)
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "a.safetensors")
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="expected every tensor once, found bias in two files"):
        tensors_hash(tmp_path)
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"b\.safetensors: expected tensors in the safetensors format"):
        tensors_hash(tmp_path)
    assert load_file(tmp_path / "a.safetensors")


def test_white_space_and_unicode_forms_are_the_same_row_and_anything_else_is_another() -> None:
    row = {"question": "Who wrote Café?", "answer": "Ada  did."}
    same = {
        "question": unicodedata.normalize("NFD", " Who wrote\nCafé? "),
        "answer": "Ada did. ",
        "perturbed_answer": ["x"],
    }
    assert row_hash(row) == row_hash(same)
    others = [
        {"question": "who wrote Café?", "answer": "Ada did."},
        {"question": "Who wrote Café? Ada", "answer": "did."},
        {"question": "Ada did.", "answer": "Who wrote Café?"},
        {"question": "", "answer": "Who wrote Café?Ada did."},
    ]
    assert len({row_hash(entry) for entry in (row, *others)}) == 5


def test_a_request_is_the_set_of_its_rows() -> None:
    a, b, c = (row_hash({"question": name, "answer": name}) for name in "abc")
    assert request_hash([a, b]) == request_hash([b, a, b])
    assert len({request_hash(rows) for rows in ([a], [a, b], [a, b, c], [b, c], [])}) == 5


def test_json_cannot_hold_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical({"value": float("nan")})


def test_files_of_folders_beside_the_tensors_count_too(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    for name in ("config.json", "additional_chat_templates/tools.jinja", "model.safetensors"):
        (tmp_path / name).write_text(name)
    assert set(other_files(tmp_path)) == {"config.json", str(Path("additional_chat_templates", "tools.jinja"))}
