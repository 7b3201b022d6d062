"""The Triton kernels of the delta rule that write, read and take one token. See kernels.py for the algebra and the letters."""

import triton
import triton.language as tl

import kernels_pieces as pieces

BUILT_FROM = pieces.REVISION
SIZES = ["T", "N", "R", "NB"]  # one compiled kernel serves all of them


@triton.jit(do_not_specialize=SIZES)
def size(
    x, start, states, sizes,
    T, H, N, K, V,
    C: tl.constexpr, BV: tl.constexpr, HAS_X: tl.constexpr, HAS_START: tl.constexpr,
):  # fmt: skip
    """The largest magnitude of every chunk of x [B, T, H, V] and of states [B, N, H, K, V] and, with the first chunk, of `start`
    [B, H, K, V]. HAS_X: x and states are there.
    """
    pid = tl.program_id(0).to(tl.int64)
    n, bh = pid % N, pid // N
    largest = 0.0
    if HAS_X:
        largest = pieces.amax_of_chunk(x, pid, T, H, N, V, C, BV)
        chunk = (bh // H * N + n) * H + bh % H
        largest = tl.maximum(largest, pieces.amax_of_state(states + chunk * K * V, K, V, C, BV))
    if HAS_START:
        if n == 0:
            largest = tl.maximum(largest, pieces.amax_of_state(start + bh * K * V, K, V, C, BV))
    tl.store(sizes + pid, largest)


# ------------------------------------------------------------------------------------------------ forward


@triton.jit
def _transposed(x):
    return tl.permute(x, (0, 2, 1))


@triton.jit
def _quarters(x):
    """[[a, .], [b, d]] of every block of x [P, 2 S, 2 S]: b [P, S, S], and a and d in turn as [2 P, S, S]."""
    P: tl.constexpr = x.shape[0]
    S: tl.constexpr = x.shape[1] // 2
    x = tl.reshape(x, [P, 2, S, 2, S])
    left, _ = tl.split(tl.permute(x, (0, 1, 2, 4, 3)))
    _, b = tl.split(tl.permute(left, (0, 2, 3, 1)))
    two = tl.arange(0, 2)
    same = two[None, :, None, None, None] == two[None, None, None, :, None]
    bits = tl.xor_sum(tl.where(same, x.to(tl.int32, bitcast=True), 0), 3)  # of one value: no instruction is left of it
    return b, tl.reshape(bits.to(tl.float32, bitcast=True), [2 * P, S, S])


@triton.jit
def _join(x, b, UPPER: tl.constexpr):
    """[[a, 0], [b, d]], or [[a, b], [0, d]] if UPPER, of blocks b [P, S, S], and a and d in turn in x [2 P, S, S].

    Not by tl.join: Triton has the products that follow take their operands in another order then, from other threads.
    """
    P: tl.constexpr = b.shape[0]
    S: tl.constexpr = b.shape[1]
    two = tl.arange(0, 2)
    row, column = two[None, :, None, None, None], two[None, None, None, :, None]
    x = tl.broadcast_to(tl.reshape(x, [P, 2, S, 1, S]), [P, 2, S, 2, S])
    b = tl.broadcast_to(tl.reshape(b, [P, 1, S, 1, S]), [P, 2, S, 2, S])
    beside = row < column if UPPER else row > column
    return tl.reshape(tl.where(row == column, x, tl.where(beside, b, 0.0)), [P, 2 * S, 2 * S])


@triton.jit
def _halves(x):
    """The even and the odd ones of blocks [2 P, S, S], each [P, S, S]."""
    pairs = tl.reshape(x, [x.shape[0] // 2, 2, x.shape[1], x.shape[2]])
    return tl.split(tl.permute(pairs, (0, 2, 3, 1)))


@triton.jit
def _double(X, XT, B, OP: tl.constexpr, PREC: tl.constexpr, BOTH: tl.constexpr):
    """From the inverses of blocks, X and transposed XT [2 P, S, S], those of blocks of twice the size; B [P, S, S] is -L below
    them. The transposed ones only if BOTH."""
    _, D = _halves(X.to(OP))
    AT, _ = _halves(XT.to(OP))
    BAT = tl.dot(AT, _transposed(B.to(OP)), input_precision=PREC).to(OP)
    X = _join(X, tl.dot(D, _transposed(BAT), input_precision=PREC), False)
    if BOTH:
        XT = _join(XT, tl.dot(BAT, _transposed(D), input_precision=PREC), True)
    return X, XT


@triton.jit
def _to_middle(column, row, late, P: tl.constexpr, S: tl.constexpr):
    column, row = tl.reshape(column, [P, 2, S]), tl.reshape(row, [P, 2, S])
    last = (tl.arange(0, S) == S - 1)[None, None, :] & (late == 0)
    middle = tl.sum(tl.sum(tl.where(last, column, 0.0), 2), 1)[:, None, None]
    return tl.where(late, row - middle, middle - column)


@triton.jit
def _factors(coarse, row_coarse, rest, row_rest, strength, norm, P: tl.constexpr, S: tl.constexpr, TWO: tl.constexpr):
    """What L has beside k k^T between the tokens of every odd stretch of S and those of the stretch before, as two factors
    [P, S], by row and by column: decays up to the end of the one stretch, and from there. No exp for every pair of tokens."""
    late = (tl.arange(0, 2) == 1)[None, :, None]
    gap = _to_middle(coarse, row_coarse, late, P, S)
    if TWO:
        gap += _to_middle(rest, row_rest, late, P, S)
    factor = tl.exp(gap) * tl.where(late, tl.reshape(strength, [P, 2, S]), tl.reshape(norm, [P, 2, S]))
    column, row = tl.split(tl.permute(factor, (0, 2, 1)))
    return row, column


@triton.jit
def _sums(g, first, i, H, left):
    """log-decays of one chunk, each in two parts, and their running sums: own_coarse, own_rest, coarse, rest.

    Differences of running sums lose digits when one gate is shut (g = -50 or -inf). Multiples of 1/16 add up exactly, so the
    coarse parts cancel without rounding. The clamp changes nothing: e^-128 is zero in float32.
    """
    own = tl.maximum(tl.load(g + first + i * H, mask=i < left, other=0.0).to(tl.float32), -128.0)
    own_coarse = tl.floor(own * 16.0 + 0.5) * 0.0625
    own_rest = own - own_coarse
    return own_coarse, own_rest, tl.cumsum(own_coarse, 0), tl.cumsum(own_rest, 0)


@triton.jit(do_not_specialize=SIZES)
def intra(
    k, v, beta, g, start, inverse, gates, sizes,
    T, H, N, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VB: tl.constexpr, HAS_START: tl.constexpr,
    OP: tl.constexpr, PREC: tl.constexpr, RAW: tl.constexpr, NORM_K: tl.constexpr,
):  # fmt: skip
    """What of one chunk needs neither queries nor state: the decays, X = (I + L)^-1, and the largest magnitude in v, whose
    tiles are loaded in between: while one is on its way there is work to do, and registers hold one at a time.

    X by halves: the inverse of [[A, 0], [B, D]] is [[A', 0], [-D' B A', D']]. Stable where keys are nearly parallel, which a
    product of powers of L is not. Up to blocks of 16 tokens on the C / 16 diagonal blocks alone, all at once.

    For one warp, whose products are mma.sync. X is kept both ways, as X and XT: every product is then that of a sum and the
    transpose of another one, which lie in the registers of a thread as it takes its operands. Nothing goes through shared
    memory, where products wait for each other: 2,100 instructions a chunk, by four warps with it about 7,000.
    """
    TWO: tl.constexpr = OP == tl.float32
    G: tl.constexpr = C // 16
    pid = tl.program_id(0).to(tl.int64)
    n, bh = pid % N, pid // N
    b, h = bh // H, bh % H
    chunk = (b * N + n) * H + h
    first = (b * T + n * C) * H + h  # of [B, T, H]
    left = tl.minimum(T - n * C, C).to(tl.int32)
    i = tl.arange(0, C)
    strength = tl.load(beta + first + i * H, mask=i < left, other=0.0).to(tl.float32)
    PART: tl.constexpr = min(BK, 64)  # columns of keys at a time, lest registers overflow
    L = tl.zeros([C, C], tl.float32)
    norm = tl.zeros([C], tl.float32)
    for part in tl.static_range(BK // PART):
        kt = pieces.load_rows(k + first * K, i, part * PART + tl.arange(0, PART), H * K, left, K)
        if part == 0:
            values = pieces.load_rows(v + first * V, i, tl.arange(0, BV), H * V, left, V)
        L = tl.dot(kt, tl.trans(kt), L, input_precision=PREC)
        if NORM_K:
            norm += tl.sum(kt.to(tl.float32) * kt.to(tl.float32), 1)
    if NORM_K:
        norm = tl.rsqrt(norm + pieces.NORM_EPS)
    else:
        norm += 1.0
    own_coarse, own_rest, coarse, rest = _sums(g, first, i, H, left)
    last_coarse, last_rest = tl.sum(own_coarse, 0), tl.sum(own_rest, 0)
    row_coarse, row_rest = coarse, rest
    if RAW:
        row_coarse, row_rest = coarse - own_coarse, rest - own_rest
    base = gates + chunk * 7 * C + i
    tl.store(base, tl.exp(coarse + rest))
    tl.store(base + C, strength * tl.exp(row_coarse + row_rest) * norm)
    tl.store(base + 2 * C, tl.exp((last_coarse - coarse) + (last_rest - rest)) * norm)
    tl.store(base + 3 * C, strength)
    if not TWO:
        coarse += rest
        row_coarse += row_rest
    tl.store(base + 4 * C, coarse)
    tl.store(base + 5 * C, rest)
    tl.store(base + 6 * C, norm)

    largest = pieces.amax(values)
    if VB > 1:
        values = pieces.load_rows(v + first * V, i, BV + tl.arange(0, BV), H * V, left, V)

    # -L: its blocks of 16 on the diagonal, and what lies below them. Above the diagonal is what is never used.
    strength *= -norm
    L = tl.reshape(L, [1, C, C])
    B16, B32 = L, L
    if C == 64:
        B32, L = _quarters(L)
        row, column = _factors(coarse, row_coarse, rest, row_rest, strength, norm, 1, 32, TWO)
        B32 *= row[:, :, None] * column[:, None, :]
    if C >= 32:
        B16, L = _quarters(L)
        row, column = _factors(coarse, row_coarse, rest, row_rest, strength, norm, C // 32, 16, TWO)
        B16 *= row[:, :, None] * column[:, None, :]
    gap = tl.reshape(row_coarse, [G, 16])[:, :, None] - tl.reshape(coarse, [G, 16])[:, None, :]
    if TWO:
        gap += tl.reshape(row_rest, [G, 16])[:, :, None] - tl.reshape(rest, [G, 16])[:, None, :]
    L *= tl.exp(tl.minimum(gap, 80.0)) * tl.reshape(strength, [G, 16])[:, :, None]
    if NORM_K:
        L *= tl.reshape(norm, [G, 16])[:, None, :]
    a = tl.arange(0, 16)
    row, column = a[None, :, None], a[None, None, :]
    X = tl.where(row == column, 1.0, tl.where((row >> 1 == column >> 1) & (row > column), L, 0.0))
    eye = tl.where(row == column, X, 0.0)  # taken from X so that it lies as X does
    XT = tl.dot(eye.to(OP), _transposed(X.to(OP)), input_precision=PREC)
    for level in tl.static_range(1, 4):
        corner = (row >> (level + 1) == column >> (level + 1)) & (row >> level > column >> level)
        B = tl.where(corner, L, 0.0).to(OP)
        X16, XT16 = X.to(OP), XT.to(OP)
        BXT = tl.dot(XT16, _transposed(B), input_precision=PREC).to(OP)
        X = tl.dot(X16, _transposed(BXT), X, input_precision=PREC)
        XT = tl.dot(BXT, _transposed(X16), XT, input_precision=PREC)
    if VB > 1:
        largest = tl.maximum(largest, pieces.amax(values))
    for vb in tl.static_range(2, VB):
        values = pieces.load_rows(v + first * V, i, vb * BV + tl.arange(0, BV), H * V, left, V)
        largest = tl.maximum(largest, pieces.amax(values))
    if C >= 32:
        X, XT = _double(X, XT, B16, OP, PREC, C > 32)
    if C == 64:
        X, XT = _double(X, XT, B32, OP, PREC, False)
    square = i[:, None] * C + i[None, :]
    tl.store(inverse + chunk * C * C + square, tl.reshape(X, [C, C]).to(OP))
    if HAS_START:
        if n == 0:
            largest = tl.maximum(largest, pieces.amax_of_state(start + bh * K * V, K, V, C, BV))
    tl.store(sizes + pid, largest)


@triton.jit(do_not_specialize=SIZES)
def summarise(
    k, v, gates, inverse, sizes, maps, deltas, wholes,
    T, N, R, NB,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
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
    end = tl.minimum(block * R + R, N)
    # Nothing follows the last block but its map, backwards.
    end = tl.where((block == NB - 1) & (not of_map), block * R, end)
    # k a step ahead in registers: it is needed both ways, and in float16. Triton prefetches the rest.
    first = (b * T + block * R * C) * H + h
    next_k = pieces.load_rows(k + first * K, i, cols, H * K, pieces.tokens_left(block * R, end, T, C), K)
    for n in tl.range(block * R, end, num_stages=STAGES):
        first = (b * T + n * C) * H + h
        left = tl.minimum(T - n * C, C).to(tl.int32)
        chunk = (b * N + n) * H + h
        k16 = next_k.to(OP)
        recalled = tl.dot(k16, S.to(OP), input_precision=PREC)
        next_k = pieces.load_rows(k + (first + C * H) * K, i, cols, H * K, pieces.tokens_left(n + 1, end, T, C), K)
        # Every tile is loaded where it is needed: Triton takes it from shared memory there, and registers are short.
        src = pieces.load_rows(tl.where(of_map, k, v) + first * width, i, out_cols, H * width, left, width)
        recall = pieces.vector(gates, chunk, 1, i, C)
        # What M holds is what w k would have left.
        share = tl.where(of_map, recall * total, pieces.vector(gates, chunk, 3, i, C))
        R_ = (share * f)[:, None] * src.to(tl.float32) - recall[:, None] * recalled
        X = tl.load(inverse + chunk * C * C + i[:, None] * C + i[None, :])
        new_v = tl.dot(X, R_.to(OP), input_precision=PREC)
        to_end, whole = pieces.vector(gates, chunk, 2, i, C), tl.load(gates + chunk * 7 * C + C - 1)
        S = tl.dot(tl.trans(k16), (to_end[:, None] * new_v).to(OP), S * whole, input_precision=PREC)
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
    scale, T, N, R, NB,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
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
    end = tl.minimum(block * R + R, N)
    # k a step ahead in registers: it is needed both ways, and in float16. Triton prefetches the rest.
    first = (b * T + block * R * C) * H + h
    left = pieces.tokens_left(block * R, end, T, C)
    next_k = pieces.load_rows(k + first * K, i, cols, H * K, left, K)
    for n in tl.range(block * R, end, num_stages=STAGES):
        first = (b * T + n * C) * H + h
        left = tl.minimum(T - n * C, C).to(tl.int32)
        chunk = (b * N + n) * H + h
        later, later_left = first + C * H, pieces.tokens_left(n + 1, end, T, C)
        k16 = next_k.to(OP)
        k_t = tl.trans(k16)
        # Every tile is loaded where it is needed: Triton takes it from shared memory there, and registers are short.
        S16 = S.to(OP)
        if SAVE:
            pieces.store_rows(states + chunk * K * V, S16, cols, out_cols, V, K, V)
        recalled = tl.dot(k16, S16, input_precision=PREC)
        next_k = pieces.load_rows(k + later * K, i, cols, H * K, later_left, K)
        values = pieces.load_rows(v + first * V, i, out_cols, H * V, left, V)
        recall, strength = pieces.vector(gates, chunk, 1, i, C), pieces.vector(gates, chunk, 3, i, C)
        R_ = (strength * f)[:, None] * values.to(tl.float32) - recall[:, None] * recalled
        X = tl.load(inverse + chunk * C * C + i[:, None] * C + i[None, :])
        new_v = tl.dot(X, R_.to(OP), input_precision=PREC)
        new_v16 = new_v.to(OP)
        if KEEP:
            pieces.store_rows(new_values + first * V, new_v16, i, out_cols, H * V, left, V)
        to_end, whole = pieces.vector(gates, chunk, 2, i, C), tl.load(gates + chunk * 7 * C + C - 1)
        S = tl.dot(k_t, (to_end[:, None] * new_v).to(OP), S * whole, input_precision=PREC)
        if READ:  # after S is on its way: registers would not hold both
            qt = pieces.load_rows(q + first * K, i, cols, H * K, left, K)
            norm_q = pieces.inverse_norm(qt, NORM_Q)
            from_start = pieces.vector(gates, chunk, 0, i, C)
            coarse, rest = pieces.vector(gates, chunk, 4, i, C), pieces.vector(gates, chunk, 5, i, C)
            norm = pieces.vector(gates, chunk, 6, i, C)
            q16 = qt.to(OP)
            P = pieces.scores(q16, k_t, coarse, rest, norm, norm_q, i, OP, PREC, NORM_K)
            o = tl.dot(q16, S16, input_precision=PREC) * (from_start * norm_q)[:, None]
            o = tl.dot(P, new_v16, o, input_precision=PREC)
            pieces.store_rows(out + first * V, o * (scale / f), i, out_cols, H * V, left, V)
    if block == NB - 1:
        pieces.store_rows(last + bh * K * V, S * (1.0 / f), cols, out_cols, V, K, V)
        if SAVE:
            tl.store(scales + bh, f)


@triton.jit(do_not_specialize=SIZES)
def read(
    q, k, gates, states, scales, new_values, out,
    scale, T, H, N,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VB: tl.constexpr,
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
    # All that is needed is on its way before anything waits.
    qt = pieces.load_rows(q + first * K, i, cols, H * K, left, K)
    kt = pieces.load_rows(k + first * K, i, cols, H * K, left, K)
    vectors = pieces.vectors(gates, chunk, i, C)
    S16 = pieces.load_rows(states + chunk * K * V, cols, out_cols, V, K, V)
    new_v = pieces.load_rows(new_values + first * V, i, out_cols, H * V, left, V)
    tl.debug_barrier()  # scalars later, lest ptxas put them aside, which is a wait
    f = tl.load(scales + bh)
    qt, kt = pieces.hold(qt), pieces.hold(kt)
    from_start, _, _, _, coarse, rest, norm = pieces.split_vectors(pieces.hold(vectors))
    norm_q = pieces.inverse_norm(qt, NORM_Q)
    q16 = qt.to(OP)
    P = pieces.scores(q16, tl.trans(kt.to(OP)), coarse, rest, norm, norm_q, i, OP, PREC, NORM_K)
    S16, new_v = pieces.hold(S16), pieces.hold(new_v)
    o = tl.dot(q16, S16, input_precision=PREC) * (from_start * norm_q)[:, None]
    o = tl.dot(P, new_v, o, input_precision=PREC)
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
