"""LoKU's adapters: low-rank adapters that start where the forget set lives (FILA), and saving them so that a plain load is right.

Needs ``peft`` (``pip install 'gradsurgery[lightning]'``), imported when it is first used.
"""

from gradsurgery.lora.fila import fila_
from gradsurgery.lora.fisher import fisher_importance
from gradsurgery.lora.saving import save_pretrained

__all__ = ["fila_", "fisher_importance", "save_pretrained"]
