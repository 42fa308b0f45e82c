"""The relearning attacks are those of the table that the reference shows."""

from __future__ import annotations

import re

import pytest

from lightning_modules.probes import relearning_attacks

TABLE = re.findall(r"^\s*\| `(\w+)`.*\| (\d+) \| (\S+) \| (\S+) \|$", relearning_attacks.__doc__ or "", re.MULTILINE)


@pytest.mark.parametrize("scratch", [True, False])
def test_they_are_as_long_and_as_fast_as_their_table_says(scratch: bool) -> None:
    found = relearning_attacks(scratch=scratch, batch_size=3, seed=5)
    assert list(found) == [name for name, *_ in TABLE]
    for name, steps, small, other in TABLE:
        settings = found[name].settings
        assert (settings.steps, settings.lr) == (int(steps), float(small if scratch else other))
        assert (settings.batch_size, settings.seed) == (3, 5)
        assert settings.lora_rank == (16 if name == "relearn_lora" else 0)
    lessons = {"relearn_general": "general", "relearn_retain": "retain"}
    assert {name: attack.lessons for name, attack in found.items()} == {
        name: lessons.get(name, "forget") for name in found
    }
