"""What follows the joint product of an attention's input, in one kernel: adapters, biases, norms and rotation.

Compiled from single operations, it is a kernel for each norm, which reads its rows, and another for each rotation,
which reads them again; the gradients are put together by copies. Here a program holds a row of queries, keys or values
in registers. The backward pass writes into the gradient of the joint product, all of whose columns it fills.

    pre = product + bias + strength · hidden upᵀ            head = rotate(pre / rms(pre) · weight)

T tokens, n channels of a part (queries, keys or values), c parts, r rank. Triton runs it, on CUDA.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ltx2_tuner.models.transformer.rope import RopeTable, apply_rope
from ltx2_tuner.quantization.kernels import kernels_work
from ltx2_tuner.quantization.operators import operator

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

LARGEST_WIDTH = 16384  # channels of a part: a program's registers
_WARPS = 4

if triton is not None:

    @triton.jit
    def _channels(N: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
        """Channels of the first halves of all heads, and which of them exist; the second halves lie HALF further."""
        index = tl.arange(0, BLOCK)
        return (index // HALF) * (2 * HALF) + index % HALF, index < N // 2

    @triton.jit
    def _halves(values, one, real, HALF: tl.constexpr):
        """What lies at the channels of both halves, in float32."""
        a = tl.load(values + one, mask=real, other=0.0).to(tl.float32)
        return a, tl.load(values + one + HALF, mask=real, other=0.0).to(tl.float32)

    @triton.jit
    def _store_halves(target, a, b, one, real, HALF: tl.constexpr):
        tl.store(target + one, a, mask=real)
        tl.store(target + one + HALF, b, mask=real)

    @triton.jit
    def _of_part(part, first, second, third):
        if part == 1:
            first = second
        if part == 2:
            first = third
        return first

    @triton.jit
    def _turned(a, b, cos, sin, at, sign, N: tl.constexpr, BLOCK: tl.constexpr):
        """Both halves turned by the angles of a token, or back (sign -1)."""
        index = tl.arange(0, BLOCK)
        c = tl.load(cos + at + index, mask=index < N // 2, other=0.0).to(tl.float32)
        s = sign * tl.load(sin + at + index, mask=index < N // 2, other=0.0).to(tl.float32)
        return a * c - b * s, b * c + a * s

    @triton.jit
    def _form(
        product, lower, added, bias, lower_bias, norm0, norm1, cos, sin, out0, out1, out2, before, scales, hidden,
        gates, tokens, product_stride, lower_stride, first_gate, table_rows, first_hidden, strength, eps,
        N: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, NORMED: tl.constexpr, GATES: tl.constexpr,
        HIDDEN: tl.constexpr, G: tl.constexpr, H: tl.constexpr, BIAS: tl.constexpr, ROPE: tl.constexpr,
    ):  # fmt: skip
        row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
        one, real = _channels(N, HALF, BLOCK)
        at, added_at = row * product_stride + part * N, (part * tokens + row) * N
        a, b = _halves(product + at, one, real, HALF)
        more_a, more_b = _halves(added + added_at, one, real, HALF)
        a += strength * more_a
        b += strength * more_b
        if BIAS:
            bias_a, bias_b = _halves(bias + part * N, one, real, HALF)
            a += bias_a
            b += bias_b
        out, norm = _of_part(part, out0, out1, out2), _of_part(part, norm0, norm1, norm0)
        kind = product.dtype.element_ty
        if part < NORMED:
            a, b = a.to(kind), b.to(kind)
            _store_halves(before + added_at, a, b, one, real, HALF)
            a, b = a.to(tl.float32), b.to(tl.float32)
            scale = 1.0 / tl.sqrt(tl.sum(a * a + b * b, 0) / N + eps)
            tl.store(scales + part * tokens + row, scale)
            weight_a, weight_b = _halves(norm, one, real, HALF)
            a *= scale * weight_a
            b *= scale * weight_b
            if ROPE:
                a, b = _turned(a, b, cos, sin, (row % table_rows) * (N // 2), 1.0, N, BLOCK)
        _store_halves(out + row * N, a.to(kind), b.to(kind), one, real, HALF)
        if part == 0:
            column = tl.arange(0, H)
            kept = tl.load(lower + row * lower_stride + first_hidden + column, mask=column < HIDDEN, other=0.0)
            tl.store(hidden + row * HIDDEN + column, kept, mask=column < HIDDEN)
            if GATES > 0:
                gate = tl.arange(0, G)
                value = tl.load(lower + row * lower_stride + first_gate + gate, mask=gate < GATES, other=0.0)
                value = value.to(tl.float32)
                if BIAS:
                    value += tl.load(lower_bias + first_gate + gate, mask=gate < GATES, other=0.0).to(tl.float32)
                tl.store(gates + row * GATES + gate, value.to(kind), mask=gate < GATES)

    @triton.jit
    def _unform(
        grad0, grad1, grad2, of_gates, before, scales, norm0, norm1, cos, sin, result, lower_result,
        tokens, product_stride, lower_stride, first_gate, table_rows,
        N: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, NORMED: tl.constexpr, GATES: tl.constexpr,
        REST: tl.constexpr, G: tl.constexpr, ROPE: tl.constexpr,
    ):  # fmt: skip
        row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
        one, real = _channels(N, HALF, BLOCK)
        grad, norm = _of_part(part, grad0, grad1, grad2), _of_part(part, norm0, norm1, norm0)
        kind = result.dtype.element_ty
        a, b = _halves(grad + row * N, one, real, HALF)
        if part < NORMED:
            if ROPE:
                a, b = _turned(a, b, cos, sin, (row % table_rows) * (N // 2), -1.0, N, BLOCK)
            weight_a, weight_b = _halves(norm, one, real, HALF)
            a *= weight_a
            b *= weight_b
            x, y = _halves(before + (part * tokens + row) * N, one, real, HALF)
            scale = tl.load(scales + part * tokens + row)
            slope = tl.sum(a * x + b * y, 0) * scale * scale / N
            a = scale * (a - x * slope)
            b = scale * (b - y * slope)
        _store_halves(result + row * product_stride + part * N, a.to(kind), b.to(kind), one, real, HALF)
        if GATES + REST > 0:  # noqa: SIM102 (settled when it compiles, the other one when it runs)
            if part == 0:
                gate = tl.arange(0, G)
                value = tl.load(of_gates + row * GATES + gate, mask=gate < GATES, other=0.0)
                place = lower_result + row * lower_stride + first_gate + gate
                tl.store(place, value.to(kind), mask=gate < GATES + REST)


def suits(x: Tensor, width: int, heads: int, table: Sequence[Tensor] | None) -> bool:
    """Whether `form_heads` takes this, where it is `available`.

    Args:
        x: what the product reads.
        width: n, divided into as many heads.
        table: cosines and sines, if the heads are rotated.
    """
    return x.is_cuda and _fits(width, heads, table)


def _fits(width: int, heads: int, table: Sequence[Tensor] | None) -> bool:
    half = width // heads // 2
    split = table is None or table[0].shape[-1] == half
    return split and width == 2 * half * heads and width <= LARGEST_WIDTH


@functools.cache
def available() -> bool:
    """Whether the kernels compile here and agree with torch."""
    return kernels_work(lambda: _agrees(torch.device("cuda"), torch.bfloat16, 2e-2), "heads are formed step by step")


@torch.no_grad()
def _agrees(device: torch.device, dtype: torch.dtype, tolerance: float) -> bool:
    """Whether queries, keys, values and gates of a few tokens are what their definition says, and so the gradients."""
    heads, width, rank, tokens, gates = 2, 256, 4, 20, 2
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    product = random(1, tokens, 3 * width + gates + 2 + 3 * rank)
    bias, up, norms = random(product.shape[-1]), random(3, width, rank), [random(width), random(width)]
    angles = random(1, tokens, heads, width // heads // 2).float()
    tables = angles.cos().to(dtype), angles.sin().to(dtype)
    gradients = [random(1, tokens, width) for _ in range(3)]
    of_gates = random(1, tokens, gates)
    *found, before, scales, hidden = _form_heads(product, None, bias, None, up, norms, *tables, heads, gates, 0.5, 1e-6)
    kept = (before, scales, hidden, up, norms, *tables)
    found += unform_heads(gradients, of_gates, *kept, product.shape[-1], 0, heads, gates, 0.5)[::2]
    with torch.enable_grad():
        leaves = [value.float().requires_grad_() for value in (product, up)]
        wanted = _plainly(leaves[0], bias.float(), leaves[1], [n.float() for n in norms], tables, gates, 0.5, 1e-6)
        given = [gradient.float() for gradient in (*gradients, of_gates)]
        wanted = [*wanted, *torch.autograd.grad(wanted, leaves, given)]
    pairs = [(one.float(), other.detach()) for one, other in zip(found, wanted)]
    return all(bool((one - other).norm() <= tolerance * other.norm()) for one, other in pairs)


def _plainly(
    product: Tensor,
    bias: Tensor,
    up: Tensor,
    norms: Sequence[Tensor],
    tables: Sequence[Tensor],
    gates: int,
    strength: float,
    eps: float,
) -> list[Tensor]:
    """What `form_heads` gives of a product that holds everything, by its definition."""
    count, width, rank = up.shape
    hidden = product[..., -count * rank :].chunk(count, dim=-1)
    both = product + bias
    parts = list(both[..., : count * width].chunk(count, dim=-1))
    parts = [part + strength * one @ matrix.t() for part, one, matrix in zip(parts, hidden, up)]
    table = RopeTable(*(angles.float() for angles in tables))
    for index, weight in enumerate(norms):
        normed = torch.nn.functional.rms_norm(parts[index], (width,), weight, eps)
        parts[index] = apply_rope(normed.unflatten(-1, (table.cos.shape[-2], -1)), table).flatten(-2)
    return [*parts, both[..., count * width : count * width + gates]]


def _form_heads(
    product: Tensor,
    lower: Tensor | None,
    bias: Tensor | None,
    lower_bias: Tensor | None,
    up: Tensor,
    norms: list[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    gates: int,
    strength: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The parts (B, T, n) of a joint product as attention takes them, and gate logits (B, T, gates).

    Args:
        product: (B, T, at least c * n), the parts side by side, without biases.
        lower: (B, T, gates + unused + c * r), gate logits and the products with the down matrices; None where these are
            the last columns of `product`.
        bias, lower_bias: of the columns of either.
        up: (c, n, r).
        norms: weights (n,) of the first parts; the others are neither normed nor rotated.
        cos, sin: (B or 1, T, H, n / H / 2) each.

    Returns:
        Three parts, those after the c-th empty; the gate logits, empty without gates; for the backward pass the normed
        parts before their norms (norms, B * T, n), their scales (norms, B * T) in float32, and the hidden products
        (B * T, c * r).
    """
    given = _Given(product, lower, up, norms, cos, sin, heads, gates)
    made = _fake(product, lower, bias, lower_bias, up, norms, cos, sin, heads, gates, strength, eps)
    *results, before, scales, hidden = made
    added = torch.bmm(given.hidden.unflatten(1, (up.shape[0], -1)).transpose(0, 1), up.transpose(1, 2))  # (c, B * T, n)
    with torch.cuda.device_of(product):
        _form[given.grid](
            given.product, given.lower, added, bias, bias if lower is None else lower_bias, *given.norms,
            *given.tables, *results[:3], before, scales, hidden, results[3], *given.numbers, given.first_hidden,
            strength, eps, BIAS=bias is not None, G=triton.next_power_of_2(max(gates, 1)), HIDDEN=hidden.shape[1],
            H=triton.next_power_of_2(hidden.shape[1]), **given.constants,
        )  # fmt: skip
    return made


def _fake(product, lower, bias, lower_bias, up, norms, cos, sin, heads, gates, strength, eps):
    count, width, rank = up.shape
    tokens = product.shape[0] * product.shape[1]
    parts = [product.new_empty(*product.shape[:-1], width) for _ in range(count)]
    logits = product.new_empty(*product.shape[:-1], gates) if gates else product.new_empty(0)
    before = product.new_empty(len(norms), tokens, width)
    scales = product.new_empty(len(norms), tokens, dtype=torch.float32)
    absent = [product.new_empty(0) for _ in range(3 - count)]
    return (*parts, *absent, logits, before, scales, product.new_empty(tokens, count * rank))


@torch.library.custom_op("ltx2_tuner::unform_heads", mutates_args=())
def unform_heads(
    gradients: list[Tensor],
    of_gates: Tensor | None,
    before: Tensor,
    scales: Tensor,
    hidden: Tensor,
    up: Tensor,
    norms: list[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    width: int,
    lower_width: int,
    heads: int,
    gates: int,
    strength: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `product`, of `lower` and of `up`, given those of the c parts and of the gates.

    Args:
        width, lower_width: columns of the product and of `lower`, 0 where there is none: its gradient is empty.
    """
    count, channels, rank = up.shape
    shape = gradients[0].shape[:-1]
    product = gradients[0].new_empty(*shape, width)
    lower = gradients[0].new_empty(*shape, lower_width) if lower_width else None
    given = _Given(product, lower, up, norms, cos, sin, heads, gates)
    places = [gradient.contiguous() for gradient in gradients] + [product.new_empty(0)] * (3 - count)
    rest = given.first_hidden - given.first_gate - gates
    with torch.cuda.device_of(product):
        _unform[given.grid](
            *places, product.new_empty(0) if of_gates is None else of_gates.contiguous(), before, scales, *given.norms,
            *given.tables, given.product, given.lower, *given.numbers,
            REST=rest, G=triton.next_power_of_2(max(gates + rest, 1)), **given.constants,
        )  # fmt: skip
    rows = given.product[:, : count * channels].unflatten(1, (count, channels)).transpose(0, 1)  # (c, B * T, n)
    of_hidden = given.hidden.unflatten(1, (count, rank)).transpose(0, 1)
    torch.bmm(rows, up, out=of_hidden)
    of_up = torch.bmm(rows.transpose(1, 2), hidden.unflatten(1, (count, rank)).transpose(0, 1))
    if strength != 1.0:
        of_hidden.mul_(strength)
        of_up.mul_(strength)
    return product, product.new_empty(0) if lower is None else lower, of_up


@unform_heads.register_fake
def _(
    gradients, of_gates, before, scales, hidden, up, norms, cos, sin, width, lower_width, heads, gates, strength
):  # fmt: skip
    shape, like = gradients[0].shape[:-1], gradients[0]
    lower = like.new_empty(*shape, lower_width) if lower_width else like.new_empty(0)
    return like.new_empty(*shape, width), lower, up.new_empty(up.shape)


class _Given:
    """What both kernels are given."""

    def __init__(self, product, lower, up, norms, cos, sin, heads: int, gates: int) -> None:
        count, width, rank = up.shape
        self.product = product.view(-1, product.shape[-1])
        self.lower = self.product if lower is None else lower.view(-1, lower.shape[-1])
        self.first_gate = count * width if lower is None else 0
        self.first_hidden = self.lower.shape[1] - count * rank
        self.hidden = self.lower[:, self.first_hidden :]
        self.norms = (norms[0], norms[-1])
        self.tables = (product, product) if cos is None else (cos.contiguous(), sin.contiguous())
        table_rows = 1 if cos is None else cos.shape[0] * cos.shape[1]
        tokens = self.product.shape[0]
        self.numbers = (tokens, self.product.stride(0), self.lower.stride(0), self.first_gate, table_rows)
        self.grid = (tokens, count)
        self.constants = {
            "N": width,
            "HALF": width // heads // 2,
            "BLOCK": triton.next_power_of_2(width // 2),
            "NORMED": len(norms),
            "GATES": gates,
            "ROPE": cos is not None,
            "num_warps": _WARPS,
        }


def _setup(ctx, inputs, output):
    product, lower, _, _, up, norms, cos, sin, heads, gates, strength, _ = inputs
    ctx.rest = product.shape[-1], 0 if lower is None else lower.shape[-1], heads, gates, strength
    ctx.save_for_backward(*output[4:], up, cos, sin, *norms)
    ctx.mark_non_differentiable(*output[4:])


def _backward(ctx, *gradients):
    before, scales, hidden, up, cos, sin, *norms = ctx.saved_tensors
    has_lower, gates = ctx.rest[1] > 0, ctx.rest[3]
    parts, of_gates = list(gradients[: up.shape[0]]), gradients[3] if gates else None
    of_product, of_lower, of_up = unform_heads(parts, of_gates, before, scales, hidden, up, norms, cos, sin, *ctx.rest)
    of_lower = of_lower if has_lower else None
    return of_product, of_lower, None, None, of_up, [None] * len(norms), None, None, None, None, None, None


form_heads = operator(_form_heads, fake=_fake, setup=_setup, backward=_backward)
