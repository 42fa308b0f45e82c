"""Teaching the target and the reference of --finetune-first, once for all runs that need them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import lightning as L
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import Callback, RichProgressBar
from rich.console import Console

from lightning_modules.data.examples import Example
from lightning_modules.evaluation.processes import processes_ahead
from lightning_modules.folder import locked
from lightning_modules.progress import Stage
from lightning_modules.run.first import SPLITS, Lesson, Part, is_taught, lesson, taught_folder
from lightning_modules.run.models import load_to_train
from lightning_modules.run.options import TrainingOptions, UnlearnOptions
from lightning_modules.run.saving import write_model
from lightning_modules.training.callbacks import Checkpoints, ProgressLines
from lightning_modules.training.checkpoint_file import CheckpointFile
from lightning_modules.training.finetuning import FinetuningDataModule, taught_alone
from lightning_modules.training.recomputing import recompute_activations

_WAIT = 1.0  # seconds between two looks at what another process teaches


def teach_first(options: UnlearnOptions, splits: Mapping[str, Sequence[Example]]) -> None:
    """Teach what --finetune-first asks for and the cache does not hold yet.

    One process calls it, before any other is started. A process that was killed meanwhile is gone on with from its
    last checkpoint. Where another process teaches the same model, this one waits for it.

    Raises:
        ValueError: If the model cannot be taught, or other processes need it already.
        OSError: If the cache cannot be written.
    """
    for part in SPLITS:
        found = lesson(options, splits, part)
        if found is None or is_taught(found.folder):
            continue
        if processes_ahead() > 1:
            # It refuses here as in the others, which would end while this one teaches.
            taught_folder(options, splits, part)
        work = found.folder.with_name(f"{found.folder.name}.training")
        with _alone(work, found.folder):
            if not is_taught(found.folder):
                taught = [split for split in SPLITS[part] if split in splits]
                _teach(found, part, taught, work, options.training)
            shutil.rmtree(work, ignore_errors=True)


def _teach(found: Lesson, part: Part, taught: Sequence[str], work: Path, training: TrainingOptions) -> None:
    settings, console = found.settings, Console(stderr=True, soft_wrap=True)
    console.print(
        f"Teaching the {part} {' and '.join(reversed(taught))}: {len(found.encoded)} examples, {settings.epochs} epochs, into "
        f"{found.folder}",
        markup=False,
        highlight=False,
    )
    started = time.perf_counter()
    L.seed_everything(settings.seed, verbose=False)
    model, tokenizer = load_to_train(found.model, loading=found.loading)
    if training.gradient_checkpointing:  # the same weights with less memory, so that the cache need not tell
        recompute_activations(model)
    last = work / "last.ckpt"
    bar: Callback = RichProgressBar() if console.is_terminal else ProgressLines(f"Teaching the {part}")
    taught_alone(
        model,
        FinetuningDataModule(found.encoded, found.pad_token_id, settings),
        settings,
        device=found.device,
        callbacks=[Checkpoints(last, run=asdict(settings)), bar],
        compiled=training.compile,  # the same to the last digits, which differ between machines too
        packed=bool(training.padding_free),  # the same up to rounding, as well
        precision=found.precision,
        enable_checkpointing=True,
        enable_progress_bar=console.is_terminal,
        plugins=[LightningEnvironment(), CheckpointFile()],
        ckpt_path=last if last.exists() else None,
    )
    write_model(found.folder, model.cpu(), tokenizer, (found.model, found.loading))
    console.print(f"Teaching the {part}: done in {time.perf_counter() - started:.0f} s", highlight=False)


@contextmanager
def _alone(work: Path, taught: Path) -> Generator[None]:
    """Keeps other processes from teaching the same; waits for one that does."""
    stage = Stage("Waiting for another process that teaches the same model, seconds", None)
    with ExitStack() as held:
        while not is_taught(taught):
            try:
                work.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(work))
                break
            except (FileExistsError, FileNotFoundError):  # held, or just removed by the one that held it
                time.sleep(_WAIT)
                stage.advance(round(_WAIT))
        yield
