"""The command `gradsurgery`."""

from __future__ import annotations

import logging
import sys
import traceback
import typing
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

_COMMANDS = {
    "unlearn": "make a model forget, and measure what it forgot and what it kept",
    "evaluate": "score a model on its splits; writes metrics.json",
    "ablate": "compare methods where they have forgotten equally much: a grid of methods and seeds",
    "report": "draw report.html, report.md and curves.png again from what is in a run's folder; with more, the spread over seeds",
}


_HINTS = {
    "unlearn": "; the same command with --resume goes on from the last finished epoch",
    "ablate": "; the same command goes on with the runs that are not finished",
}

_SENTENCES = {
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    RuntimeError,
    FloatingPointError,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; errors that the user can mend are one message, not a traceback.

    Args:
        arguments: Without the program's name; those of the process when None.

    Returns:
        0, or 1 after an error.
    """
    try:
        from jsonargparse import ArgumentParser

        from lightning_modules.ablation.options import AblateOptions
        from lightning_modules.ablation.sweep import ablate
        from lightning_modules.run import unlearn as commands
        from lightning_modules.run.options import EvaluateOptions, UnlearnOptions
    except ModuleNotFoundError as error:
        sys.stderr.write(f"gradsurgery: {error.name} is not installed; pip install 'gradsurgery[lightning]'\n")
        return 1
    parser = ArgumentParser(prog="gradsurgery", description="Gradient surgery for language-model unlearning.")
    subcommands = parser.add_subcommands(required=True)
    for name, options in (("unlearn", UnlearnOptions), ("evaluate", EvaluateOptions)):
        subparser = ArgumentParser(description=options.__doc__)
        subparser.add_argument("--config", action="config", help="YAML file with any of these options; later ones win")
        _add(subparser, options)
        subcommands.add_subcommand(name, subparser, help=_COMMANDS[name])
    ablation = ArgumentParser(description=AblateOptions.__doc__)
    _add(ablation, AblateOptions)
    subcommands.add_subcommand("ablate", ablation, help=_COMMANDS["ablate"])
    report = ArgumentParser(
        description="Draw the report of a run again; with further runs, also the spread over seeds."
    )
    report.add_argument(
        "folder", type=str, metavar="DIR", help="the output folder of a run, where its report is written"
    )
    report.add_argument(
        "others",
        type=str,
        nargs="*",
        default=[],
        metavar="OTHER_DIR",
        help="those of the same configuration with other seeds",
    )
    subcommands.add_subcommand("report", report, help=_COMMANDS["report"])
    parsed = parser.parse_args(list(arguments) if arguments is not None else None)
    quiet()
    try:
        if parsed.subcommand == "report":
            commands.draw(Path(parsed.report.folder), [Path(other) for other in parsed.report.others or ()])
        elif parsed.subcommand == "ablate":
            ablate(_read(AblateOptions, parsed.ablate))
        elif parsed.subcommand == "evaluate":
            commands.evaluate_model(_read(EvaluateOptions, parsed.evaluate))
        else:
            commands.unlearn(_read(UnlearnOptions, parsed.unlearn))
    except (KeyboardInterrupt, SystemExit):  # Lightning turns the first into the second
        sys.stderr.write(f"gradsurgery: interrupted{_HINTS.get(parsed.subcommand, '')}\n")
        return 130
    except Exception as error:
        if not _ours(error):
            raise
        sys.stderr.write(f"gradsurgery: {error}\n")
        return 1
    return 0


def _ours(error: Exception) -> bool:
    """Whether our own code raised it, in a sentence that says what to do; of any other the traceback is what helps."""
    if type(error) not in _SENTENCES:
        return False
    import gradsurgery

    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return any(raised_in.is_relative_to(Path(str(package)).parent) for package in (gradsurgery.__file__, __file__))


def _add(parser: Any, options: type) -> None:
    """Every field of the dataclass as a flag with dashes."""
    types = typing.get_type_hints(options)
    for entry in fields(options):
        default = entry.default if entry.default is not MISSING else entry.default_factory()  # pyright: ignore[reportCallIssue]
        flag: dict[str, Any] = {"type": types[entry.name], "default": default, "help": entry.metadata["help"]}
        if types[entry.name] in (bool, bool | None):
            flag |= {"nargs": "?", "const": True}
        parser.add_argument(f"--{entry.name.replace('_', '-')}", **flag)


def _read(options: type, parsed: Any) -> Any:
    return options(**{entry.name: getattr(parsed, entry.name) for entry in fields(options)})


def quiet() -> None:
    """Keep other libraries' hints about their own settings out of the way of the table."""
    for name in ("lightning.pytorch", "lightning.fabric", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for pattern in (
        ".*does not have many workers.*",
        ".*number of training batches.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*have no .validation_step.*",
    ):
        warnings.filterwarnings("ignore", message=pattern)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
