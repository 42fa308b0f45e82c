"""The options in a run's config.yaml, checked like those of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from lightning_modules.data.files import read_yaml
from lightning_modules.run.options import FinetuneOptions, UnlearnOptions


def read_options(path: Path, kind: type[UnlearnOptions | FinetuneOptions] = UnlearnOptions) -> dict[str, Any]:
    """Option -> value, of a run of `unlearn`, or of another command.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not YAML, has a name that is no option of the command, or a value of another type.
    """
    expected = f"the options of `gradsurgery {'unlearn' if kind is UnlearnOptions else 'finetune'}`"
    values = read_yaml(path, expected)
    if not isinstance(values, Mapping):
        raise ValueError(f"{path}: expected {expected}, found {type(values).__name__}")
    names = kind.names()
    for name in map(str, values):
        if name not in names:
            near = get_close_matches(name, names)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"{path}: expected {expected}, found {name!r}, which is none{hint}")
    parser = ArgumentParser(exit_on_error=False)
    for group in kind.groups():
        parser.add_class_arguments(group, None, as_group=False)
    try:
        parsed = parser.parse_object(dict(values), defaults=False)
    except (argparse.ArgumentError, TypeError) as error:
        raise ValueError(f"{path}: expected {expected}, found: {' '.join(str(error).split())}") from error
    return {name: parsed[name] for name in values}
