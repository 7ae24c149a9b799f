"""transformers' own server, OpenAI-compatible, with models of this package: `hf_fwp.serve(folder)`, `hf-fwp serve DIR`.

`transformers chat` and every OpenAI client talk to it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.import_utils import is_serve_available

from .registration import SERVER, name_for_server


def serve(
    model: str | os.PathLike[str],
    *,
    host: str = "localhost",
    port: int = 8000,
    device: str = "auto",
    dtype: str = "auto",
) -> None:
    """Serve a folder or a Hub id at http://host:port/v1 until it is interrupted.

    Raises:
        ValueError: `model` is no causal language model.
        ImportError: what transformers' server needs is not installed.
    """
    name_class(model)
    if not is_serve_available():
        raise ImportError("the server needs fastapi, uvicorn and openai: pip install 'transformers[serving]'")
    from transformers.cli.serve import Serve

    with contextlib.suppress(KeyboardInterrupt):  # the server has shut down in good order, then says so once more
        Serve(force_model=str(model), host=host, port=port, device=device, dtype=dtype)


def name_class(model: str | os.PathLike[str]) -> None:
    """Let transformers' server, in this process, find the class of a model."""
    importlib.import_module(SERVER)
    config = AutoConfig.from_pretrained(model)
    model_class: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if model_class is None or model_class.__name__ not in (config.architectures or ()):
        raise ValueError(
            f"{model} holds {config.architectures or 'no architecture'} ({config.model_type}); give a causal language "
            "model, as save_pretrained writes it"
        )
    name_for_server(model_class.__name__, model_class)
