"""Hosts: pretrained families whose attention fast weights can take over. The families are the rows of table.py."""

from __future__ import annotations

from typing import Any

from .graft import host_classes, host_config, register_hosts, student_config
from .options import converted_layers, mixer_options
from .table import HOSTS, Host, find_host

__all__ = ["HOSTS", "Host", "converted_layers", "find_host", "mixer_options", "register_hosts", "student_config"]


def __getattr__(name: str) -> Any:
    """FwpLlamaConfig, FwpLlamaForCausalLM, …: made from the family's own class when first asked for."""
    for host in HOSTS.values():
        head = name.removeprefix(f"Fwp{host.title}")
        if name == f"Fwp{host.title}Config":
            return host_config(host.name)
        if head != name and head in host.heads:
            return host_classes(host.name)[head]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
