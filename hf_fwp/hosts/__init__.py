"""Hosts: pretrained families whose attention fast weights can take over. The families are the rows of table.py."""

from __future__ import annotations

from typing import Any

from . import graft
from .graft import blocks_of, register_hosts, student_config
from .options import converted_layers, mixer_options
from .rotary import layer_rotates
from .table import HOSTS, Host, find_host, register_family

__all__ = [
    "HOSTS",
    "Host",
    "blocks_of",
    "converted_layers",
    "find_host",
    "layer_rotates",
    "mixer_options",
    "register_family",
    "register_hosts",
    "student_config",
]


def __getattr__(name: str) -> Any:
    """FwpLlamaConfig, FwpLlamaForCausalLM, …: made from the family's own class when first asked for."""
    return graft.__getattr__(name)
