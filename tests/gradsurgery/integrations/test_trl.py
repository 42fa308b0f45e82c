"""TRL's SFTTrainer with the mixin: its own loss, its own data, and the oracle's rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.problems import TWO, values
from tests.tolerances import STEPPED_FLOAT32, close

pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

import transformers  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from gradsurgery.integrations.transformers import SurgeryTrainerMixin  # noqa: E402
from tests.gradsurgery.integrations.unlearning import (  # noqa: E402
    CLIP,
    VOCABULARY,
    examples,
    llama,
    oracle,
    sgd,
    surgery,
    windows,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # TRL's, about names that will change
    pytest.mark.supports("TRL's SFTTrainer", "its own loss, metrics and preparation of data, accumulation, clipping"),
]


class InOrder(SurgeryTrainerMixin, trl.SFTTrainer):
    def _get_train_sampler(self, *arguments: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def tokenizer() -> Any:
    words = ["<pad>", "<eos>", *(f"w{number}" for number in range(VOCABULARY - 2))]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def settings(folder: Path, **options: Any) -> Any:
    return trl.SFTConfig(
        str(folder), per_device_train_batch_size=1, num_train_epochs=2, max_grad_norm=CLIP, lr_scheduler_type="constant",
        report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True, bf16=False, log_level="error", **options,
    )  # fmt: skip


def tables(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    return {name: datasets.Dataset.from_list(rows[name]) for name in rows}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_sft_trainer_is_the_oracles_run(accumulate: int, tmp_path: Path) -> None:
    """A mean over each objective's own tokens, of SFTTrainer's own loss for those to keep."""
    model = llama()
    made = InOrder(
        model,
        settings(tmp_path, gradient_accumulation_steps=accumulate),
        train_dataset=tables(examples()),
        processing_class=tokenizer(),
        optimizers=(sgd(model), None),
        surgery=surgery,
    )
    made.train()
    close(values(model), oracle(windows(accumulate)), STEPPED_FLOAT32)
    assert any("entropy" in line for line in made.state.log_history), "SFTTrainer's own metrics"


def test_every_objectives_data_are_prepared_as_sft_trainer_prepares_its_own(tmp_path: Path) -> None:
    rows = {
        "forget": [{"prompt": "w1 w2", "completion": " w3 w4"}, {"prompt": "w5", "completion": " w6"}],
        "retain": [{"prompt": "w7 w8 w9", "completion": " w1"}],
    }
    prepared = {
        name: trl.SFTTrainer(
            llama(), settings(tmp_path, max_length=4), train_dataset=table, processing_class=tokenizer()
        ).train_dataset
        for name, table in tables(rows).items()
    }
    found = InOrder(
        llama(), settings(tmp_path, max_length=4), train_dataset=tables(rows), processing_class=tokenizer()
    ).train_dataset
    assert {name: list(found.datasets[name]) for name in TWO} == {name: list(prepared[name]) for name in TWO}
    assert found[0]["forget"]["labels"] == [-100, -100, 5, 6]
