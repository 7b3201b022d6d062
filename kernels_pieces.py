"""What the Triton kernels of the delta rule are put together from: tiles, decays, scales. See kernels.py for the letters."""

import triton
import triton.language as tl

NORM_EPS = tl.constexpr(1e-6)

# Another one after every reload: kernels_launch.py sees by it that kernels were built from older pieces.
REVISION = object()


@triton.jit
def load_rows(pointer, rows, cols, stride, n_rows, n_cols):
    """Tile [rows, cols] of a row-major matrix, zero beyond its n_rows and n_cols."""
    mask = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    return tl.load(pointer + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def tokens_left(n, end, T, C: tl.constexpr):
    """Tokens of chunk n, none from chunk `end` on: what a walk loads a step ahead of its last is masked."""
    return tl.where(n < end, tl.minimum(T - n * C, C), 0).to(tl.int32)


HOLDS = tl.constexpr(not triton.knobs.runtime.interpret)  # the interpreter has no inline assembly


@triton.jit
def hold(x):
    """x, from here on: a move that Triton takes no step of x's way past. Loads written one after another are then all issued
    before the first of them is waited for. Without it Triton puts every tile that goes to shared memory there behind its own
    load, waiting for each, and loads vectors again wherever they are used.
    """
    if HOLDS:
        PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=PACK)
    else:
        return x


@triton.jit
def load_columns(pointer, cols, rows, stride, n_rows, n_cols):
    """The same tile transposed, [cols, rows].

    For what is needed one way only, or both ways in a loop: Triton prefetches no load that has two different uses.
    """
    mask = (rows[None, :] < n_rows) & (cols[:, None] < n_cols)
    return tl.load(pointer + rows[None, :] * stride + cols[:, None], mask=mask, other=0.0)


@triton.jit
def store_rows(pointer, tile, rows, cols, stride, n_rows, n_cols):
    mask = (rows[:, None] < n_rows) & (cols[None, :] < n_cols)
    tl.store(pointer + rows[:, None] * stride + cols[None, :], tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def inverse_norm(x, NORM: tl.constexpr):
    """1 / |x| of every row, or ones. A row factor instead of a normalised tile: x itself enters products unrounded."""
    if NORM:
        x = x.to(tl.float32)
        return tl.rsqrt(tl.sum(x * x, 1) + NORM_EPS)
    else:
        return tl.full([x.shape[0]], 1.0, tl.float32)


@triton.jit
def inverse_norm_of_columns(x, NORM: tl.constexpr):
    """`inverse_norm` of a transposed tile."""
    if NORM:
        x = x.to(tl.float32)
        return tl.rsqrt(tl.sum(x * x, 0) + NORM_EPS)
    else:
        return tl.full([x.shape[1]], 1.0, tl.float32)


@triton.jit
def _power(exponent):
    """2^exponent as float32, the exponent held between -112 and 112."""
    return ((tl.minimum(tl.maximum(exponent, -112), 112) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _exponent(x):
    return (x.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def fit(sizes, bh, N, OP: tl.constexpr):
    """A power of two that brings the values of a sequence and head into float16, from the largest of every chunk.

    1 where that lies between 2^-8 and 2^8, else the least power of 16 that brings it there. Coarse, and mostly 1, on purpose: the
    rounding of a token's smallest values must not move with the size of later tokens. The state may outgrow the values 2^8 times.
    """
    if OP == tl.float16:
        over = _exponent(_maximum(sizes + bh * N, 0, N)) - 7
        under = -15 - over
        down, up = ((tl.maximum(over, 0) + 3) >> 2) << 2, ((tl.maximum(under, 0) + 3) >> 2) << 2
        return _power(up - down)
    else:
        return 1.0


@triton.jit
def tight(largest, OP: tl.constexpr):
    """A power of two that brings values of magnitude `largest` to between 1 and 2."""
    if OP == tl.float16:
        return _power(-_exponent(largest))
    else:
        return 1.0


@triton.jit
def _maximum(sizes, start, end):
    largest = tl.zeros([128], tl.float32)
    for first in range(start, end, 128):
        at = first + tl.arange(0, 128)
        largest = tl.maximum(largest, tl.load(sizes + at, mask=at < end, other=0.0))
    return tl.max(largest, 0)


@triton.jit
def fit_gradients(sizes, start, end, of_state, OP: tl.constexpr):
    """The same for the gradients of chunks start to end and of the state that they leave, of magnitude `of_state`, which come in
    any size: the largest is brought to between 4 and 8, and sums over the tokens of a block may grow 2^13 times.
    """
    return tight(tl.maximum(_maximum(sizes, start, end), of_state), OP) * 4.0


@triton.jit
def amax(x):
    return tl.max(tl.abs(x)).to(tl.float32)  # of all at once: rows first would cost a shuffle a row


@triton.jit
def amax_of_state(state, K, V, C: tl.constexpr, BV: tl.constexpr):
    largest = 0.0
    for row in range(0, K, C):
        for vb in range(0, V, BV):
            cols = vb + tl.arange(0, BV)
            tile = load_rows(state + row * V, tl.arange(0, C), cols, V, tl.minimum(K - row, C), V)
            largest = tl.maximum(largest, amax(tile))
    return largest


@triton.jit
def amax_of_chunk(x, pid, T, H, N, V, C: tl.constexpr, BV: tl.constexpr):
    """Of chunk pid % N of x [B, T, H, V]."""
    n, bh = pid % N, pid // N
    first = (bh // H * T + n * C) * H + bh % H
    left = tl.minimum(T - n * C, C).to(tl.int32)
    largest = 0.0
    for vb in range(0, V, BV):
        tile = load_rows(x + first * V, tl.arange(0, C), vb + tl.arange(0, BV), H * V, left, V)
        largest = tl.maximum(largest, amax(tile))
    return largest


@triton.jit
def vector(gates, chunk, row: tl.constexpr, i, C: tl.constexpr):
    """One of the vectors [C] that `intra` leaves for a chunk.

    0 e^gc   1 beta e^gc / |k| (erase="raw": gc of the token before)   2 e^(gc_last - gc) / |k|   3 beta
    4 and 5 gc, in two parts where products are in float32   6 1 / |k|         (|k|: 1 where keys are not normalised)
    """
    return tl.load(gates + (chunk * 7 + row) * C + i)


@triton.jit
def vectors(gates, chunk, i, C: tl.constexpr):
    """All of them by one load, as a tile [C, 8] for `split_vectors`. One by one Triton would load them again for every use."""
    row = tl.arange(0, 8)
    return tl.load(gates + chunk * 7 * C + row[None, :] * C + i[:, None], mask=row[None, :] < 7, other=0.0)


@triton.jit
def split_vectors(tile):
    """The rows of `vectors`, 0 to 6, each [C]."""
    tile = tl.reshape(tile, [tile.shape[0], 2, 2, 2])
    even, odd = tl.split(tile)
    even_0, even_1 = tl.split(even)
    odd_0, odd_1 = tl.split(odd)
    a0, a4 = tl.split(even_0)
    a2, a6 = tl.split(even_1)
    a1, a5 = tl.split(odd_0)
    a3, _ = tl.split(odd_1)
    return a0, a1, a2, a3, a4, a5, a6


LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def decays(coarse, rest, row_coarse, row_rest, keep, TWO: tl.constexpr, SHIFT: tl.constexpr = 0):
    """e^(gc_i - gc_j) / 2^SHIFT where `keep`, else 0. Masked before exp, where the differences would overflow."""
    if TWO:
        gap = row_coarse[:, None] - coarse[None, :] + (row_rest[:, None] - rest[None, :])
        return tl.exp(tl.where(keep, gap, -float("inf"))) * (1.0 / (1 << SHIFT))
    else:  # the factors that need not be exact taken to the vectors
        gap = (row_coarse * LOG2E - SHIFT)[:, None] - (coarse * LOG2E)[None, :]
        return tl.exp2(tl.where(keep, gap, -float("inf")))


@triton.jit
def scores(q16, k_t, coarse, rest, norm, norm_q, i, OP: tl.constexpr, PREC: tl.constexpr, NORM_K: tl.constexpr):
    """P [C, C] = tril(q k^T e^(gc_i - gc_j)) from q [C, BK], the transposed keys [BK, C] and rows 4 to 6 of the vectors."""
    decay = decays(coarse, rest, coarse, rest, i[:, None] >= i[None, :], OP == tl.float32)
    P = tl.dot(q16, k_t, input_precision=PREC) * decay * norm_q[:, None]
    if NORM_K:
        P *= norm[None, :]
    return P.to(OP)


@triton.jit
def scores_t(k16, q_t, coarse, rest, norm, norm_q, i, OP: tl.constexpr, PREC: tl.constexpr, NORM_K: tl.constexpr):
    """P transposed, from keys [C, BK] and the transposed queries."""
    decay = decays(-coarse, -rest, -coarse, -rest, i[:, None] <= i[None, :], OP == tl.float32)
    P = tl.dot(k16, q_t, input_precision=PREC) * decay * norm_q[None, :]
    if NORM_K:
        P *= norm[:, None]
    return P.to(OP)


@triton.jit
def new_values(k16, S16, X, values, strength, recall, OP: tl.constexpr, PREC: tl.constexpr):
    recalled = tl.dot(k16, S16, input_precision=PREC)
    R_ = strength[:, None] * values.to(tl.float32) - recall[:, None] * recalled
    return tl.dot(X, R_.to(OP), input_precision=PREC).to(OP)


@triton.jit
def key_sums(dPt, k16, q16, norm_q, PREC: tl.constexpr, NORM_Q: tl.constexpr):
    """k_j . sum_i dPt[j, i] norm_q_i q_i of every key, from the rounded dPt [C, C] that dq took, with 1 / |k_j| in it.

    dg is the sum of q . dq - k . dk over this token and all later ones. Pairs of a query and a key that both come later, and a
    token's own, must cancel in it, and where decay is fast nearly all of P is such pairs: two roundings of dP would leave their
    difference, up to 1% of dg. For operands in 16 bit, whose products are exact.
    """
    products = tl.dot(k16, tl.trans(q16), input_precision=PREC)
    if NORM_Q:
        products *= norm_q[None, :]
    return tl.sum(dPt.to(tl.float32) * products, 1)
