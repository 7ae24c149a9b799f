"""transformers' own server, OpenAI-compatible, with models of this package: `hf_fwp.serve(folder)`, `hf-fwp serve DIR`.

`transformers chat` and every OpenAI client talk to it.
"""

from __future__ import annotations

import contextlib
import importlib
import os

from transformers import AutoConfig
from transformers.utils.import_utils import is_serve_available

from .architecture import model_class_of, refuse_other_heads
from .registration import CAUSAL, SERVER, name_for_server


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
    held = config.architectures or []
    refuse_other_heads(config, held, told=f"{model} holds {held or 'no architecture'}")
    model_class = model_class_of(CAUSAL, config)
    name_for_server(model_class.__name__, model_class)
