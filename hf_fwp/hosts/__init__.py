"""Hosts: pretrained families whose attention fast weights can take over. The families are the rows of table.py."""

from __future__ import annotations

from typing import Any

from .graft import blocks_of, host_classes, host_config, register_hosts, student_config
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
    for host in HOSTS.values():
        if name == f"Fwp{host.title}Config":
            return host_config(host.name)
        for head in host.heads:
            if name == f"Fwp{host.class_name(head)}":
                return host_classes(host.name)[head]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
