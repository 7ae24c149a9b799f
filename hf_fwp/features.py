"""Feature maps phi and the normalisation of queries and keys that follows them.

    elu1      phi(x) = ELU(x) + 1                                                      Katharopoulos et al. 2020
    relu      phi(x) = max(x, 0)
    softmax   phi(x) = softmax(x) over the feature dimension
    dpfp:n    r = [relu(x); relu(-x)];  phi(x) = concat_{i=1..n} r * roll(r, i)        Schlag et al. 2021
    favor:m   phi(x) = exp(-|x|^2/2) [exp(W x); exp(-W x)] / sqrt(2m)                  Choromanski et al. 2020
                a setting each: redraw=1 draws W anew at every forward of training, eps=e is added to the
                exponentials, prescale=1 multiplies x by d^(-1/4) first: "favor:64,redraw=1,eps=0"
    hedgehog:c  y = Linear(x);  phi(x) = softmax([c y; -c y]), c = 1 unless given      Zhang et al. 2024
    silu, identity

followed by `none`, `l2`: x / sqrt(sum x^2 + 1e-6), or `sum`: x / (sum x + 1e-5).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

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
    """Positive random features of the exponential kernel. The random directions are drawn at the start and saved, with
    `redraw` also at every forward of training."""

    omega: Tensor

    def __init__(
        self,
        head_dim: int,
        directions: int,
        *,
        redraw: bool = False,
        eps: float = KERNEL_EPS,
        prescale: bool = False,
    ) -> None:
        super().__init__()
        self.redraw, self.eps = redraw, eps
        self.prescale = head_dim**-0.25 if prescale else 1.0
        self.register_buffer("omega", torch.empty(head_dim, directions))
        self.init_weights()

    def init_weights(self) -> None:
        init.copy_(self.omega, orthogonal_directions(*self.omega.shape, like=self.omega))

    def advance(self) -> None:
        """Begin a forward: in training, and where it is asked for, with new directions."""
        # Drawn from PyTorch's own random numbers: a checkpointed block that runs again meets the same. And a new
        # tensor: the backward of an earlier forward may still need the old one.
        if self.redraw and self.training:
            self.omega = orthogonal_directions(*self.omega.shape, like=self.omega)

    def expand(self, x: Tensor) -> Tensor:
        # float32: the exponent's rounding error becomes a relative error of the feature
        wide = self.prescale * x.to(torch.promote_types(x.dtype, torch.float32))
        projected = wide @ self.omega.to(wide.dtype)
        half_square = wide.square().sum(-1, keepdim=True) / 2
        exponent = torch.cat([projected, -projected], dim=-1) - half_square
        return ((exponent.exp() + self.eps) * (2 * self.omega.shape[1]) ** -0.5).to(x.dtype)

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


@dataclass(frozen=True)
class Features:
    """A kind of feature map: what makes one for queries and keys of size d, and the size of what it gives."""

    make: Callable[..., nn.Module]
    """make(d, number, **settings)"""
    size: Callable[[int, int], int] = lambda d, n: d
    number: int | None = None
    """What `name` means by its number when `name:number` gives none; None: it takes none."""
    settings: Mapping[str, float] = field(default_factory=dict)
    """What may follow as `,setting=value`, with the defaults."""


def _pointwise(function: Callable[[Tensor], Tensor]) -> Features:
    return Features(lambda d, n: Pointwise(function))


FEATURES: dict[str, Features] = {
    "identity": _pointwise(identity),
    "elu1": _pointwise(elu1),
    "relu": _pointwise(torch.relu),
    "silu": _pointwise(F.silu),
    "softmax": _pointwise(softmax_features),
    "dpfp": Features(lambda d, n: Dpfp(n), size=lambda d, n: 2 * d * n, number=2),
    "favor": Features(
        Favor, size=lambda d, n: 2 * n, number=64, settings={"redraw": False, "eps": KERNEL_EPS, "prescale": False}
    ),
    "hedgehog": Features(Hedgehog, size=lambda d, n: 2 * d, number=1),
}


def feature_name(feature_map: str) -> str:
    """The key of FEATURES that `name:number,setting=value` begins with."""
    return feature_map.partition(",")[0].partition(":")[0]


def _parse(feature_map: str) -> tuple[str, int, dict[str, float]]:
    first, *rest = feature_map.split(",")
    name, _, number = first.partition(":")
    kind, wrong = FEATURES[name], f"feature map {feature_map!r}"
    if number and kind.number is None:
        raise ValueError(f"{wrong}: {name!r} takes no number; write {name!r}")
    if number and (not number.isdigit() or int(number) < 1):
        raise ValueError(f"{wrong}: {number!r} is not a positive whole number; write '{name}:4'")
    settings = dict(kind.settings)
    for part in rest:
        setting, _, value = part.partition("=")
        if setting not in settings:
            raise ValueError(f"{wrong}: {name!r} has no setting {setting!r}; it has {', '.join(settings) or 'none'}")
        settings[setting] = _flag(value, wrong) if isinstance(settings[setting], bool) else _number(value, wrong)
    return name, int(number or kind.number or 0), settings


def _flag(value: str, wrong: str) -> bool:
    if value not in ("0", "1"):
        raise ValueError(f"{wrong}: {value!r} is neither 0 (no) nor 1 (yes); write for instance 'favor:64,redraw=1'")
    return value == "1"


def _number(value: str, wrong: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ValueError(f"{wrong}: {value!r} is not a number of at least 0; write for instance 'favor:64,eps=0'")
    return number


def feature_size(feature_map: str, head_dim: int) -> int:
    """K, the size of phi(x) for x of size `head_dim`."""
    name, number, _ = _parse(feature_map)
    return FEATURES[name].size(head_dim, number)


def make_feature_map(feature_map: str, head_dim: int) -> nn.Module:
    """A module that maps (q, k) to (phi(q), phi(k))."""
    name, number, settings = _parse(feature_map)
    return FEATURES[name].make(head_dim, number, **settings)


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
# What multiplies the reads, by the name of the option `output_gate`.
GATES = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "sigmoid2": lambda x: 2 * torch.sigmoid(x),
    "head_sigmoid": torch.sigmoid,
    "low_rank_sigmoid": torch.sigmoid,
}

HEAD_NORMS: dict[bool | str, Callable[[int, int, float], nn.Module]] = {
    True: lambda heads, size, eps: nn.RMSNorm(size, eps=eps),  # qwen3: each head, one scale for all
    "joint": lambda heads, size, eps: nn.RMSNorm([heads, size], eps=eps),  # olmo2: all heads together
    "layer": LayerNormPerHead,  # cohere
}
