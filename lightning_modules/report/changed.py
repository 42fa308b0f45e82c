"""Which options of a run are not the default."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Defaults:
    """The values of options that nobody gave. The report reads folders and knows no options, so `run.report` says them.

    Attributes:
        plain: option -> its default; None where the default depends on other options.
        usual: config.yaml -> option -> the value that a run of the same model and method has when nothing else is
            given.
    """

    plain: Mapping[str, Any]
    usual: Callable[[Mapping[str, Any]], Mapping[str, Any]]


def changed_options(config: Mapping[str, Any], defaults: Defaults) -> dict[str, str]:
    """Returns the options that differ from what the same model and method would have had, as flags with their values.

    `output` and `resume` are left out, which say nothing about the method.

    Args:
        config: the contents of config.yaml.
        defaults: what the options are when nobody gives them.
    """
    usual = defaults.usual(config)
    changed = {name: value for name, value in config.items() if name not in usual or usual[name] != value}
    return {
        f"--{name.replace('_', '-')}": value if isinstance(value, str) else json.dumps(value, default=str)
        for name, value in changed.items()
        if name not in ("output", "resume")
    }
