"""LogitDifferenceModel: a base model minus its assistant, as one Transformers causal language model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from gradsurgery.logit_difference.logits import check_weight, logit_difference, top_logit_mask
from gradsurgery.logit_difference.paired_cache import PairedCache
from gradsurgery.logit_difference.shared_layers import (
    common_layers,
    first_layers,
    share,
    share_equal_weights,
    shared_parameters,
)
from gradsurgery.losses import answer_tokens

BASE, ASSISTANT = "base", "assistant"
# Code that is handed a model reads these limits and special tokens from its config: they are the base's.
_MIRRORED = ("vocab_size", "max_position_embeddings", "hidden_size", "bos_token_id", "eos_token_id", "pad_token_id")


class LogitDifferenceConfig(PreTrainedConfig):
    """What config.json of a saved `LogitDifferenceModel` contains; the two models have configs of their own.

    Attributes:
        weight: How much of the assistant is subtracted.
        top_logit_filter: Rate of the filter.
        assistant_layers: The number of the base's first layers on which the assistant is an adapter; None for an
            assistant that is a model of its own.
    """

    model_type = (
        "logit_difference"  # unknown to Transformers: AutoModel refuses the folder unless this module is imported
    )


class LogitDifferenceModel(PreTrainedModel, GenerationMixin):
    """A causal language model with the logits `base - weight * assistant`: ULD at inference.

    It is called, generates and is saved like any Transformers model. Every call runs both models, one after the
    other, on the same tokens (ULD, equation 2; `gradsurgery.logit_difference.logit_difference` has the formula).

    `forward` returns scoring logits by default: filtered tokens keep the base logit. `model.generate` is Transformers'
    own (greedy, sampling and beam search). It gets its inputs from `prepare_inputs_for_generation`, which asks
    `forward` for generating logits, where filtered tokens are -inf. So the choice is an argument of each call, and not
    a state of the model. Both key-value caches travel in one `PairedCache`, which `forward` creates when it is asked
    for a cache and given none; other implementations of a cache are not supported.

    Differences from the authors' code: there only greedy decoding works with a filter, one cache is passed to both
    models, and `weight` is stored negative.

    Args:
        base: The model that is to forget; it stays as it is.
        assistant: From `gradsurgery.logit_difference.assistant`, or any causal language model of the same vocabulary.
            It is put into the base's train or eval mode.
        weight: How much of the assistant is subtracted; an attribute that may be changed.
        top_logit_filter: Rate of the filter, 0 for none (the paper uses 0.01); an attribute that may be changed.

    Raises:
        ValueError: If the vocabularies differ, or weight or filter are outside their domain.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from gradsurgery.logit_difference import assistant
        >>> sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2)
        >>> base = LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=None)).eval()
        >>> model = LogitDifferenceModel(base, assistant(base, num_layers=1, lora_rank=2), weight=0.75)
        >>> tokens = torch.tensor([[1, 2, 3]])
        >>> model(tokens).logits.shape
        torch.Size([1, 3, 9])
        >>> model.generate(tokens, max_new_tokens=4, do_sample=True).shape
        torch.Size([1, 7])
    """

    config_class = LogitDifferenceConfig
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # each model decides for itself

    def __init__(
        self, base: nn.Module, assistant: nn.Module, weight: float = 0.75, top_logit_filter: float = 0.0
    ) -> None:
        check_weight(weight)
        top_logit_mask(torch.zeros(1), top_logit_filter)
        sizes = [_text_config(model).vocab_size for model in (base, assistant)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"expected an assistant with the base's vocabulary of {sizes[0]} tokens, found {sizes[1]}: build it from the base with "
                "gradsurgery.logit_difference.assistant"
            )
        mirrored: dict[str, Any] = {name: getattr(_text_config(base), name, None) for name in _MIRRORED}
        super().__init__(LogitDifferenceConfig(**mirrored))
        self.base, self.assistant = base, assistant
        self.weight, self.top_logit_filter = weight, top_logit_filter
        if (generation_config := getattr(base, "generation_config", None)) is not None:
            self.generation_config = copy.deepcopy(generation_config)
        self.train(base.training)
        share_equal_weights(base, assistant)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PairedCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        generating: bool = False,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run both models and subtract their logits. The signature is Hugging Face's.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, with cached tokens `[B, cached + T]`.
            position_ids: `[B, T]`; by default each model counts for itself.
            past_key_values: From an earlier call.
            labels: `[B, T]`, -100 where nothing counts, not shifted: adds the mean cross-entropy.
            use_cache: Whether a cache is created and returned; by default what the base's config says.
            logits_to_keep: How many of the last positions, 0 for all, or which.
            generating: Whether filtered tokens get -inf, see `logit_difference`; `model.generate` sets it.
            return_dict: False for a tuple.
            num_items_in_batch: The number of labels of a whole step, over which a trainer that accumulates takes the
                mean; by default of this batch.
            kwargs: Given to both models.

        Returns:
            `CausalLMOutputWithPast` with `loss`, `logits` (float32, `[B, T, V]`) and `past_key_values`.

        Raises:
            TypeError: If `past_key_values` is a cache of one model.
        """
        if past_key_values is not None and not isinstance(past_key_values, PairedCache):
            raise TypeError(
                f"expected past_key_values of an earlier call of this model, a PairedCache, found {type(past_key_values).__name__}: each "
                "of the two models needs its own cache, and leaving the argument out makes both"
            )
        if use_cache is None:
            use_cache = bool(getattr(_text_config(self.base), "use_cache", False))
        cache = past_key_values
        if cache is None and use_cache:
            cache = PairedCache(*(DynamicCache(config=_text_config(model)) for model in (self.base, self.assistant)))
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, **kwargs}
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        if not isinstance(logits_to_keep, int) or logits_to_keep:
            inputs["logits_to_keep"] = logits_to_keep
        halves = (None, None) if cache is None else (cache.base, cache.assistant)
        base, assistant = (
            model(**inputs, past_key_values=half, use_cache=use_cache, return_dict=True).logits
            for model, half in zip((self.base, self.assistant), halves, strict=True)
        )
        logits = logit_difference(base, assistant, self.weight, self.top_logit_filter, generating=generating)
        loss = None
        if labels is not None:
            rows, tokens = answer_tokens(logits, labels)
            loss = cross_entropy(rows, tokens)
            if num_items_in_batch is not None:
                loss = loss * (len(tokens) / num_items_in_batch)
        output = CausalLMOutputWithPast(
            loss=loss,  # pyright: ignore[reportArgumentType] (a plain tensor, as everywhere in Transformers)
            logits=logits,  # pyright: ignore[reportArgumentType]
            past_key_values=cache if use_cache else None,
        )
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The inputs that any decoder gets, with the request for generating logits."""
        # The mixin annotates self with a protocol that, to pyright, no model of Transformers satisfies.
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        return {**inputs, "generating": True}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate would create a single cache; forward creates the pair

    def get_output_embeddings(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """None: no single matrix turns hidden states into these logits."""
        return

    def _apply(self, fn: Any, recurse: bool = True) -> LogitDifferenceModel:
        # A move to another device or dtype: the base goes first, so that shared weights are moved once and stay shared.
        shared = shared_parameters(self.base, self.assistant)
        self.base._apply(fn, recurse)
        share(shared)
        self.assistant._apply(fn, recurse)
        share(shared)
        return self

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write `base/` (a checkpoint of the untouched model), `assistant/`, and a config.json of this class.

        An assistant from `logit_difference.assistant` is saved as its adapter and the number of its layers, any other
        as a checkpoint of its own. `AutoModelForCausalLM.from_pretrained(save_directory)` gives this model back where
        `LogitDifferenceModel` has been imported from `gradsurgery.logit_difference`. Elsewhere it raises ValueError
        (unknown model type): it never gives the base alone.

        Args:
            save_directory: A folder; it is created.
            kwargs: As of `save_pretrained` for the two checkpoints, for example `max_shard_size`.

        Raises:
            ValueError: If the base has an adapter, or the assistant has one on weights that are not the base's:
                nothing is written.
        """
        if hasattr(self.base, "peft_config"):
            raise ValueError("expected a base without an adapter, found one with: merge_and_unload() it before saving")
        folder = Path(save_directory)
        adapted: Any = self.assistant if hasattr(self.assistant, "peft_config") else None
        self.config.update(
            {
                "weight": self.weight,
                "top_logit_filter": self.top_logit_filter,
                "assistant_layers": None if adapted is None else common_layers(self.base, adapted),
                "architectures": [type(self).__name__],
            }
        )
        parts: Any = self.base, self.assistant
        self.config.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)
        parts[0].save_pretrained(folder / BASE, **kwargs)
        # The embeddings are the base's: peft would ask the hub whether to save them.
        parts[1].save_pretrained(folder / ASSISTANT, **({"save_embedding_layers": False} if adapted else kwargs))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *_: Any, **kwargs: Any) -> LogitDifferenceModel:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Load what `save_pretrained` wrote, and let both models share their weights again.

        Args:
            pretrained_model_name_or_path: The folder, or the name of a repository that contains one.
            kwargs: As of `AutoModelForCausalLM.from_pretrained` for both checkpoints, for example ``dtype=``. `weight`
                and `top_logit_filter` replace the saved values.

        Raises:
            ValueError: If it contains another kind of model.
            OSError: If it contains no model, or a part is missing.
        """
        name = pretrained_model_name_or_path
        given = {key: kwargs.pop(key) for key in ("weight", "top_logit_filter") if key in kwargs}
        for internal in ("adapter_kwargs", "_from_auto"):  # AutoModel's, about an adapter beside config.json
            kwargs.pop(internal, None)
        config: Any = kwargs.pop("config", None) or AutoConfig.from_pretrained(name)
        if not isinstance(config, LogitDifferenceConfig):
            raise ValueError(
                f"expected a saved LogitDifferenceModel at {name}, found a {config.model_type}: load it with AutoModelForCausalLM"
            )
        base = AutoModelForCausalLM.from_pretrained(name, subfolder=BASE, **kwargs)
        layers: int | None = getattr(config, "assistant_layers", None)
        if layers is None:
            assistant = AutoModelForCausalLM.from_pretrained(name, subfolder=ASSISTANT, **kwargs)
        else:
            from peft import PeftModel

            assistant = PeftModel.from_pretrained(first_layers(base, layers), name, subfolder=ASSISTANT)  # pyright: ignore[reportArgumentType]
        settings = {"weight": config.weight, "top_logit_filter": config.top_logit_filter, **given}
        return cls(base, assistant, **settings).eval()


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    if config is None:
        raise ValueError(
            f"expected a Transformers causal language model, found {type(model).__name__} without a config"
        )
    return config.get_text_config()


AutoConfig.register(LogitDifferenceConfig.model_type, LogitDifferenceConfig, exist_ok=True)
AutoModelForCausalLM.register(LogitDifferenceConfig, LogitDifferenceModel, exist_ok=True)
