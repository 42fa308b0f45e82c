"""LoKU's adapters: low-rank adapters that start where the forget set lives (FILA), and saving them so that a plain load is right.

Needs ``peft`` (``pip install 'gradsurgery[lightning]'``), imported when it is first used.
"""

from gradsurgery.lora.fila import fila_, save_pretrained
from gradsurgery.lora.fisher import fisher_importance

__all__ = ["fila_", "fisher_importance", "save_pretrained"]
