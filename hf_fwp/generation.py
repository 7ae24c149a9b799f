"""What `generate` cannot do with fast weights is refused before it starts, so that the model works afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationMixin as Generation
else:
    Generation = object


class FastWeightGeneration(Generation):
    """`generate` for models with fast-weight layers; stands before transformers' classes among the bases."""

    def _prepare_cache_for_generation(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        # before transformers, which would ask for a quantisation library first
        if generation_config.cache_implementation == "quantized":
            raise ValueError(
                "fast-weight layers cannot use a quantised cache: their state does not grow, so there is nothing to "
                "gain; leave out cache_implementation='quantized'"
            )
        prepare: Any = super()
        return prepare._prepare_cache_for_generation(generation_config, *args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching keeps keys and values in pages."""
        raise ValueError(
            "continuous batching pages keys and values, which fast-weight layers do not have; "
            "use generate with a padded batch"
        )

    init_continuous_batching = generate_batch
    continuous_batching_context_manager = generate_batch
