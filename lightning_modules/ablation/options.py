"""What the command `ablate` can be told; everything about the experiment itself is in the grid."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_modules.run.options import _option


@dataclass
class AblateOptions:
    """Compare methods where they have forgotten equally much: a grid of methods and seeds, a table, a picture."""

    config: str = _option("", "YAML file of the grid; examples/ablation/ has some")
    output: str = _option("runs/ablation", "folder for the runs, results.csv, table.md and tradeoff.png")
    tofu_dir: str | None = _option(None, "folder with TOFU's files, instead of the grid's own")
    jobs: int | None = _option(None, "runs at a time, each a process; as many as there are CUDA devices, or 1")
    threads: int = _option(1, "of each process; results depend on it in the last digits, on --jobs not at all")
    list: bool = _option(False, "print the index and id of every run, and do nothing")
    only: str | None = _option(None, "do the run of this id, and draw no table: for a job of a cluster")
    index: int | None = _option(None, "the same, by index")

    def check(self) -> None:
        """Raise ValueError on options outside their domain."""
        if not self.config:
            raise ValueError("expected --config FILE.yaml with the grid, found none; examples/ablation/ has some")
        if (self.jobs is not None and self.jobs < 1) or self.threads < 1:
            raise ValueError(f"expected --jobs and --threads >= 1, found {self.jobs} and {self.threads}")
        if self.only is not None and self.index is not None:
            raise ValueError("expected --only or --index, found both")
