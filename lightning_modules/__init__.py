"""Lightning modules, data, metrics, callbacks and the command around `gradsurgery`; usually `import lightning_modules as lm`.

Needs the extra `gradsurgery[lightning]`.
"""

try:
    from lightning_modules import callbacks, metrics
    from lightning_modules.data import ForgetRetainDataModule, TOFUDataModule
    from lightning_modules.module import UnlearningModule
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] in ("gradsurgery", "lightning_modules"):
        raise
    raise ModuleNotFoundError(
        f"lightning_modules needs {error.name}: pip install 'gradsurgery[lightning]'", name=error.name
    ) from error

__all__ = ["ForgetRetainDataModule", "TOFUDataModule", "UnlearningModule", "callbacks", "metrics"]
