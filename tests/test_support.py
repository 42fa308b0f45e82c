"""README.md's tables of what is supported and refused are those that the tests declare."""

from __future__ import annotations

import pytest

from tests import support


def test_every_row_is_declared_by_a_test() -> None:
    assert {each.subject for each in support.declared() if each.kind == "supports"} == set(support.ROWS)


def test_readme_has_the_tables_that_the_tests_declare() -> None:
    found = support.block((support.ROOT / "README.md").read_text())
    if found is None:
        pytest.skip(f"README.md has no {support.BEGIN}")
    assert found == support.tables(), "run python tests/support.py --write"


def test_a_declaration_is_read_from_a_file_and_its_tests() -> None:
    source = 'pytestmark = pytest.mark.supports("DDP", "a")\n@pytest.mark.refuses("b", "c")\ndef test_it(): ...\n'
    assert [each[:3] for each in support.markers(source, support.ROOT / "x.py")] == [
        ("supports", "DDP", "a"),
        ("refuses", "b", "c"),
    ]


def test_a_row_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x.py:1: expected one of .*'DDP'.*, found 'DPP'"):
        list(support.markers('pytest.mark.supports("DPP", "a")', support.ROOT / "x.py"))
