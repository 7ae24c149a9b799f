"""A teacher that is watched while it reads: what its attention is given, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_fwp.hosts import find_host

from .families import attention_modules, output_projection_name


@contextmanager
def hooked(
    teacher: PreTrainedModel, layers: Iterable[int], seen: Callable[[int, dict[str, Any], Tensor], None]
) -> Iterator[None]:
    """Call `seen(layer, arguments, output)` whenever the teacher's attention of one of the layers has run."""
    projection, answers = output_projection_name(find_host(teacher.config)), {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            answers[layer] = output  # of some families the attention's own output has the residual stream added

        return hook

    def tell(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            arguments = {**kwargs, "past_key_values": None}
            if args:
                arguments["hidden_states"] = args[0]
            seen(layer, arguments, answers.pop(layer))

        return hook

    modules, handles = attention_modules(teacher), []
    for layer in layers:
        handles.append(modules[layer].get_submodule(projection).register_forward_hook(keep(layer)))
        handles.append(modules[layer].register_forward_hook(tell(layer), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
