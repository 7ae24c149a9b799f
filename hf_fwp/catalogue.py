"""What there is to choose from, as tables: the update rules and the presets. Read by `hf-fwp info` and by the README."""

from __future__ import annotations

from .presets import PRESETS
from .rules import RULES

HEAD_DIM = 64
STATE = f"state, {HEAD_DIM} x {HEAD_DIM} head"


def rule_table() -> dict[str, dict[str, str]]:
    """For every rule what it is, what a token does, where it comes from, how many numbers a head of 64 keys and 64
    values carries, how a sequence is computed, and the backends."""
    return {
        rule.name: {
            "name": rule.title,
            "what a token does": rule.equation,
            "source": rule.source,
            STATE: str(rule.state_size(HEAD_DIM, HEAD_DIM)),
            "a sequence": rule.parallel,
            "backends": ", ".join(rule.backends),
        }
        for rule in RULES.values()
    }


def preset_table() -> dict[str, dict[str, str]]:
    """For every preset its rule and what it is."""
    return {name: {"rule": preset.fields["rule"], "what": preset.about} for name, preset in PRESETS.items()}
