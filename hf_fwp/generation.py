"""What `generate` cannot do with fast weights is refused before it starts, so that the model works afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_masks_for_generate

if TYPE_CHECKING:
    from transformers import GenerationMixin as Generation
else:
    Generation = object


class FastWeightGeneration(Generation):
    """`generate` for models with fast-weight layers; stands before transformers' classes among the bases."""

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        # before transformers, which would ask for a quantisation library first
        if generation_config.cache_implementation == "quantized":
            raise ValueError(
                "fast-weight layers cannot use a quantised cache: their state does not grow, so there is nothing to "
                "gain; leave out cache_implementation='quantized'"
            )
        # transformers would lower config.num_hidden_layers and fail before it is restored (no public issue found)
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                f"assistant_early_exit={generation_config.assistant_early_exit} lets the first layers guess alone, "
                "which those of a model with fast weights cannot; give assistant_model, or prompt_lookup_num_tokens"
            )
        if model_kwargs.get("times") is not None:
            raise ValueError(
                "generate cannot tell when the tokens that it writes are observed; leave out times, or call the model "
                "itself token by token, with times and past_key_values"
            )
        prepare: Any = super()
        return prepare._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def create_masks_for_generate(
        self, config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        """Masks made before the forward, for a cache of fixed size; else what was given.

        transformers asks for every cache that could be compiled, a growing one of fast weights alone too. Nothing is
        compiled with that, and peft cannot put soft prompts before several masks (no public issue found).
        """
        if isinstance(kwargs.get("past_key_values"), DynamicCache):
            return attention_mask
        return self.masks_of_fixed_size(config, inputs_embeds, attention_mask, **kwargs)

    def masks_of_fixed_size(
        self, config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        """Every mask that the layers read."""
        return create_masks_for_generate(config, inputs_embeds, attention_mask, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching keeps keys and values in pages."""
        raise ValueError(
            "continuous batching pages keys and values, which fast-weight layers do not have; "
            "use generate with a padded batch"
        )

    init_continuous_batching = generate_batch
    continuous_batching_context_manager = generate_batch
