"""The command `gradsurgery`: it reads the command line, runs one of six commands and turns errors into sentences."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

_COMMANDS = {
    "finetune": "teach a model a set of examples: what it can forget later, or the reference that never saw some of them",
    "unlearn": "make a model forget, and measure what it forgot and what it kept",
    "evaluate": "score a model on its splits; writes metrics.json",
    "ablate": "compare methods where they have forgotten equally much: a grid of methods and seeds",
    "ledger": "show, verify or report a record of deletion requests, which unlearn --ledger makes; plan those that wait",
    "report": "draw report.html, report.md and curves.png again from what is in a run's folder; with more, the spread over seeds",
}

_ACTIONS = {
    "show": "print a ledger's table",
    "verify": "check that a ledger, and everything that it names, is as it was written",
    "report": "write report.html into a ledger's folder",
}

_EXIT = """exit status: 0 if it is done; 1 if something has to be mended first, in the options, the data, the model or the folder,
which a sentence on standard error says (a traceback in its place is a mistake of ours: please report it); 130 if it was
interrupted"""

_HINTS = {
    "finetune": "; the same command with --resume goes on from the last checkpoint",
    "unlearn": "; the same command with --resume goes on from the last checkpoint",
    "ablate": "; the same command goes on with the runs that are not finished",
}

_FILES = {"config"}  # read by the parser: the options in the file are given, and not the file

_SENTENCES = {
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    OSError,
    RuntimeError,
    FloatingPointError,
    ImportError,  # that names what to install; one of a module that is nowhere is ModuleNotFoundError
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. An error that the user can mend becomes one message instead of a traceback.

    Args:
        arguments: Those of the command line, without the program's name; by default those of this process.

    Returns:
        0; 1 after whatever the user can mend, from a misspelt option to a full disk; 130 if interrupted. `--help` says
        the same.

    Raises:
        SystemExit: With status 0 after --help.
    """
    try:
        from lightning_modules.run.arguments import UsageError
        from lightning_modules.run.group import leaving_group

        parser = _make_parser()
    except ModuleNotFoundError as error:
        return _not_installed(error)
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        # Only what is given, so that --resume notices an option that is given and equal to its default.
        parsed = parser.parse_args(words, defaults=False)
    except UsageError as error:
        return _said(error)
    command = parsed.subcommand
    given = {name: value for name, value in vars(parsed[command]).items() if command == "ablate" or name not in _FILES}
    try:
        try:
            work = _work(command, given, words)
        except ModuleNotFoundError as error:
            return _not_installed(error)
        with leaving_group():
            work()
    except (KeyboardInterrupt, SystemExit):  # Lightning turns the first into the second
        sys.stderr.write(f"gradsurgery: interrupted{_HINTS.get(command, '')}\n")
        return 130
    except Exception as error:
        if not _ours(error):
            raise
        return _said(error)
    return 0


def _work(command: str, given: Mapping[str, Any], words: Sequence[str]) -> Callable[[], object]:
    """What a command is to do. Its options are checked first, as far as that takes no import of seconds."""
    from lightning_modules.ablation.options import AblateOptions
    from lightning_modules.run.options import EvaluateOptions, FinetuneOptions, UnlearnOptions

    if command == "report":
        from lightning_modules.run.report import draw_again

        work = partial(draw_again, Path(given["folder"]), [Path(other) for other in given.get("others") or ()])
    elif command == "ledger":
        work = _work_of_ledger(given["subcommand"], dict(vars(given[given["subcommand"]])))
    elif command == "ablate":
        compared = AblateOptions(**given)
        compared.check()
        from lightning_modules.ablation.sweep import ablate

        work = partial(ablate, compared)
    elif command == "evaluate":
        scored = EvaluateOptions.of(**given)
        scored.check()
        from lightning_modules.run.evaluate import evaluate_model

        work = partial(evaluate_model, scored)
    elif command == "finetune":
        taught = FinetuneOptions.of(**given)
        if not taught.training.resume:  # then config.yaml has the options
            taught.check()
        from lightning_modules.run.finetune import finetune

        work = partial(finetune, taught, stated=given)
    else:
        options = UnlearnOptions.of(**given)
        if not options.training.resume:
            options.check_without_torch()
            options.check_effect()
            options.check_authors(typed=any(word.partition("=")[0] == "--authors" for word in words))
        from lightning_modules.run.unlearn import unlearn

        work = partial(unlearn, options, stated=given)
    from lightning_modules.run.quiet import quiet

    quiet()
    return work


def _work_of_ledger(action: Any, given: dict[str, Any]) -> Callable[[], object]:
    from lightning_modules.run.options import LedgerPlanOptions, LedgerVerifyOptions

    if action == "plan":
        planned = LedgerPlanOptions.of(**given)
        planned.check()
        from lightning_modules.run.ledger_plan import plan_requests

        return partial(plan_requests, planned)
    folder = Path(given.pop("folder"))
    from lightning_modules.run.ledger import report_ledger, show_ledger, verify_ledger

    if action == "verify":
        return partial(verify_ledger, folder, LedgerVerifyOptions(**given))
    return partial(show_ledger if action == "show" else report_ledger, folder)


def _not_installed(error: ModuleNotFoundError) -> int:
    sys.stderr.write(f"gradsurgery: {error.name} is not installed; pip install 'gradsurgery[lightning]'\n")
    return 1


def _said(error: Exception) -> int:
    """Print an error, with visible signs for control characters: a file's own words may be in it. Returns 1."""
    from lightning_modules.data.visible import visible

    sys.stderr.write(f"gradsurgery: {visible(error)}\n")
    return 1


def _make_parser() -> ArgumentParser:
    from lightning_modules.ablation.options import AblateOptions
    from lightning_modules.run.arguments import ConfigFile, Parser
    from lightning_modules.run.options import EvaluateOptions, FinetuneOptions, UnlearnOptions

    parser = Parser(prog="gradsurgery", description="Gradient surgery for language-model unlearning.", epilog=_EXIT)
    subcommands = parser.add_subcommands(required=True)
    for name, options in (
        ("unlearn", UnlearnOptions),
        ("evaluate", EvaluateOptions),
        ("finetune", FinetuneOptions),
    ):
        subparser = Parser(description=options.__doc__, print_config=None)
        subparser.add_argument(
            "--config", action=ConfigFile, help="YAML file with any of these options; later ones win"
        )
        for group in options.groups():
            subparser.add_options(group)
        subcommands.add_subcommand(name, subparser, help=_COMMANDS[name])
    ablation = Parser(description=str(AblateOptions.__doc__).partition("\n")[0])
    ablation.add_options(AblateOptions)
    subcommands.add_subcommand("ablate", ablation, help=_COMMANDS["ablate"])
    _add_ledger(subcommands)
    report = Parser(description="Draw the report of a run again; with further runs, also the spread over seeds.")
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
    return parser


def _add_ledger(subcommands: Any) -> None:
    from lightning_modules.run.arguments import Parser
    from lightning_modules.run.options import LedgerPlanOptions, LedgerVerifyOptions

    ledger = Parser(description=_COMMANDS["ledger"])
    subcommands.add_subcommand("ledger", ledger, help=_COMMANDS["ledger"])
    actions = ledger.add_subcommands(required=True)
    for name, what in _ACTIONS.items():
        action = Parser(description=f"{what[0].upper()}{what[1:]}.")
        action.add_argument("folder", type=str, metavar="FOLDER", help="of the ledger")
        if name == "verify":
            action.add_options(LedgerVerifyOptions)
        actions.add_subcommand(name, action, help=what)
    plan = Parser(description=LedgerPlanOptions.__doc__)
    for group in LedgerPlanOptions.groups():
        plan.add_options(group)
    actions.add_subcommand("plan", plan, help="estimate which requests that wait are cheap to do together")


def _ours(error: Exception) -> bool:
    """Whether our own code raised the error, in a sentence that says what to do. Of any other, the traceback helps."""
    if type(error) not in _SENTENCES:
        return False
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    packages = [Path(__file__).parent]
    if core := sys.modules.get("gradsurgery"):  # if it is not imported, it has raised nothing
        packages.append(Path(str(core.__file__)).parent)
    return any(raised_in.is_relative_to(package) for package in packages)


if __name__ == "__main__":
    sys.exit(main())
