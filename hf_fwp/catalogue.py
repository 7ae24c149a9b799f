"""What there is to choose from, as tables: the update rules and the presets. Read by `hf-fwp info` and by the README.

`python -m hf_fwp.catalogue` prints the README's table of rules.
"""

from __future__ import annotations

import sys

from .presets import PRESETS
from .rules import RULES

HEAD_DIM = 64
EQUATION = "what a token does"
STATE = f"state, {HEAD_DIM} x {HEAD_DIM} head"


def rule_table() -> dict[str, dict[str, str]]:
    """For every rule what it is, what a token does, where it comes from, how many numbers a head of 64 keys and 64
    values carries, how a sequence is computed, and the backends."""
    return {
        rule.name: {
            "name": rule.title,
            EQUATION: rule.equation,
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


def markdown(rows: dict[str, dict[str, str]], *, first: str, code: tuple[str, ...] = ()) -> str:
    """A table in Markdown; the names of the rows and the columns named in `code` are set as code."""
    header = [first, *next(iter(rows.values()))]
    lines = [
        [f"`{name}`", *(f"`{text}`" if column in code else text for column, text in row.items())]
        for name, row in rows.items()
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])


if __name__ == "__main__":
    sys.stdout.write(markdown(rule_table(), first="rule", code=(EQUATION,)) + "\n")
