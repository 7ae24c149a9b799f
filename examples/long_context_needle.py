"""A needle in a long text: one pair of key and value somewhere among other words, asked at the end.

The model is trained on short texts and asked in longer ones, read in pieces from the cache: memory holds one piece and
the states, however long the text (task after Hsieh et al. 2024, arXiv 2404.06654, with single tokens as words).

    python examples/long_context_needle.py

needles found: one seed (nothing is published at this size)

|                  | 64 tokens | 256 tokens | 1024 tokens | 4096 tokens |
|------------------|-----------|------------|-------------|-------------|
| linear_attention | 1.000     | 1.000      | 0.188       | 0.000       |
| delta_net        | 0.984     | 1.000      | 0.984       | 0.484       |
| gated_delta_net  | 1.000     | 0.984      | 0.828       | 0.438       |

Trained on 64 tokens. Took 418 s of one core (636 s on the clock: a machine of 2 Intel Xeon cores busy with other
work), torch 2.13.
"""

from collections import defaultdict

import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_fwp
from hf_fwp.bench.learning import fit, print_beside
from hf_fwp.bench.tasks import needle

SYMBOLS = 64


@torch.no_grad()
def answers(model: PreTrainedModel, tokens: Tensor, piece: int) -> Tensor:
    """The token that the model names after each text [N, T], read `piece` tokens at a time."""
    cache = None
    for part in tokens.split(piece, dim=1):
        read = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = read.past_key_values
    return read.logits[:, -1].argmax(-1)


def main(
    rules: str = "linear_attention,delta_net,gated_delta_net",
    lengths: str = "64,256,1024,4096",
    trained: int = 64,
    width: int = 64,
    heads: int = 4,
    steps: int = 1200,
    batch: int = 32,
    seeds: int = 1,
    tests: int = 64,
    piece: int = 512,
    device: str = "cpu",
) -> dict[tuple[str, str], list[float]]:
    """Train two layers on texts of TRAINED tokens; the share of needles found in texts of all LENGTHS."""
    measured = defaultdict(list)
    for seed in range(seeds):
        for rule in rules.split(","):
            torch.manual_seed(seed)
            draw = torch.Generator().manual_seed(seed)
            sizes = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": 2}
            config = hf_fwp.FwpConfig(rule=rule, vocab_size=3 * SYMBOLS, **sizes)
            model = AutoModelForCausalLM.from_config(config).to(device)

            def texts(count: int, length: int, draw: torch.Generator = draw):
                return tuple(part.to(device) for part in needle(count, length, symbols=SYMBOLS, generator=draw))

            fit(model, lambda: texts(batch, trained), steps=steps, learning_rate=1e-3)
            model.eval()
            for length in map(int, lengths.split(",")):
                tokens, labels = texts(tests, length)
                found = (answers(model, tokens, piece) == labels[:, -1]).float().mean().item()
                measured[rule, f"{length} tokens"].append(found)
    print_beside("needles found", measured, {}, source="none at this size")
    return measured


if __name__ == "__main__":
    typer.run(main)
