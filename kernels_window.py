"""Triton kernels of sliding-window softmax attention and their launchers. Imported on a GPU, by `kernel_ops`, never before.

    attend         out_i = sum_j P_ij v_j,  P_ij = e^(scale q_i . k_j) / sum over j,  for j from i - window + 1 to i
    attend_back    dP_ij = d_out_i . v_j,  dS_ij = P_ij (dP_ij - d_out_i . out_i)
                   dq_i = scale sum_j dS_ij k_j,  dk_j = scale sum_i dS_ij q_i,  dv_j = sum_i P_ij d_out_i

A program takes one tile of tokens of one head. `attend` holds their queries and walks back over the keys they see. So does
`attend_back` for dq; then it holds the tile's keys and walks on over the queries that see them, for dk and dv. The tokens of a
tile are read once for both, those of its neighbours come from a cache. P is computed again from `lse`, the logarithm of its
sums: nothing of size T x window is ever stored.

Tiles outside the window are not touched. Nothing is added up atomically, and what a program does depends on T, window, width and
dtype alone: a sequence gives the same bits alone, in a batch and on every run.

Precision: operands of products in the dtype of the inputs, sums and softmax in float32. float32 inputs multiply as torch's own
matrix products do: `torch.set_float32_matmul_precision`.

Letters: B batch, T tokens, H heads, D width of a head, BD the same padded, BT tokens of a tile. Algebra: Dao,
"FlashAttention-2" (2023).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

import kernels_pieces as pieces
from kernels_launch import LEAST, Launch, Launches, forget, limits, on_device, operands, power_of_two

forget()
BUILT_FROM = pieces.REVISION
# One compiled kernel serves all of them. Strides come in units of UNIT numbers, so that the compiler sees what they divide by.
SIZES = "T tiles H window q_b q_t q_h k_b k_t k_h v_b v_t v_h d_b d_t d_h".split()


@triton.jit
def _place(T, tiles, H):
    """Batch, tile and head of this program. Heads of the same tokens lie side by side: in memory too."""
    pid = tl.program_id(0)
    return (pid // H // tiles).to(tl.int64), pid // H % tiles, (pid % H).to(tl.int64)


@triton.jit
def _rows(x, n, T, stride, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr):
    """Tile n of x [T, D] as [BT, BD], zero beyond T and D."""
    x += n.to(tl.int64) * BT * stride
    return pieces.load_rows(x, tl.arange(0, BT), tl.arange(0, BD), stride, T - n * BT, D)


@triton.jit
def _store(x, n, tile, T, stride, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr):
    x += n.to(tl.int64) * BT * stride
    pieces.store_rows(x, tile, tl.arange(0, BT), tl.arange(0, BD), stride, T - n * BT, D)


@triton.jit(do_not_specialize=SIZES)
def attend(
    q, k, v, out, lse,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, T, tiles, H, window, factor,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """out [B, T, H, D], and lse [B, H, T]: log2 of the sum over j of 2^(factor q_i . k_j), factor = scale log2 e."""
    b, n, h = _place(T, tiles, H)
    q += (b * q_b + h * q_h) * UNIT
    k += (b * k_b + h * k_h) * UNIT
    v += (b * v_b + h * v_h) * UNIT
    i = tl.arange(0, BT)
    q_n = _rows(q, n, T, q_t * UNIT, D, BD, BT)
    best = tl.full([BT], -float("inf"), tl.float32)
    total = tl.zeros([BT], tl.float32)
    acc = tl.zeros([BT, BD], tl.float32)
    # Backwards from the tile's own keys: every token sees itself, so `best` is a number after the first step.
    first = tl.maximum(n * BT - window + 1, 0) // BT
    for back in tl.range(0, n - first + 1, num_stages=STAGES):
        k_ = _rows(k, n - back, T, k_t * UNIT, D, BD, BT)
        v_ = _rows(v, n - back, T, v_t * UNIT, D, BD, BT)
        S = tl.dot(q_n, tl.trans(k_), input_precision=PREC)
        at = i + back * BT  # of the queries, counted from the first of these keys
        keep = (at[:, None] >= i[None, :]) & ((at - window)[:, None] < i[None, :])
        S = tl.where(keep, S * factor, -float("inf"))
        higher = tl.maximum(best, tl.max(S, 1))
        P = tl.exp2(S - higher[:, None])
        shrink = tl.exp2(best - higher)
        total = total * shrink + tl.sum(P, 1)
        acc = tl.dot(P.to(v_.dtype), v_, acc * shrink[:, None], input_precision=PREC)
        best = higher
    row = b * T * H + h
    _store(out + row * D, n, acc / total[:, None], T, H * D, D, BD, BT)
    at = n * BT + i
    tl.store(lse + (b * H + h) * T + at, best + tl.log2(total), mask=at < T)


@triton.jit
def _gradient_of_queries(acc, q, d_out, k, v, lse_, mean, keep, factor, PREC: tl.constexpr):
    """acc + dS k, for tiles [BT, BD] of queries and keys; lse_ of every query, and `mean`, d_out . out: that of its dP over P."""
    S = tl.dot(q, tl.trans(k), input_precision=PREC)
    P = tl.exp2(tl.where(keep, S * factor - lse_[:, None], -float("inf")))
    dS = P * (tl.dot(d_out, tl.trans(v), input_precision=PREC) - mean[:, None])
    return tl.dot(dS.to(k.dtype), k, acc, input_precision=PREC)


@triton.jit
def _gradients_of_keys(acc_k, acc_v, q, d_out, k, v, lse_, mean, keep, factor, PREC: tl.constexpr):
    """acc_k + dS^T q and acc_v + P^T d_out. S and dP are formed transposed: a transposed product as a left operand is what Triton
    miscompiles on Hopper."""
    S = tl.dot(k, tl.trans(q), input_precision=PREC)
    P = tl.exp2(tl.where(keep, S * factor - lse_[None, :], -float("inf")))
    acc_v = tl.dot(P.to(d_out.dtype), d_out, acc_v, input_precision=PREC)
    dS = P * (tl.dot(v, tl.trans(d_out), input_precision=PREC) - mean[None, :])
    return tl.dot(dS.to(q.dtype), q, acc_k, input_precision=PREC), acc_v


@triton.jit(do_not_specialize=SIZES)
def attend_back(
    q, k, v, out, lse, d_out, dq, dk, dv,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, d_b, d_t, d_h, T, tiles, H, window, factor, scale,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, UNIT: tl.constexpr, STAGES: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv [B, T, H, D] of a tile of tokens."""
    b, n, h = _place(T, tiles, H)
    q += (b * q_b + h * q_h) * UNIT
    k += (b * k_b + h * k_h) * UNIT
    v += (b * v_b + h * v_h) * UNIT
    d_out += (b * d_b + h * d_h) * UNIT
    row = b * T * H + h
    out += row * D
    lse += (b * H + h) * T
    dense = H * D
    i = tl.arange(0, BT)
    # Products of float32 split their operands in two. What is held is split anew where it is used: the parts of all tiles at
    # once would spill two kilobytes a thread.
    FULL: tl.constexpr = q.dtype.element_ty == tl.float32

    # The tile's own tokens serve both walks. Loads in a row, with no barrier between, wait for memory once.
    q_n = _rows(q, n, T, q_t * UNIT, D, BD, BT)
    k_n = _rows(k, n, T, k_t * UNIT, D, BD, BT)
    v_n = _rows(v, n, T, v_t * UNIT, D, BD, BT)
    d_n = _rows(d_out, n, T, d_t * UNIT, D, BD, BT)
    out_n = _rows(out, n, T, dense, D, BD, BT)
    lse_n = tl.load(lse + n * BT + i, mask=n * BT + i < T, other=0.0)
    mean_n = tl.sum(d_n.to(tl.float32) * out_n.to(tl.float32), 1)

    # This tile's queries: their own keys, and those before.
    acc = tl.zeros([BT, BD], tl.float32)
    keep = (i[:, None] >= i[None, :]) & ((i - window)[:, None] < i[None, :])
    acc = _gradient_of_queries(acc, q_n, d_n, k_n, v_n, lse_n, mean_n, keep, factor, PREC)
    first = tl.maximum(n * BT - window + 1, 0) // BT
    for back in tl.range(1, n - first + 1, num_stages=STAGES):
        k_ = _rows(k, n - back, T, k_t * UNIT, D, BD, BT)
        v_ = _rows(v, n - back, T, v_t * UNIT, D, BD, BT)
        if FULL:
            q_n, d_n = pieces.hold(q_n), pieces.hold(d_n)
        keep = (i + back * BT - window)[:, None] < i[None, :]
        acc = _gradient_of_queries(acc, q_n, d_n, k_, v_, lse_n, mean_n, keep, factor, PREC)
    _store(dq + row * D, n, acc * scale, T, dense, D, BD, BT)

    # This tile's keys: their own queries, and those after.
    if FULL:
        q_n, k_n, v_n, d_n = pieces.hold(q_n), pieces.hold(k_n), pieces.hold(v_n), pieces.hold(d_n)
    acc_k = tl.zeros([BT, BD], tl.float32)
    acc_v = tl.zeros([BT, BD], tl.float32)
    keep = (i[None, :] >= i[:, None]) & ((i - window)[None, :] < i[:, None])
    acc_k, acc_v = _gradients_of_keys(acc_k, acc_v, q_n, d_n, k_n, v_n, lse_n, mean_n, keep, factor, PREC)
    last = tl.minimum((n * BT + BT + window - 2) // BT, tiles - 1)
    for ahead in tl.range(1, last - n + 1, num_stages=STAGES):
        m = n + ahead
        q_ = _rows(q, m, T, q_t * UNIT, D, BD, BT)
        d_ = _rows(d_out, m, T, d_t * UNIT, D, BD, BT)
        out_ = _rows(out, m, T, dense, D, BD, BT)
        lse_ = tl.load(lse + m * BT + i, mask=m * BT + i < T, other=0.0)
        mean = tl.sum(d_.to(tl.float32) * out_.to(tl.float32), 1)
        if FULL:
            k_n, v_n = pieces.hold(k_n), pieces.hold(v_n)
        keep = (i + ahead * BT - window)[None, :] < i[:, None]
        acc_k, acc_v = _gradients_of_keys(acc_k, acc_v, q_, d_, k_n, v_n, lse_, mean, keep, factor, PREC)
    _store(dk + row * D, n, acc_k * scale, T, dense, D, BD, BT)
    _store(dv + row * D, n, acc_v, T, dense, D, BD, BT)


# ------------------------------------------------------------------------------------------------ plan

WIDEST = 128  # of a head: wider ones do not fit the registers and, in float32, the shared memory of many GPUs
LOG2E = math.log2(math.e)


class Plan(NamedTuple):
    """Sizes that a width and window run with. Never a function of B, nor of a T beyond the window: bits must not depend on it."""

    BD: int  # padded D
    BT: int  # tokens of a tile
    attend: Launch
    attend_back: Launch


@functools.lru_cache(maxsize=256)
def plan(D: int, window: int, dtype: torch.dtype, generation: int = 9) -> Plan:
    """For heads of width D on a GPU of that major compute capability."""
    BD = max(LEAST, power_of_two(D))
    full, big = dtype == torch.float32, generation in (9, 10)  # GPUs with products of 64 rows, and room for them
    BT = 32 if full or (BD > 64 and not big) else 64
    # One tile at most before this one, and one after: nothing to prefetch. On sm_8x it saves registers all the same.
    single = full or (big and window <= BT + 1)
    registers = 255 if full else 0  # unasked, ptxas takes 32 for float32 and spills
    return Plan(
        BD=BD,
        BT=BT,
        attend=Launch(4, 3 if big and not full and BD <= 64 else 2, registers),
        attend_back=Launch(8 if full and BD > 64 else 4, 1 if single else 2, registers),
    )


# ------------------------------------------------------------------------------------------------ launchers


def _prepared(tensors, BT):
    """Tensors [B, T, H, D] whose rows lie together, the strides of their other axes in units, and the unit."""
    D = tensors[0].shape[-1]
    # The offsets inside a tile are 32 bit.
    tensors = [x if (D == 1 or x.stride(3) == 1) and x.stride(1) * BT < 2**31 else x.contiguous() for x in tensors]
    strides = [n for x in tensors for n in x.stride()[:3]]
    unit = math.gcd(8, D, *strides)
    return tensors, [n // unit for n in strides], unit


@on_device
def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, T, H, D] in the dtype of q, and lse [B, H, T] float32 for `backward`; q, k, v [B, T, H, D] of one dtype.

    ValueError for others, a head wider than WIDEST and a window below 1.
    """
    if any((x.shape, x.dtype, x.device) != (q.shape, q.dtype, q.device) for x in (k, v)) or q.dim() != 4:
        given = ", ".join(f"{x.dtype} {tuple(x.shape)} on {x.device}" for x in (q, k, v))
        raise ValueError(f"q, k, v: expected three tensors [B, T, H, D] of one shape, dtype and device, given {given}")
    B, T, H, D = q.shape
    if not 1 <= D <= WIDEST or window < 1:
        raise ValueError(f"expected a width of 1 to {WIDEST} and a window of at least 1, given {D} and {window}")
    window = min(window, T)
    p = plan(D, window, q.dtype, limits(q.device)[1])
    out = torch.empty((B, T, H, D), device=q.device, dtype=q.dtype)
    lse = torch.empty((B, H, T), device=q.device, dtype=torch.float32)
    if not out.numel():
        return out, lse
    (q, k, v), strides, unit = _prepared((q, k, v), p.BT)
    prec, tiles = operands(q)[1], -(-T // p.BT)
    run = Launches(("attend", D, p, unit, prec, tuple(n >= 2**31 for n in strides)), (q, k, v))
    run(
        attend, B * H * tiles,
        (q, k, v, out, lse), (*strides, T, tiles, H, window, D**-0.5 * LOG2E),
        lambda: dict(D=D, BD=p.BD, BT=p.BT, UNIT=unit, STAGES=p.attend.stages, PREC=prec, **p.attend.options()),
    )  # fmt: skip
    return out, lse


@on_device
def backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv [B, T, H, D] from d_out, and from what `forward` took and gave."""
    B, T, H, D = q.shape
    window = min(window, T)
    p = plan(D, window, q.dtype, limits(q.device)[1])
    dq, dk, dv = (torch.empty((B, T, H, D), device=q.device, dtype=q.dtype) for _ in range(3))
    if not dq.numel():
        return dq, dk, dv
    (q, k, v, d_out), strides, unit = _prepared((q, k, v, d_out), p.BT)
    prec, tiles = operands(q)[1], -(-T // p.BT)
    run = Launches(("attend_back", D, p, unit, prec, tuple(n >= 2**31 for n in strides)), (q, k, v, d_out, out, lse))
    run(
        attend_back, B * H * tiles,
        (q, k, v, out, lse, d_out, dq, dk, dv), (*strides, T, tiles, H, window, D**-0.5 * LOG2E, D**-0.5),
        lambda: dict(D=D, BD=p.BD, BT=p.BT, UNIT=unit, STAGES=p.attend_back.stages, PREC=prec, **p.attend_back.options()),
    )  # fmt: skip
    return dq, dk, dv
