"""What the steps of the sequential rules are made of, forward and backward: tiles, reads, writes, squashes."""

# pyright: reportGeneralTypeIssues=false
# (the bodies of kernels are another language)

import triton
import triton.language as tl


@triton.jit
def load_vector(p, size, B: tl.constexpr, stride=1):
    """`size` numbers with zeros up to B."""
    i = tl.arange(0, B)
    return tl.load(p + i * stride, mask=i < size, other=0.0)


@triton.jit
def store_vector(p, x, size, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(p + i, x, mask=i < size)


@triton.jit
def load_tile(p, rows, columns, stride, BR: tl.constexpr, BC: tl.constexpr):
    """A matrix of `rows` x `columns` in rows of `stride` numbers, with zeros around it."""
    i, j = tl.arange(0, BR)[:, None], tl.arange(0, BC)[None, :]
    return tl.load(p + i * stride + j, mask=(i < rows) & (j < columns), other=0.0)


@triton.jit
def store_tile(p, x, rows, columns, stride, BR: tl.constexpr, BC: tl.constexpr):
    i, j = tl.arange(0, BR)[:, None], tl.arange(0, BC)[None, :]
    tl.store(p + i * stride + j, x, mask=(i < rows) & (j < columns))


@triton.jit
def read(s, q):
    """Sᵀ q"""
    return tl.sum(s * q[:, None], 0)


@triton.jit
def spread(s, v):
    """S v, which is also the gradient that a read by q sends to q."""
    return tl.sum(s * v[None, :], 1)


@triton.jit
def outer(k, v):
    """k ⊗ v"""
    return k[:, None] * v[None, :]


@triton.jit
def write(s, k, e, v, beta):
    """S + k ⊗ β (v - Sᵀ e); the delta rule has e = k."""
    return s + outer(k, beta * (v - read(s, e)))


@triton.jit
def write_back(s, k, e, v, beta, d_s):
    """Gradients of S, k, e, v and β."""
    found = v - read(s, e)
    d_written = read(d_s, k)
    d_v = beta * d_written
    return d_s - outer(e, d_v), spread(d_s, beta * found), -spread(s, d_v), d_v, tl.sum(d_written * found, 0)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """By exp, and near 0, where that loses digits, by five terms of Lambert's continued fraction (to 1e-8)."""
    square, e = x * x, tl.exp(-2.0 * tl.abs(x))
    near = x * (945.0 + square * (105.0 + square)) / (945.0 + square * (420.0 + 15.0 * square))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(square < 0.36, near, tl.where(x < 0, -far, far))


@triton.jit
def softmax(x, size, B: tl.constexpr):
    """Over the first `size` numbers; the others become 0."""
    x = tl.where(tl.arange(0, B) < size, x, float("-inf"))
    e = tl.exp(x - tl.max(x, 0))
    return e / tl.sum(e, 0)


@triton.jit
def softmax_back(y, d_y):
    return y * (d_y - tl.sum(y * d_y, 0))


@triton.jit
def normalized(x, size, eps, B: tl.constexpr):
    """x without its mean, over its deviation, and 1 / deviation."""
    x = tl.where(tl.arange(0, B) < size, x - tl.sum(x, 0) / size, 0.0)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / size + eps)
    return x * inverse, inverse


@triton.jit
def normalized_back(n, inverse, d_n, size, B: tl.constexpr):
    d_x = inverse * (d_n - tl.sum(d_n, 0) / size - n * (tl.sum(d_n * n, 0) / size))
    return tl.where(tl.arange(0, B) < size, d_x, 0.0)
