"""What the command `ablate` can be told; everything about the experiment itself is in the grid."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AblateOptions:
    """Compare methods where they have forgotten equally much: a grid of methods and seeds, a table, a picture.

    Attributes:
        config: YAML file of the grid; examples/ablation/ has some
        output: folder for the runs and what is made of them: grid.yaml, results.csv, table.md, tradeoff.png, depth.png
        tofu_dir: folder with TOFU's files, instead of the grid's own
        jobs: runs at a time, each a process; as many as there are CUDA devices, or 1
        threads: of each process; results depend on it in the last digits, on --jobs not at all
        list: print the index and id of every run, and do nothing
        only: do the run of this id, and draw no table: for a job of a cluster
        index: the same, by index
    """

    config: str = ""
    output: str = "runs/ablation"
    tofu_dir: str | None = None
    jobs: int | None = None
    threads: int = 1
    list: bool = False
    only: str | None = None
    index: int | None = None

    def check(self) -> None:
        """Raise ValueError on options outside their domain."""
        if not self.config:
            raise ValueError("expected --config FILE.yaml with the grid, found none; examples/ablation/ has some")
        if (self.jobs is not None and self.jobs < 1) or self.threads < 1:
            raise ValueError(f"expected --jobs and --threads >= 1, found {self.jobs} and {self.threads}")
        if self.only is not None and self.index is not None:
            raise ValueError("expected --only or --index, found both")
