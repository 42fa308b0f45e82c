"""Going on with an interrupted run."""

from __future__ import annotations

from lightning_modules.folder import CONFIG, METRICS
from lightning_modules.run.options import UnlearnOptions
from lightning_modules.run.options.flat import flag
from lightning_modules.run.saved import read_options


def resumed(given: UnlearnOptions) -> UnlearnOptions:
    """The options of the interrupted run in `--output`. Those given now may repeat them, but not differ from them.

    Raises:
        FileNotFoundError: If there is no run in the folder.
        FileExistsError: If the run in it is finished.
        ValueError: If an option is given that the run was not started with.
    """
    folder = given.output.folder
    config = folder / CONFIG
    if not config.exists():
        raise FileNotFoundError(f"--resume: expected a run in {folder}, found no {CONFIG}; start it without --resume")
    if (folder / METRICS).exists():
        raise FileExistsError(
            f"--resume: expected an interrupted run, found a finished one in {folder}; choose another --output, or draw its report "
            f"again with `gradsurgery report {folder}`"
        )
    values = read_options(config)
    names = set(UnlearnOptions.names())
    place = {"output": given.output.output}
    saved = UnlearnOptions.of(**values | place)
    before, now = saved.flat(), given.flat()
    default = UnlearnOptions.of(**place).flat()
    changed = [flag(name) for name in sorted(names - {"resume"}) if now[name] not in (default[name], before[name])]
    if changed:
        raise ValueError(
            f"--resume: expected the options of {config}, found others for {', '.join(changed)}; leave them out, or start a new run"
        )
    return saved.but(resume=True)
