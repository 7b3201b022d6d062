"""The Triton kernels of the delta rule that write, read and take one token. See kernels.py for the algebra and the letters."""

import triton
import triton.language as tl

import kernels_pieces as pieces

SIZES = ["T", "N", "R", "NB"]  # one compiled kernel serves all of them


@triton.jit(do_not_specialize=SIZES)
def size(
    x, start, sizes,
    T, H, N, K, V,
    C: tl.constexpr, BV: tl.constexpr, HAS_X: tl.constexpr, HAS_START: tl.constexpr,
):  # fmt: skip
    """The largest magnitude of every chunk of x [B, T, H, V] and, with the first, of `start` [B, H, K, V]."""
    pid = tl.program_id(0).to(tl.int64)
    largest = 0.0
    if HAS_X:
        largest = pieces.amax_of_chunk(x, pid, T, H, N, V, C, BV)
    if HAS_START:
        if pid % N == 0:
            largest = tl.maximum(largest, pieces.amax_of_state(start + pid // N * K * V, K, V, C, BV))
    tl.store(sizes + pid, largest)


# ------------------------------------------------------------------------------------------------ forward


@triton.jit
def _invert(
    k, beta, g, inverse, gates,
    pid, T, H, N, K,
    C: tl.constexpr, BK: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr,
    RAW: tl.constexpr, NORM_K: tl.constexpr,
):  # fmt: skip
    """What of one chunk needs neither queries nor state: the decays, and X = (I + L)^-1.

    X by halves: the inverse of [[A, 0], [B, D]] is [[A', 0], [-D' B A', D']]. Stable where keys are nearly parallel, which a
    product of powers of L is not. Up to blocks of 16 tokens on the C / 16 diagonal blocks alone.
    """
    TWO: tl.constexpr = OP == tl.float32
    n, bh = pid % N, pid // N
    b, h = bh // H, bh % H
    chunk = (b * N + n) * H + h
    first = (b * T + n * C) * H + h  # of [B, T, H]
    left = tl.minimum(T - n * C, C).to(tl.int32)
    i = tl.arange(0, C)
    cols = tl.arange(0, BK)
    kt = pieces.load_rows(k + first * K, i, cols, H * K, left, K)
    # Differences of running sums lose digits when one gate is shut (g = -50 or -inf). Multiples of 1/16 add up exactly, so the
    # coarse parts cancel without rounding. The clamp changes nothing: e^-128 is zero in float32.
    own = tl.maximum(tl.load(g + first + i * H, mask=i < left, other=0.0).to(tl.float32), -128.0)
    own_coarse = tl.floor(own * 16.0 + 0.5) * 0.0625
    own_rest = own - own_coarse
    coarse, rest = tl.cumsum(own_coarse, 0), tl.cumsum(own_rest, 0)
    last_coarse, last_rest = tl.sum(own_coarse, 0), tl.sum(own_rest, 0)
    row_coarse, row_rest = coarse, rest
    if RAW:
        row_coarse, row_rest = coarse - own_coarse, rest - own_rest
    norm = pieces.inverse_norm(kt, NORM_K)
    strength = tl.load(beta + first + i * H, mask=i < left, other=0.0).to(tl.float32)
    from_start = tl.exp(coarse + rest)
    base = gates + chunk * 7 * C + i
    tl.store(base, from_start)
    tl.store(base + C, strength * tl.exp(row_coarse + row_rest) * norm)
    tl.store(base + 2 * C, tl.exp((last_coarse - coarse) + (last_rest - rest)) * norm)
    tl.store(base + 3 * C, strength)
    if not TWO:
        coarse += rest
        row_coarse += row_rest
    tl.store(base + 4 * C, coarse)
    tl.store(base + 5 * C, rest)
    tl.store(base + 6 * C, norm)
    strength *= norm
    below = i[:, None] > i[None, :]
    L = tl.dot(kt, tl.trans(kt), input_precision=PREC) * pieces.decays(coarse, rest, row_coarse, row_rest, below, TWO)
    L *= strength[:, None]
    if NORM_K:
        L *= norm[None, :]

    G: tl.constexpr = C // 16
    a = tl.arange(0, 16)
    at = tl.arange(0, G)[:, None] * 16 + a[None, :]
    mask = (at[:, :, None] < left) & (cols[None, None, :] < K)
    kd = tl.load(k + first * K + at[:, :, None] * (H * K) + cols[None, None, :], mask=mask, other=0.0)
    below = a[None, :, None] > a[None, None, :]
    Ld = tl.dot(kd, tl.permute(kd, (0, 2, 1)), input_precision=PREC)
    coarse_d, row_d = tl.reshape(coarse, [G, 16]), tl.reshape(row_coarse, [G, 16])
    gap = row_d[:, :, None] - coarse_d[:, None, :]
    if TWO:
        gap += tl.reshape(row_rest, [G, 16])[:, :, None] - tl.reshape(rest, [G, 16])[:, None, :]
    Ld = tl.where(below, Ld * tl.exp(tl.where(below, gap, 0.0)), 0.0) * tl.reshape(strength, [G, 16])[:, :, None]
    if NORM_K:
        Ld *= tl.reshape(norm, [G, 16])[:, None, :]
    half = a // 2
    same = half[None, :, None] == half[None, None, :]
    Xd = tl.where(a[None, :, None] == a[None, None, :], 1.0, 0.0) - tl.where(same, Ld, 0.0)
    for level in tl.static_range(1, 4):
        outer, inner = a >> (level + 1), a >> level
        corner = (outer[None, :, None] == outer[None, None, :]) & (inner[None, :, None] != inner[None, None, :])
        B = tl.where(corner, Ld, 0.0).to(OP)
        BX = tl.dot(B, Xd.to(OP), input_precision=PREC)
        Xd -= tl.dot(Xd.to(OP), BX.to(OP), input_precision=PREC)
    blocks = tl.arange(0, G)
    diagonal = blocks[:, None, None, None] == blocks[None, None, :, None]
    X = tl.reshape(tl.where(diagonal, Xd[:, :, None, :], 0.0), [C, C])
    for level in tl.static_range(4, 8):
        if (1 << level) < C:
            outer, inner = i >> (level + 1), i >> level
            corner = (outer[:, None] == outer[None, :]) & (inner[:, None] != inner[None, :])
            B = tl.where(corner, L, 0.0).to(OP)
            BX = tl.dot(B, X.to(OP), input_precision=PREC)
            X -= tl.dot(X.to(OP), BX.to(OP), input_precision=PREC)
    square = i[:, None] * C + i[None, :]
    tl.store(inverse + chunk * C * C + square, X.to(OP))


@triton.jit(do_not_specialize=SIZES)
def intra(
    k, v, beta, g, start, inverse, gates, sizes,
    T, H, N, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, HAS_START: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr,
    RAW: tl.constexpr, NORM_K: tl.constexpr,
):  # fmt: skip
    """`_invert` of one chunk by every second program and `amax_of_chunk` of v by the others: one computes, the other loads."""
    pid = (tl.program_id(0) // 2).to(tl.int64)
    if tl.program_id(0) % 2 == 0:
        _invert(k, beta, g, inverse, gates, pid, T, H, N, K, C, BK, OP, PREC, RAW, NORM_K)
    else:
        largest = pieces.amax_of_chunk(v, pid, T, H, N, V, C, BV)
        if HAS_START:
            if pid % N == 0:
                largest = tl.maximum(largest, pieces.amax_of_state(start + pid // N * K * V, K, V, C, BV))
        tl.store(sizes + pid, largest)


@triton.jit(do_not_specialize=SIZES)
def summarise(
    k, v, gates, inverse, sizes, maps, deltas, wholes,
    T, H, N, R, NB, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VB: tl.constexpr,
    KB: tl.constexpr, STAGES: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One block from an empty state, BV columns of it: of D [K, V] in the first VB programs, of the map M [K, K] in KB more."""
    pid = tl.program_id(0).to(tl.int64)
    vb = (pid % (VB + KB)).to(tl.int32)
    block, bh = pid // (VB + KB) % NB, pid // (VB + KB) // NB
    b, h = bh // H, bh % H
    i = tl.arange(0, C)
    cols = tl.arange(0, BK)
    of_map = vb >= VB
    out_cols = tl.where(of_map, vb - VB, vb) * BV + tl.arange(0, BV)
    S = tl.zeros([BK, BV], tl.float32)
    total = 1.0
    f = pieces.fit(sizes, bh, N, OP)
    f = tl.where(of_map, 1.0, f)
    width = tl.where(of_map, K, V)
    for n in tl.range(block * R, tl.minimum(block * R + R, N), num_stages=STAGES):
        first = (b * T + n * C) * H + h
        left = tl.minimum(T - n * C, C).to(tl.int32)
        chunk = (b * N + n) * H + h
        src = pieces.load_rows(tl.where(of_map, k, v) + first * width, i, out_cols, H * width, left, width)
        kt = pieces.load_rows(k + first * K, i, cols, H * K, left, K)
        k_t = pieces.load_columns(k + first * K, cols, i, H * K, left, K)
        X = tl.load(inverse + chunk * C * C + i[:, None] * C + i[None, :])
        recall, to_end = pieces.vector(gates, chunk, 1, i, C), pieces.vector(gates, chunk, 2, i, C)
        whole = tl.load(gates + chunk * 7 * C + C - 1)
        # What M holds is what w k would have left.
        share = tl.where(of_map, recall * total, pieces.vector(gates, chunk, 3, i, C))
        recalled = tl.dot(kt.to(OP), S.to(OP), input_precision=PREC)
        R_ = (share * f)[:, None] * src.to(tl.float32) - recall[:, None] * recalled
        new_v = tl.dot(X, R_.to(OP), input_precision=PREC)
        S = tl.dot(k_t.to(OP), (to_end[:, None] * new_v).to(OP), S * whole, input_precision=PREC)
        total *= whole
    S *= 1.0 / f
    entry = (b * NB + block) * H + h
    if of_map:
        pieces.store_rows(maps + entry * K * K, S, cols, out_cols, K, K, K)
    else:
        pieces.store_rows(deltas + entry * K * V, S, cols, out_cols, V, K, V)
    if vb == 0:
        tl.store(wholes + entry, total)


@triton.jit(do_not_specialize=SIZES)
def scan(
    start, maps, deltas, wholes, sizes, last,
    H, N, NB, K, V,
    BK: tl.constexpr, BV: tl.constexpr, VB: tl.constexpr,
    HAS_START: tl.constexpr, REVERSE: tl.constexpr, HAS_LAST: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """The chain over blocks, BV columns of it: deltas[n] is read and the state on entry of block n put in its place.

    REVERSE runs from the last block with the maps transposed: gradients of the state on exit of each block. What a step needs
    is loaded two steps ahead: nothing but the products waits for the state.
    """
    pid = tl.program_id(0).to(tl.int64)
    vb, bh = (pid % VB).to(tl.int32), pid // VB
    b, h = bh // H, bh % H
    rows = tl.arange(0, BK)
    cols = vb * BV + tl.arange(0, BV)
    if HAS_START:
        S = pieces.load_rows(start + bh * K * V, rows, cols, V, K, V)
    else:
        S = tl.zeros([BK, BV], tl.float32)
    if not REVERSE:
        f = pieces.fit(sizes, bh, N, OP)
    square = (rows[:, None] < K) & (rows[None, :] < K)
    if REVERSE:
        at = rows[:, None] + rows[None, :] * K
    else:
        at = rows[:, None] * K + rows[None, :]
    stride = -H if REVERSE else H
    entry = (b * NB + (NB - 1 if REVERSE else 0)) * H + h
    later = entry + (stride if NB > 1 else 0)
    M = tl.load(maps + entry * K * K + at, mask=square, other=0.0)
    D = pieces.load_rows(deltas + entry * K * V, rows, cols, V, K, V)
    whole = tl.load(wholes + entry)
    next_M = tl.load(maps + later * K * K + at, mask=square, other=0.0)
    next_D = pieces.load_rows(deltas + later * K * V, rows, cols, V, K, V)
    next_whole = tl.load(wholes + later)
    for step in range(NB):
        latest = later + (stride if step + 2 < NB else 0)
        last_M = tl.load(maps + latest * K * K + at, mask=square, other=0.0)
        last_D = pieces.load_rows(deltas + latest * K * V, rows, cols, V, K, V)
        last_whole = tl.load(wholes + latest)
        pieces.store_rows(deltas + entry * K * V, S, rows, cols, V, K, V)
        if REVERSE:  # gradients come in any size
            size = pieces.tight(pieces.amax(S), OP)
        else:
            size = f
        S = whole * S + D - tl.dot(M, (S * size).to(OP), input_precision=PREC) * (1.0 / size)
        entry, later = later, latest
        M, D, whole = next_M, next_D, next_whole
        next_M, next_D, next_whole = last_M, last_D, last_whole
    if HAS_LAST:
        pieces.store_rows(last + bh * K * V, S, rows, cols, V, K, V)


@triton.jit(do_not_specialize=SIZES)
def walk(
    q, k, v, gates, inverse, sizes, entries, out, last, states, scales, new_values,
    scale, T, H, N, R, NB, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VB: tl.constexpr,
    HAS_ENTRY: tl.constexpr, READ: tl.constexpr, SAVE: tl.constexpr, KEEP: tl.constexpr,
    STAGES: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr, NORM_Q: tl.constexpr, NORM_K: tl.constexpr,
):  # fmt: skip
    """One block from its entry state, BV columns of it. Writes out [B, T, H, V] (READ), the entry states of its chunks with
    their scales (SAVE), new_v (KEEP) and, from the last block, the last state."""
    pid = tl.program_id(0).to(tl.int64)
    vb = (pid % VB).to(tl.int32)
    block, bh = pid // VB % NB, pid // VB // NB
    b, h = bh // H, bh % H
    i = tl.arange(0, C)
    cols = tl.arange(0, BK)
    out_cols = vb * BV + tl.arange(0, BV)
    if HAS_ENTRY:
        S = pieces.load_rows(entries + ((b * NB + block) * H + h) * K * V, cols, out_cols, V, K, V)
    else:
        S = tl.zeros([BK, BV], tl.float32)
    f = pieces.fit(sizes, bh, N, OP)  # what S is multiplied by
    S *= f
    for n in tl.range(block * R, tl.minimum(block * R + R, N), num_stages=STAGES):
        first = (b * T + n * C) * H + h
        left = tl.minimum(T - n * C, C).to(tl.int32)
        chunk = (b * N + n) * H + h
        values = pieces.load_rows(v + first * V, i, out_cols, H * V, left, V)
        kt = pieces.load_rows(k + first * K, i, cols, H * K, left, K)
        k_t = pieces.load_columns(k + first * K, cols, i, H * K, left, K)
        X = tl.load(inverse + chunk * C * C + i[:, None] * C + i[None, :])
        recall, to_end = pieces.vector(gates, chunk, 1, i, C), pieces.vector(gates, chunk, 2, i, C)
        strength = pieces.vector(gates, chunk, 3, i, C)
        whole = tl.load(gates + chunk * 7 * C + C - 1)
        if READ:
            qt = pieces.load_rows(q + first * K, i, cols, H * K, left, K)
            from_start = pieces.vector(gates, chunk, 0, i, C)
        S16 = S.to(OP)
        if SAVE:
            pieces.store_rows(states + chunk * K * V, S16, cols, out_cols, V, K, V)
        recalled = tl.dot(kt.to(OP), S16, input_precision=PREC)
        R_ = (strength * f)[:, None] * values.to(tl.float32) - recall[:, None] * recalled
        new_v = tl.dot(X, R_.to(OP), input_precision=PREC)
        new_v16 = new_v.to(OP)
        if KEEP:
            pieces.store_rows(new_values + first * V, new_v16, i, out_cols, H * V, left, V)
        S = tl.dot(k_t.to(OP), (to_end[:, None] * new_v).to(OP), S * whole, input_precision=PREC)
        if READ:  # after S is on its way: registers would not hold both
            norm_q = pieces.inverse_norm(qt, NORM_Q)
            P = pieces.scores(qt.to(OP), k_t.to(OP), gates, chunk, norm_q, i, C, OP, PREC, NORM_K)
            o = tl.dot(qt.to(OP), S16, input_precision=PREC) * (from_start * norm_q)[:, None]
            o = tl.dot(P, new_v16, o, input_precision=PREC)
            pieces.store_rows(out + first * V, o * (scale / f), i, out_cols, H * V, left, V)
    if block == NB - 1:
        pieces.store_rows(last + bh * K * V, S * (1.0 / f), cols, out_cols, V, K, V)
        if SAVE:
            tl.store(scales + bh, f)


@triton.jit(do_not_specialize=SIZES)
def read(
    q, k, gates, states, scales, new_values, out,
    scale, T, H, N, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VB: tl.constexpr,
    OP: tl.constexpr, PREC: tl.constexpr, NORM_Q: tl.constexpr, NORM_K: tl.constexpr,
):  # fmt: skip
    """One chunk of a further read of a memory, BV columns of it."""
    pid = tl.program_id(0).to(tl.int64)
    vb = (pid % VB).to(tl.int32)
    n, bh = pid // VB % N, pid // VB // N
    b, h = bh // H, bh % H
    i = tl.arange(0, C)
    cols = tl.arange(0, BK)
    out_cols = vb * BV + tl.arange(0, BV)
    first = (b * T + n * C) * H + h
    left = tl.minimum(T - n * C, C).to(tl.int32)
    chunk = (b * N + n) * H + h
    qt = pieces.load_rows(q + first * K, i, cols, H * K, left, K)
    k_t = pieces.load_columns(k + first * K, cols, i, H * K, left, K)
    norm_q = pieces.inverse_norm(qt, NORM_Q)
    f = tl.load(scales + bh)
    S16 = pieces.load_rows(states + chunk * K * V, cols, out_cols, V, K, V)
    new_v = pieces.load_rows(new_values + first * V, i, out_cols, H * V, left, V)
    P = pieces.scores(qt.to(OP), k_t.to(OP), gates, chunk, norm_q, i, C, OP, PREC, NORM_K)
    o = tl.dot(qt.to(OP), S16, input_precision=PREC) * (pieces.vector(gates, chunk, 0, i, C) * norm_q)[:, None]
    o += tl.dot(P, new_v, input_precision=PREC)
    pieces.store_rows(out + first * V, o * (scale / f), i, out_cols, H * V, left, V)


# ------------------------------------------------------------------------------------------------ one token


@triton.jit
def step(
    q, k, v, beta, g, state, out, next_state,
    scale, K, V,
    BK: tl.constexpr, BV: tl.constexpr, VB: tl.constexpr,
    RAW: tl.constexpr, NORM_Q: tl.constexpr, NORM_K: tl.constexpr,
):  # fmt: skip
    """One token of one head, BV columns of it, in float32."""
    pid = tl.program_id(0).to(tl.int64)
    vb, bh = (pid % VB).to(tl.int32), pid // VB
    rows = tl.arange(0, BK)
    cols = vb * BV + tl.arange(0, BV)
    kt = tl.load(k + bh * K + rows, mask=rows < K, other=0.0).to(tl.float32)
    qt = tl.load(q + bh * K + rows, mask=rows < K, other=0.0).to(tl.float32)
    vt = tl.load(v + bh * V + cols, mask=cols < V, other=0.0).to(tl.float32)
    if NORM_K:
        kt *= tl.rsqrt(tl.sum(kt * kt, 0) + pieces.NORM_EPS)
    if NORM_Q:
        qt *= tl.rsqrt(tl.sum(qt * qt, 0) + pieces.NORM_EPS)
    strength = tl.load(beta + bh).to(tl.float32)
    decay = tl.exp(tl.load(g + bh).to(tl.float32))
    S = pieces.load_rows(state + bh * K * V, rows, cols, V, K, V)
    decayed = S * decay
    if RAW:
        recalled = tl.sum(kt[:, None] * S, 0)
    else:
        recalled = tl.sum(kt[:, None] * decayed, 0)
    S = decayed + kt[:, None] * (strength * (vt - recalled))[None, :]
    pieces.store_rows(next_state + bh * K * V, S, rows, cols, V, K, V)
    o = scale * tl.sum(qt[:, None] * S, 0)
    tl.store(out + bh * V + cols, o.to(out.dtype.element_ty), mask=cols < V)
