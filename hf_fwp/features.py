"""Feature maps phi and the normalisation of queries and keys that follows them.

    elu1      phi(x) = ELU(x) + 1                                                      Katharopoulos et al. 2020
    relu      phi(x) = max(x, 0)
    softmax   phi(x) = softmax(x) over the feature dimension
    dpfp:n    r = [relu(x); relu(-x)];  phi(x) = concat_{i=1..n} r * roll(r, i)        Schlag et al. 2021
    favor:m   phi(x) = exp(-|x|^2/2) [exp(W x); exp(-W x)] / sqrt(2m)                  Choromanski et al. 2020
    hedgehog:c  y = Linear(x);  phi(x) = softmax([c y; -c y]), c = 1 unless given      Zhang et al. 2024
    silu, identity

followed by `none`, `l2`: x / sqrt(sum x^2 + 1e-6), or `sum`: x / (sum x + 1e-5).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

KERNEL_EPS = 1e-4


def elu1(x: Tensor) -> Tensor:
    return F.elu(x) + 1


def softmax_features(x: Tensor) -> Tensor:
    return x.softmax(-1)


def identity(x: Tensor) -> Tensor:
    return x


class Pointwise(nn.Module):
    """A feature map without parameters, the same for queries and keys."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.function(q), self.function(k)


class Dpfp(nn.Module):
    """Products of neighbours in [relu(x); relu(-x)]: sparse, non-negative, homogeneous of degree 2."""

    def __init__(self, shifts: int) -> None:
        super().__init__()
        self.shifts = shifts

    def expand(self, x: Tensor) -> Tensor:
        r = torch.cat([x.relu(), (-x).relu()], dim=-1)
        return torch.cat([r * r.roll(i, dims=-1) for i in range(1, self.shifts + 1)], dim=-1)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.expand(q), self.expand(k)


class IdentityLinear(nn.Linear):
    """A linear map that starts as the identity."""

    def reset_parameters(self) -> None:
        self.init_weights()

    def init_weights(self) -> None:
        init.eye_(self.weight)
        init.zeros_(self.bias)


class Hedgehog(nn.Module):
    """A learned linear map, one for queries and one for keys, then a softmax over both signs."""

    def __init__(self, head_dim: int, sharpness: int = 1) -> None:
        super().__init__()
        self.sharpness = sharpness
        self.query = IdentityLinear(head_dim, head_dim)
        self.key = IdentityLinear(head_dim, head_dim)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        y_q, y_k = self.sharpness * self.query(q), self.sharpness * self.key(k)
        return torch.cat([y_q, -y_q], dim=-1).softmax(-1), torch.cat([y_k, -y_k], dim=-1).softmax(-1)


class Favor(nn.Module):
    """Positive random features of the exponential kernel; the random directions are drawn once and saved."""

    omega: Tensor

    def __init__(self, head_dim: int, directions: int) -> None:
        super().__init__()
        self.register_buffer("omega", torch.empty(head_dim, directions))
        self.init_weights()

    def init_weights(self) -> None:
        init.copy_(self.omega, orthogonal_directions(*self.omega.shape, like=self.omega))

    def expand(self, x: Tensor) -> Tensor:
        # float32: the exponent's rounding error becomes a relative error of the feature
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        projected = wide @ self.omega.to(wide.dtype)
        half_square = wide.square().sum(-1, keepdim=True) / 2
        exponent = torch.cat([projected, -projected], dim=-1) - half_square
        return ((exponent.exp() + KERNEL_EPS) * (2 * self.omega.shape[1]) ** -0.5).to(x.dtype)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.expand(q), self.expand(k)


def orthogonal_directions(head_dim: int, directions: int, *, like: Tensor) -> Tensor:
    """Columns orthogonal within blocks of `head_dim`, each as long as an independent Gaussian vector."""
    if like.is_meta:
        return like
    blocks = []
    for _ in range(-(-directions // head_dim)):
        q, _ = torch.linalg.qr(torch.randn(head_dim, head_dim))
        blocks.append(q * torch.randn(head_dim, head_dim).norm(dim=0))
    return torch.cat(blocks, dim=1)[:, :directions].to(like)


# name: (its number when `name:number` gives none, or None if it takes none; maker; output size)
FEATURES: dict[str, tuple[int | None, Callable[[int, int], nn.Module], Callable[[int, int], int]]] = {
    "identity": (None, lambda d, n: Pointwise(identity), lambda d, n: d),
    "elu1": (None, lambda d, n: Pointwise(elu1), lambda d, n: d),
    "relu": (None, lambda d, n: Pointwise(torch.relu), lambda d, n: d),
    "silu": (None, lambda d, n: Pointwise(F.silu), lambda d, n: d),
    "softmax": (None, lambda d, n: Pointwise(softmax_features), lambda d, n: d),
    "dpfp": (2, lambda d, n: Dpfp(n), lambda d, n: 2 * d * n),
    "favor": (64, Favor, lambda d, n: 2 * n),
    "hedgehog": (1, Hedgehog, lambda d, n: 2 * d),
}


def _parse(feature_map: str) -> tuple[str, int]:
    name, _, number = feature_map.partition(":")
    default = FEATURES[name][0]
    if not number:
        return name, default or 0
    if default is None:
        raise ValueError(f"feature map {feature_map!r}: {name!r} takes no number; write {name!r}")
    if not number.isdigit() or int(number) < 1:
        raise ValueError(f"feature map {feature_map!r}: {number!r} is not a positive whole number; write '{name}:4'")
    return name, int(number)


def feature_size(feature_map: str, head_dim: int) -> int:
    """K, the size of phi(x) for x of size `head_dim`."""
    name, number = _parse(feature_map)
    return FEATURES[name][2](head_dim, number)


def make_feature_map(feature_map: str, head_dim: int) -> nn.Module:
    """A module that maps (q, k) to (phi(q), phi(k))."""
    name, number = _parse(feature_map)
    return FEATURES[name][1](head_dim, number)


def l2_norm(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def sum_norm(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / (wide.sum(-1, keepdim=True) + 1e-5)).to(x.dtype)


QK_NORMS: dict[str, Callable[[Tensor], Tensor]] = {"none": identity, "l2": l2_norm, "sum": sum_norm}


class LayerNormPerHead(nn.Module):
    """(x - mean x) / std x over each head's components, times a scale of its own: [..., H, K]."""

    def __init__(self, heads: int, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(heads, size))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight


# How queries and keys [..., H, K] are normalised between projection and rotation: kind -> (heads, K, eps) -> module
HEAD_NORMS: dict[bool | str, Callable[[int, int, float], nn.Module]] = {
    True: lambda heads, size, eps: nn.RMSNorm(size, eps=eps),  # qwen3: each head, one scale for all
    "joint": lambda heads, size, eps: nn.RMSNorm([heads, size], eps=eps),  # olmo2: all heads together
    "layer": LayerNormPerHead,  # cohere
}
