"""What tells data, models and versions apart: what results are kept under, so that none is taken for another."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import transformers

import gradsurgery as gs
from lightning_modules.data.hashes import hashed
from lightning_modules.run.options.loading import USUAL, LoadingOptions
from lightning_modules.run.places import is_gguf, place_of
from lightning_modules.run.run import Splits


def content_versions() -> dict[str, str]:
    """The versions of the packages on which scores depend, whole: a patch of ours may change a token or a digit."""
    return {
        "gradsurgery": gs.__version__,
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }


def examples_hash(splits: Splits) -> str:
    """A hash of all examples in their order, whatever files they were read from."""
    return hashed({name: list(rows) for name, rows in splits.items()})


def model_identity(name: str, loading: LoadingOptions = USUAL) -> object:
    """What distinguishes a model from every other one, as JSON; None if that is not known.

    - A folder, or a GGUF file: its path, and the name, size and time of change of every file in the folder.
    - A model on the hub: its commit.

    Where it is loaded in another way than the usual one, that is a part of it. An adapter has no identity, because it
    names a base that may change without it.
    """
    found = _found(name, loading)
    said = {option: getattr(loading, option) for option in loading.stated() if option != "revision"}
    return found if found is None or not said else {"model": found, "loaded": said}


def _found(name: str, loading: LoadingOptions) -> object:
    if is_gguf(name) and Path(name).is_file():
        folder = _folder(Path(name).parent)
        return None if folder is None else {"file": Path(name).name, "in": folder}
    if Path(name).is_dir():
        return _folder(Path(name))
    _ = gs.logit_difference.LogitDifferenceModel  # importing it registers its configuration with Transformers
    try:
        place, file = place_of(name)
        config = transformers.AutoConfig.from_pretrained(place, **loading.files, **file)
        commit = getattr(config, "_commit_hash", None) or _commit(place, file.get("gguf_file", "config.json"), loading)
        adapted = transformers.utils.find_adapter_config_file(place, **loading.at) is not None
    except (OSError, ValueError):  # raised again, with a sentence, when the model is loaded
        return None
    return None if commit is None or adapted else {"hub": name, "commit": commit}


def _commit(place: str, file: str, loading: LoadingOptions) -> str | None:
    """The commit of a file in the cache of the hub, which newer versions of Transformers write nowhere else."""
    path = transformers.utils.cached_file(place, file, local_files_only=True, **loading.at)
    found = re.search(r"/snapshots/([0-9a-f]{40})/", Path(path).as_posix()) if path is not None else None
    return None if found is None else found[1]


def _folder(folder: Path) -> object:
    if (folder / "adapter_config.json").exists():
        return None
    files = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        "folder": str(folder.resolve()),
        "files": [[str(path.relative_to(folder)), found.st_size, found.st_mtime_ns] for path, found in files],
    }
