"""Capacity: how many pairs a fast weight matrix keeps apart, by the sum rule and by the delta rule."""

from collections import defaultdict

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

import hf_fwp
from hf_fwp.bench import tasks
from hf_fwp.bench.learning import print_beside
from hf_fwp.features import make_feature_map, sum_norm

# LOG: Schlag, Irie, Schmidhuber 2021 (arXiv 2102.11174), best evaluation loss with replacement, one seed
PUBLISHED = {
    ("dpfp:1, additive", "S=20"): 0.097,
    ("dpfp:1, additive", "S=60"): 0.103,
    ("dpfp:1, delta", "S=20"): 0.0008,
    ("dpfp:1, delta", "S=60"): 0.0049,
    ("elu1, delta", "S=20"): 0.0008,
    ("elu1, delta", "S=60"): 0.0005,
}


class Memory(nn.Module):
    """Keys of a trained embedding, values one-hot as they are; the read is the answer."""

    def __init__(self, symbols: int, feature_map: str, rule: str, width: int = 64) -> None:
        super().__init__()
        size = int(1.1 * 2 * symbols)
        self.symbols, self.rule, self.embed = symbols, rule, nn.Embedding(symbols, size)
        self.key, self.query = nn.Linear(symbols + size, width, bias=False), nn.Linear(size, width, bias=False)
        self.rate, self.features = nn.Linear(symbols + size, 1), make_feature_map(feature_map, width)
        for projection in (self.key, self.query):
            nn.init.uniform_(projection.weight, -1 / 8, 1 / 8)

    def forward(self, task: tasks.Pairs) -> Tensor:
        v = F.one_hot(task.values, self.symbols).float()
        pairs = torch.cat([v, self.embed(task.keys)], dim=-1)
        q, k = self.features(self.query(self.embed(task.queries)), self.key(pairs))
        if self.rule == "delta":
            q, k = sum_norm(q), sum_norm(k)
        # the pairs come first, then tokens that only read: their keys are 0
        asked = q.shape[1]
        q, k, v = F.pad(q, (0, 0, v.shape[1], 0)), F.pad(k, (0, 0, 0, asked)), F.pad(v, (0, 0, 0, asked))
        q, k, v = (x.unsqueeze(2) for x in (q, k, v))
        if self.rule == "additive":
            return hf_fwp.linear_attention(q, k, v, normalize=True)[0][:, -asked:, 0]
        beta = F.pad(self.rate(pairs).sigmoid(), (0, 0, 0, asked))
        return hf_fwp.delta_rule(q, k, v, beta, scale=1.0)[0][:, -asked:, 0]


def squared_error(read: Tensor, task: tasks.Pairs) -> Tensor:
    return (read - F.one_hot(task.targets, read.shape[-1])).square().sum(-1).mean() / 2


def best_loss(symbols: int, feature_map: str, rule: str, *, steps: int, rate: float, seed: int) -> float:
    """Train with 2·S pairs, test with S; stop at 1e-3 or after 11 tests without a better one."""
    torch.manual_seed(seed)
    model, draw = Memory(symbols, feature_map, rule), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    best, since = float("inf"), 0
    for step in range(1, steps + 1):
        task = tasks.capacity(8, symbols, pairs=2 * symbols, replacement=True, generator=draw, queries=symbols)
        optimizer.zero_grad()
        squared_error(model(task), task).backward()
        optimizer.step()
        if step % 50 == 0:
            with torch.no_grad():
                test = tasks.capacity(20, symbols, pairs=symbols, replacement=True, generator=draw, queries=200)
                loss = squared_error(model(test), test).item()
            best, since = (loss, 0) if loss < best else (best, since + 1)
            if best <= 1e-3 or since == 11:
                break
    return best


def main(
    seeds: int = 2, steps: int = 300, sizes: str = "20,40,60,80", learning_rate: float = 5e-3
) -> dict[tuple[str, str], list[float]]:
    """Pairs with replacement: a key comes again with another value, and the last one counts."""
    measured = defaultdict(list)
    for seed in range(seeds):
        for rule in ("additive", "delta"):
            for feature_map in ("elu1", "dpfp:1"):
                for symbols in map(int, sizes.split(",")):
                    loss = best_loss(symbols, feature_map, rule, steps=steps, rate=learning_rate, seed=seed)
                    measured[f"{feature_map}, {rule}", f"S={symbols}"].append(loss)
    print_beside("best test loss", measured, PUBLISHED, source="Schlag et al. 2021, LOG", digits=4)
    return measured


if __name__ == "__main__":
    typer.run(main)
