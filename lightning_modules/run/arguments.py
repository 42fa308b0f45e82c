"""From a dataclass to flags: jsonargparse's class arguments, with dashes in the flags and hints on wrong names."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser

from lightning_modules.data.files import read_yaml
from lightning_modules.run.options.flat import NAMES, flag


class UsageError(Exception):
    """What the command line lacks or has too much. It is no ValueError, so that the parser passes it on."""


class UnknownNameError(UsageError):
    """A name outside a closed set."""


class Parser(ArgumentParser):
    """A parser whose flags have dashes, whose booleans need no value, and which names what is near a wrong name.

    Example:
        >>> from lightning_modules.run.options import MethodOptions
        >>> parser = Parser()
        >>> parser.add_options(MethodOptions)
        >>> parser.parse_args(["--rule", "gem", "--ema-decay", "0.7"]).ema_decay
        0.7
        >>> try:
        ...     parser.parse_args(["--rule", "gruu"])
        ... except UnknownNameError as error:
        ...     print(str(error).partition(";")[2])
         did you mean gru or gu?
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._group: type | None = None
        self._kinds: dict[str, Any] = {}
        # Half a flag is a typo: --epo for --epochs today, and for another option tomorrow.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As usual; a file of options that is no text is a mistake in the arguments too."""
        try:
            return super().parse_args(*args, **kwargs)
        except UnicodeDecodeError as error:
            raise UnknownNameError(
                f"--config: expected YAML in UTF-8, found other bytes ({error}): save it as UTF-8"
            ) from error

    def add_options(self, group: type) -> None:
        """Add a flag for every field of a dataclass, with the help text under "Attributes" in its docstring."""
        self._group = group
        self.add_class_arguments(group, None, as_group=False)
        self._group = None

    def add_argument(self, *names: Any, **settings: Any) -> Any:
        """Called by jsonargparse for every field while options are added; otherwise as usual."""
        if self._group is None:
            return super().add_argument(*names, **settings)
        options = [name.removeprefix("--") for name in names]  # of a list a second one, NAME+, which appends
        option = options[0]
        kind = self._kinds[flag(option)] = typing.get_type_hints(self._group)[option]
        if bool in (kind, *typing.get_args(kind)):
            if any(not action.option_strings for action in self._actions):  # a value would take the parser's own word
                settings = {name: settings[name] for name in ("help", "default")} | {"action": "store_true"}
            else:
                settings |= {"nargs": "?", "const": True}
        known = next(entry.metadata.get(NAMES) for entry in fields(self._group) if entry.name == option)
        if known is not None:
            text = settings["help"].replace("{names}", ", ".join(known))
            settings |= {"type": _Name(flag(option), known), "help": text}
        return super().add_argument(*map(flag, options), **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a mistake in the arguments as one sentence; argparse would print the usage, which here is a page."""
        said = " ".join(message.split()).rstrip(".")
        for theirs, ours in _WORDS.items():
            said = re.sub(theirs, ours, said)
        unknown = re.search(r"unrecognized arguments: --([\w-]+)", said)
        raise self.mistake(said, unknown[1] if unknown else None) from ex

    def mistake(self, said: str, unknown: str | None = None) -> UsageError:
        """A mistake as an error, with what may have been meant by a name that is none."""
        names = self.flags()
        near: list[str] = []
        if unknown is not None:
            near = [name for name in names if name.startswith(unknown)] or get_close_matches(unknown, names)
        meant = f"did you mean {' or '.join(f'--{name}' for name in near)}? " if near else ""
        return UsageError(f"{said}; {meant}{self.prog.replace(' [options]', '')} --help lists what there is")

    def takes_null(self, flagged: str) -> bool:
        """Whether an option, by the name of its flag, can be null."""
        kind = self._kinds.get(f"--{flagged}")
        return kind is None or type(None) in typing.get_args(kind)

    def flags(self) -> list[str]:
        """The names of all flags, as they are typed after the two dashes."""
        return [name.removeprefix("--") for name in self._option_string_actions if name[:2] == "--" and name[-1] != "+"]


class ConfigFile(ActionConfigFile):
    """A file of options; what is no option in it is a sentence that names the file."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Look at the names in the file, and read it as usual.

        Raises:
            UsageError: If the file holds no options, a name that is none or is there twice, or null where no option
                takes it.
        """
        try:
            found = read_yaml(values, "options")
        except OSError:  # no file: it is said below
            found = None
        except ValueError as error:
            raise parser.mistake(f"--config {error}") from error
        if found is not None and not isinstance(found, Mapping):
            raise parser.mistake(f"--config {values}: expected lines `option: value`, found a {type(found).__name__}")
        for name, value in (found or {}).items():
            name = str(name)
            flagged = name.removesuffix("+").replace("_", "-")
            if flagged not in parser.flags():
                raise parser.mistake(f"--config {values}: expected options, found {name!r:.80}, which is none", flagged)
            if value is None and not parser.takes_null(flagged):
                raise parser.mistake(f"--config {values}: expected a value of {name}, found null; leave the line out")
        super().__call__(parser, cfg, values, option_string)


# What jsonargparse says -> the same in the words of our other errors.
_WORDS: dict[str, Callable[[re.Match[str]], str] | str] = {
    r'Parser key "(\w+)":': lambda found: f"{flag(found[1])}:",
    r"Does not validate against any .* Subtypes: \[(.*?)\] Errors:.* Given value: ": r"expected \1, found ",
    r"Expected a ": "expected ",
    r"\. Got value: ": ", found ",
    r"<class '(\w+)'>": r"\1",
    r"NoneType": "null",
    r"typing\.Literal\[(.*?)\]": r"one of \1",
}


class _Name:
    """A type of argument: one of some strings. What it is called in `--help` is its `repr`."""

    def __init__(self, flag: str, known: Sequence[str]) -> None:
        self.flag, self.known = flag, known

    def __call__(self, value: str) -> str:
        if value in self.known:
            return value
        near = get_close_matches(value, self.known)
        raise UnknownNameError(
            f"{self.flag}: expected one of {', '.join(self.known)}, found {value!r}"
            + (f"; did you mean {' or '.join(near)}?" if near else "")
        )

    def __repr__(self) -> str:
        return "name"
