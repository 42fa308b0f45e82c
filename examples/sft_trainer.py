"""Unlearning with TRL's SFTTrainer: the mixin, two datasets, and nothing else.

Run it: python examples/sft_trainer.py   (needs `pip install trl`)
"""

import tempfile
from functools import partial
from typing import Any

import torch

try:
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]
except ImportError:
    raise SystemExit("this example needs TRL: pip install trl") from None
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import gradsurgery as gs
from gradsurgery.integrations.transformers import SurgeryTrainerMixin


class Unlearn(SurgeryTrainerMixin, SFTTrainer):  # pyright: ignore[reportUntypedBaseClass]
    """Everything is SFTTrainer's own, but for two losses whose gradients are kept apart."""


def facts(names: list[str], towns: list[str]) -> Dataset:
    rows = [
        {"prompt": f"Where does {name} live ?", "completion": f" {town}"}
        for name, town in zip(names, towns, strict=True)
    ]
    return Dataset.from_list(rows)


def tokenizer_of(words: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(["<pad>", "<eos>", *words.split()]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def settings(**options: Any) -> SFTConfig:
    return SFTConfig(
        tempfile.mkdtemp(), per_device_train_batch_size=4, lr_scheduler_type="constant", report_to="none", bf16=False,
        disable_tqdm=True, save_strategy="no", logging_strategy="no", use_cpu=not torch.cuda.is_available(), **options,
    )  # fmt: skip


if __name__ == "__main__":
    names = [f"person{number}" for number in range(16)]
    towns = [f"town{number % 5}" for number in range(16)]
    tokenizer = tokenizer_of(" ".join(["Where does live ?", *names, *towns]))
    forget, retain = facts(names[:4], towns[:4]), facts(names[4:], towns[4:])
    sizes: Any = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, **sizes))

    def known(data: Any) -> float:
        """The mean probability of the towns."""
        found = []
        for row in data:
            ids = torch.tensor([tokenizer(row["prompt"] + row["completion"])["input_ids"]], device=model.device)
            found.append(model(input_ids=ids).logits[0, -2].softmax(-1)[ids[0, -1]].item())
        return sum(found) / len(found)

    everything = facts(names, towns)
    args = settings(num_train_epochs=20, learning_rate=1e-2)
    SFTTrainer(model, args, train_dataset=everything, processing_class=tokenizer).train()
    print(f"learned:   forget {known(forget):.2f}, retain {known(retain):.2f}")

    trainer = Unlearn(
        model,
        settings(max_steps=30, learning_rate=2e-3),
        train_dataset={"forget": forget, "retain": retain},
        surgery=partial(gs.GRU, add={"retain": 5.0}),  # beside the projection, five times the retain gradient itself
        processing_class=tokenizer,
    )
    trainer.train()
    print(f"unlearned: forget {known(forget):.2f}, retain {known(retain):.2f}")
    if (record := trainer.surgery.record) and record.coefficients is not None:
        print(f"last step: cosine {record.cosines[0, 1]:+.2f}, coefficients {record.coefficients.tolist()}")
