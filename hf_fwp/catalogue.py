"""What there is to choose from, as tables: the update rules and the presets. Read by `hf-fwp info` and by the README.

`python -m hf_fwp.catalogue` prints the README's table of rules, `python -m hf_fwp.catalogue docs/rules` writes a page
for each.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from .presets import PRESETS
from .rules import RULES

HEAD_DIM = 64
EQUATION = "what a token does"
STATE = f"state, {HEAD_DIM} x {HEAD_DIM} head"


WHEN = {
    "linear_attention": (
        "The baseline, and the cheapest rule. Choose it for short memories, or to compare with; it adds "
        "without correcting."
    ),
    "delta_net": (
        "When keys come again with new values, and for exact recall of as many pairs as a head has key channels."
    ),
    "gated_delta_net": "The default for language: recalls like the delta rule, and clears what a text has left behind.",
    "delta_product": (
        "When a token must change more than one direction: permutations of several things, groups beyond parity."
    ),
    "kimi_delta": "Like gated_delta_net where some key channels should forget sooner than others.",
    "gated_delta_net_2": "Like kimi_delta with gates of their own for erasing and for writing.",
    "comba": "Like gated_delta_net with reads that are corrected by what the current key recalls.",
    "precond_delta": (
        "When keys differ much in how often they occur: writes are scaled by how often a channel was used."
    ),
    "oja": "Keys and values exchanged: the memory converges to principal components. For studying learning rules.",
    "gated_oja": "Oja's rule that forgets.",
    "recurrent_delta_net": (
        "When what is written must depend on what was read before: counting, formal languages. Runs token by token."
    ),
    "delta_rnn": "A recurrent network whose recurrent weights are fast too, for language of moderate length.",
    "delta_lstm": "The same with the gates of an LSTM; the largest state of this branch of the family.",
    "srwm": "For learning to learn: one matrix that rewrites itself, few-shot classification, formal languages.",
    "fwp_1991": "The origin, for comparison and teaching; identity squashing makes it linear attention.",
    "fwp_1993": "The first recurrent one, for comparison and teaching.",
    "self_modifying_delta": "A delta rule whose slow weights modify themselves; made for reinforcement learning.",
    "delta_delta": "A fast network that programs a faster one.",
    "delta_mlp": "A fast feed-forward network of two layers where one matrix is too simple a map.",
    "ba_fast_weights": "Associative recall with a small recurrent network; history.",
    "fast_weight_memory": (
        "An LSTM with an associative memory beside it, for facts that must be combined. Runs token by token."
    ),
    "continuous_fwp": (
        "Irregularly sampled series: the same learning rules as flows in time, with times of observation."
    ),
}
"""When to use which rule."""


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


def rule_page(name: str) -> str:
    """The page of one rule: its row of the table, the mathematics from its file, its options and presets."""
    rule, row = RULES[name], rule_table()[name]
    chosen = {preset: said for preset, said in preset_table().items() if name in _rules(said["rule"])}
    presets = [f"- `{preset}`: {said['what']}" for preset, said in chosen.items()]
    options = [f"- `{key}` = `{value!r}`{_choices(rule.choices.get(key))}" for key, value in rule.options.items()]
    layer = [f"- `{field}` = `{value!r}`" for field, value in rule.defaults.items()]
    facts = [f"- {title}: `{text}`" if title == EQUATION else f"- {title}: {text}" for title, text in row.items()]
    mathematics = (importlib.import_module(rule.step.__module__).__doc__ or "").strip()
    sections = (
        ("When to use it", [WHEN[name]]),
        ("In short", facts),
        ("The mathematics", ["```text", mathematics, "```"]),
        ("Options of the rule (`rule_options`)", options),
        ("The layer around it, where a config says nothing else", layer),
        ("Presets", presets),
    )
    written = [f"## {title}\n\n{chr(10).join(lines)}" for title, lines in sections if lines]
    return "\n\n".join([f"# {rule.title} (`{name}`)", *written]) + "\n"


def _rules(named: Any) -> list[str]:
    return [named] if isinstance(named, str) else list(named)


def _choices(allowed: tuple[object, ...] | None) -> str:
    return "" if allowed is None else f"; one of {', '.join(f'`{choice!r}`' for choice in allowed)}"


def rule_pages() -> dict[str, str]:
    """File name and content of the page of every rule, and of the list of them."""
    rows = {name: {"name": f"[{rule.title}]({name}.md)", "when": WHEN[name]} for name, rule in RULES.items()}
    pages = {f"{name}.md": rule_page(name) for name in RULES}
    return {"README.md": "# The update rules\n\n" + markdown(rows, first="rule") + "\n", **pages}


if __name__ == "__main__" and len(sys.argv) > 1:
    for file, text in rule_pages().items():
        Path(sys.argv[1], file).write_text(text)
elif __name__ == "__main__":
    sys.stdout.write(markdown(rule_table(), first="rule", code=(EQUATION,)) + "\n")
