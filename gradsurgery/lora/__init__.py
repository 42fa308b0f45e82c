"""LoKU's adapters: LoRA that starts from the part of each weight that matters most to the forget set (FILA).

LoKU ([2408.06621](https://arxiv.org/abs/2408.06621)) unlearns with the inverted hinge loss and with adapters that are
started in three steps:

1. `fisher_importance` measures how much more each weight matters to the forget set than to the retain set.
2. `fila_` starts the adapters from the leading directions of the weights, weighted by that importance. It subtracts
   from the base weights what the adapters now hold, so that the model's output does not change at the start.
3. `save_pretrained` saves an ordinary adapter of twice the rank for the *original* base, because `fila_` changes the
   base. A plain ``PeftModel.from_pretrained`` then loads the right model.

The command does all of it: ``gradsurgery unlearn --forget-loss inverted_hinge --lora-rank 8 --lora-init fila``.

Needs ``peft`` (``pip install 'gradsurgery[lightning]'``), imported when it is first used.

Example:
    >>> import gradsurgery as gs, torch
    >>> from peft import LoraConfig, get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), LoraConfig(r=2, target_modules="all-linear"))
    >>> tokens, mask = torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.long)
    >>> forget = [{"input_ids": tokens, "attention_mask": mask, "labels": tokens}]
    >>> retain = [{"input_ids": tokens + 3, "attention_mask": mask, "labels": tokens + 3}]
    >>> before = model(tokens).logits
    >>> model = gs.lora.fila_(model, gs.lora.fisher_importance(model, forget, retain))
    >>> torch.allclose(model(tokens).logits, before, atol=1e-5)  # train it now, then model.save_pretrained(folder)
    True
"""

from gradsurgery.lora.fila import fila_
from gradsurgery.lora.fisher import fisher_importance
from gradsurgery.lora.saving import save_pretrained

__all__ = ["fila_", "fisher_importance", "save_pretrained"]
