"""The Triton kernels of the delta rule that compute gradients. See kernels.py for the letters.

With d_new_v = P^T d_out + k_end dS' (dS' the gradient of the state that the chunk leaves) and gR = X^T d_new_v, the gradient
of beta (v - e^gc k S):

    dS = e^gc_last dS' + scale (e^gc q)^T d_out - (beta e^gc k)^T gR
    dv = beta gR           gL = -tril(gR new_v^T, -1)           dP = tril(d_out new_v^T)

and the rest of a chunk's gradients are products of these. `walk_back` summarises blocks and walks them again, as the forward
does; `gradients` then takes every chunk by itself. Between the two gR lies where dv will be.

No product has the transpose of another product as its left operand: Triton 3.4 to 3.7.0 miscompile that on Hopper. Where one is
needed, the whole product is formed transposed.
"""

import triton
import triton.language as tl

import kernels_pieces as pieces

BUILT_FROM = pieces.REVISION
SIZES = ["T", "N", "R", "NB", "first_head"]  # one compiled kernel serves all of them


@triton.jit(do_not_specialize=SIZES)
def walk_back(
    q, k, gates, inverse, sizes, d_out, d_new_values, d_states, exits, starts, wholes, d_ends, d_scales, gR_out,
    read_scales,
    scale, first_head, T, N, R, NB,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VB: tl.constexpr,
    SUMMARY: tl.constexpr, HAS_EXIT: tl.constexpr, FIRST: tl.constexpr, READ: tl.constexpr, LATER: tl.constexpr,
    STAGES: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr, NORM_Q: tl.constexpr,
):  # fmt: skip
    """One block, from its last chunk to its first, BV columns of it.

    SUMMARY: what reaches the state on entry of the block when nothing reaches that on its exit goes to `exits`.
    Otherwise `exits` holds the gradient of the state on exit of the block, if any reaches it. Written are gR, where
    `read_gradients` left P^T d_out, and for each chunk the gradient of the state that it leaves, both 16 bit times `d_scales`;
    where there is one block, the gradient of the first state goes to `starts`.
    """
    AHEAD: tl.constexpr = BK <= 64  # else registers are short
    pid = tl.program_id(0).to(tl.int64)
    vb = (pid % VB).to(tl.int32)
    block, bh_ = pid // VB % NB, pid // VB // NB
    bh = bh_ + first_head
    b, h = bh // H, bh % H
    i = tl.arange(0, C)
    cols = tl.arange(0, BK)
    out_cols = vb * BV + tl.arange(0, BV)
    entry = (b * NB + block) * H + h
    size = 0.0
    dS = tl.zeros([BK, BV], tl.float32)
    if HAS_EXIT and not SUMMARY:  # one scale for all columns: the programs of one block all look at all of them
        for other in tl.static_range(VB):
            dS = pieces.load_rows(exits + entry * K * V, cols, other * BV + tl.arange(0, BV), V, K, V)
            size = tl.maximum(size, pieces.amax(dS))
        if VB > 1:
            dS = pieces.load_rows(exits + entry * K * V, cols, out_cols, V, K, V)
    total = 1.0
    end = tl.minimum(block * R + R, N)
    if SUMMARY and not FIRST:  # nothing asks what reaches the first state
        end = tl.where(block == 0, 0, end)
    f = pieces.fit_gradients(sizes + bh * N, block * R, end, size, OP)  # what dS is multiplied by
    dS *= f
    # k a step ahead in registers: it is needed both ways, and in float16. Triton prefetches the rest.
    first = (b * T + (end - 1) * C) * H + h
    left = tl.where(end > block * R, tl.minimum(T - (end - 1) * C, C), 0).to(tl.int32)
    if AHEAD:
        next_k = pieces.load_rows(k + first * K, i, cols, H * K, left, K)
    for step in tl.range(block * R, end, num_stages=STAGES):
        n = end - 1 - (step - block * R)
        first = (b * T + n * C) * H + h
        left = tl.minimum(T - n * C, C).to(tl.int32)
        chunk = (b * N + n) * H + h
        earlier, earlier_left = first - C * H, tl.where(n > block * R, C, 0)
        if AHEAD:
            kt = next_k
            k_t = tl.trans(kt)
        else:
            kt = pieces.load_rows(k + first * K, i, cols, H * K, left, K)
        dS16 = dS.to(OP)
        if not SUMMARY:
            pieces.store_rows(d_ends + (bh_ * N + n) * K * V, dS16, cols, out_cols, V, K, V)
        # Every tile is loaded where it is needed: Triton takes it from shared memory there, and registers are short.
        to_end = pieces.vector(gates, chunk, 2, i, C)
        d_new_v = tl.dot(kt.to(OP), dS16, input_precision=PREC) * to_end[:, None]
        if AHEAD:
            next_k = pieces.load_rows(k + earlier * K, i, cols, H * K, earlier_left, K)
        if READ:
            read_v = pieces.load_rows(gR_out + first * V, i, out_cols, H * V, left, V)
            d_new_v += read_v.to(tl.float32) * (f / tl.load(read_scales + bh * N + n))
        if LATER:
            later = pieces.load_rows(d_new_values + first * V, i, out_cols, H * V, left, V)
            d_new_v += later.to(tl.float32) * f
        Xt = tl.load(inverse + chunk * C * C + i[:, None] + i[None, :] * C)
        gR = tl.dot(Xt, d_new_v.to(OP), input_precision=PREC)
        if not SUMMARY:
            pieces.store_rows(gR_out + first * V, gR, i, out_cols, H * V, left, V)
        recall = pieces.vector(gates, chunk, 1, i, C)
        whole = tl.load(gates + chunk * 7 * C + C - 1)
        if not AHEAD:
            k_t = pieces.load_columns(k + first * K, cols, i, H * K, left, K)
        dS = tl.dot(k_t.to(OP), (-recall[:, None] * gR).to(OP), dS * whole, input_precision=PREC)
        if READ:
            q_t = pieces.load_columns(q + first * K, cols, i, H * K, left, K)
            do = pieces.load_rows(d_out + first * V, i, out_cols, H * V, left, V)
            from_start = pieces.vector(gates, chunk, 0, i, C) * pieces.inverse_norm_of_columns(q_t, NORM_Q)
            aged = (from_start * (scale * f))[:, None] * do.to(tl.float32)
            dS = tl.dot(q_t.to(OP), aged.to(OP), dS, input_precision=PREC)
        if LATER:
            dS += pieces.load_rows(d_states + chunk * K * V, cols, out_cols, V, K, V) * f
        total *= whole
    dS *= 1.0 / f
    if SUMMARY:
        pieces.store_rows(exits + entry * K * V, dS, cols, out_cols, V, K, V)
        if vb == 0:
            tl.store(wholes + entry, total)
    else:
        if FIRST and NB == 1:
            pieces.store_rows(starts + entry * K * V, dS, cols, out_cols, V, K, V)
        if vb == 0:
            tl.store(d_scales + bh_ * NB + block, f)


@triton.jit(do_not_specialize=SIZES)
def read_gradients(
    q, k, v, gates, inverse, states, scales, sizes, d_out, dq, dk_out, dg_out, d_new_values, d_scales_out,
    scale, T, H, N,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VB: tl.constexpr,
    HAS_SIZES: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr, NORM_Q: tl.constexpr, NORM_K: tl.constexpr,
):  # fmt: skip
    """What one chunk's own read sends back: dq, its share of dk and dg, and P^T d_out, dk's share and the last times powers
    of two: `d_scales_out`, of each chunk its own. `sizes` takes the largest of every chunk.

    dP is formed transposed, as new_v d_out^T, and so is dq: computed tiles are then left operands, which come from registers,
    but for one. Only the right ones have to pass through shared memory.
    """
    TWO: tl.constexpr = OP == tl.float32
    pid = tl.program_id(0).to(tl.int64)
    n, bh = pid % N, pid // N
    b, h = bh // H, bh % H
    i = tl.arange(0, C)
    cols = tl.arange(0, BK)
    first = (b * T + n * C) * H + h
    left = tl.minimum(T - n * C, C).to(tl.int32)
    chunk = (b * N + n) * H + h
    # All that is needed is on its way before anything waits.
    kt = pieces.load_rows(k + first * K, i, cols, H * K, left, K)
    qt = pieces.load_rows(q + first * K, i, cols, H * K, left, K)
    vectors = pieces.vectors(gates, chunk, i, C)
    values = pieces.load_rows(v + first * V, i, tl.arange(0, BV), H * V, left, V)
    do = pieces.load_rows(d_out + first * V, i, tl.arange(0, BV), H * V, left, V)
    tl.debug_barrier()  # scalars later, lest ptxas put them aside, which is a wait
    f = tl.load(scales + bh)
    if HAS_SIZES:
        other_size = tl.load(sizes + pid)
    S16 = pieces.load_rows(states + chunk * K * V, cols, tl.arange(0, BV), V, K, V)
    X = tl.load(inverse + chunk * C * C + i[:, None] * C + i[None, :])
    kt, qt = pieces.hold(kt), pieces.hold(qt)
    k16, q16 = kt.to(OP), qt.to(OP)
    _, recall, _, strength, coarse, rest, norm = pieces.split_vectors(pieces.hold(vectors))
    norm_q = pieces.inverse_norm(qt, NORM_Q)
    Pt = pieces.scores_t(k16, tl.trans(q16), coarse, rest, norm, norm_q, i, OP, PREC, NORM_K)
    do, X = pieces.hold(do), pieces.hold(X)
    size = pieces.amax(do)
    for vb in tl.static_range(1, VB):
        size = tl.maximum(
            size, pieces.amax(pieces.load_rows(d_out + first * V, i, vb * BV + tl.arange(0, BV), H * V, left, V))
        )
    size *= tl.abs(scale)
    if not NORM_Q:  # the state gets q^T d_out
        size *= tl.maximum(pieces.amax(qt), 1.0)
    fd = pieces.tight(size, OP)
    tl.store(d_scales_out + pid, fd)
    tl.store(sizes + pid, tl.maximum(size, other_size) if HAS_SIZES else size)
    dPt = tl.zeros([C, C], tl.float32)
    dq_t = tl.zeros([BK, C], tl.float32)
    for vb in tl.static_range(VB):
        out_cols = vb * BV + tl.arange(0, BV)
        if vb > 0:
            do = pieces.load_rows(d_out + first * V, i, out_cols, H * V, left, V)
            values = pieces.load_rows(v + first * V, i, out_cols, H * V, left, V)
            S16 = pieces.load_rows(states + chunk * K * V, cols, out_cols, V, K, V)
            do = pieces.hold(do)
        do16 = (do.to(tl.float32) * (scale * fd)).to(OP)
        d_new_v = tl.dot(Pt, do16, input_precision=PREC)
        pieces.store_rows(d_new_values + first * V, d_new_v, i, out_cols, H * V, left, V)
        new_v = pieces.new_values(k16, S16, X, values, strength * f, recall, OP, PREC)
        dPt = tl.dot(new_v, tl.trans(do16), dPt, input_precision=PREC)
        dq_t = tl.dot(S16, tl.trans(do16), dq_t, input_precision=PREC)
    # In units of `both`; products with dP 16 times smaller, lest they leave the range of float16.
    both = 1.0 / (f * fd)
    tl.debug_barrier()  # keeps what comes next from being computed above, where registers are short
    from_start, _, _, _, coarse, rest, norm = pieces.split_vectors(pieces.hold(vectors))
    dPt *= pieces.decays(-coarse, -rest, -coarse, -rest, i[:, None] <= i[None, :], TWO, 4)
    dPt_k, dPt_q = dPt, dPt
    if NORM_K:
        dPt_k = dPt * norm[:, None]
    if NORM_Q:
        dPt_q = dPt * norm_q[None, :]
    dq_t *= (from_start * 0.0625)[None, :]
    dPt_k = dPt_k.to(OP)
    dq_t = tl.dot(tl.trans(k16), dPt_k, dq_t, input_precision=PREC)
    if not TWO:
        d_k = pieces.key_sums(dPt_k, k16, q16, norm_q, PREC, NORM_Q)
    # For the last sums, behind the product that they take and before the other: Triton then takes them, and dq, in this order.
    qt = pieces.load_rows(q + first * K, i, cols, H * K, left, K)
    share = tl.dot(dPt_q.to(OP), q16, input_precision=PREC)
    if (
        TWO
    ):  # products in three parts of TF32 are biased alike in dq and here, which cancels: `key_sums` is four times worse
        d_k = tl.sum(k16 * share, 1) * norm
    pieces.store_rows(dk_out + first * K, share, i, cols, H * K, left, K)
    dq_ = tl.trans(dq_t) * (16.0 * both)
    q32 = qt.to(tl.float32)
    if NORM_Q:
        q32 *= norm_q[:, None]
    d_sum = tl.sum(q32 * dq_, 1)
    tl.store(dg_out + pid * 3 * C + i, d_sum - d_k * (16.0 * both))
    if NORM_Q:
        dq_ = (dq_ - q32 * d_sum[:, None]) * norm_q[:, None]
    pieces.store_rows(dq + first * K, dq_, i, cols, H * K, left, K)


@triton.jit
def _value_gradients(dv, gR, values, factor, rows, cols, stride, n_rows, n_cols):
    """Store dv and return the share of d_beta that goes through the values, to be divided by the scale of gR."""
    gR = gR.to(tl.float32)
    pieces.store_rows(dv, gR * factor[:, None], rows, cols, stride, n_rows, n_cols)
    return tl.sum(gR * values.to(tl.float32), 1)


@triton.jit(do_not_specialize=SIZES)
def gradients(
    k, v, g, gates, inverse, states, scales, d_ends, d_scales, dk_in, dg_in, gR_in, read_scales,
    dk, dv, d_beta, dg,
    first_head, T, H, N, R, NB,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VB: tl.constexpr,
    READ: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr, RAW: tl.constexpr, NORM_K: tl.constexpr,
):  # fmt: skip
    """Gradients of k, v, beta and g of one chunk, from the states on both its ends and gR.

    dv takes the place of gR, and dk that of the share that `read_gradients` found. gL is formed twice, once transposed: that
    is cheaper than its way from one kind of operand to another through shared memory. Keys up to 64 wide: where
    one tile takes all of V, a program waits for memory once, at the start, and keeps what it needs again in registers or shared
    memory. Barriers keep ptxas from drawing work up to where registers are short.
    """
    TWO: tl.constexpr = OP == tl.float32
    pid = tl.program_id(0).to(tl.int64)
    n, bh_ = pid % N, pid // N
    bh = bh_ + first_head
    b, h = bh // H, bh % H
    i = tl.arange(0, C)
    cols = tl.arange(0, BK)
    first = (b * T + n * C) * H + h
    left = tl.minimum(T - n * C, C).to(tl.int32)
    chunk = (b * N + n) * H + h
    here = bh_ * N + n
    # All that is needed is on its way before anything waits.
    kt = pieces.load_rows(k + first * K, i, cols, H * K, left, K)
    S16 = pieces.load_rows(states + chunk * K * V, cols, tl.arange(0, BV), V, K, V)
    vectors = pieces.vectors(gates, chunk, i, C)
    values = pieces.load_rows(v + first * V, i, tl.arange(0, BV), H * V, left, V)
    gR = pieces.load_rows(gR_in + first * V, i, tl.arange(0, BV), H * V, left, V)
    tl.debug_barrier()
    f, fd = tl.load(scales + bh), tl.load(d_scales + bh_ * NB + n // R)
    X = tl.load(inverse + chunk * C * C + i[:, None] * C + i[None, :])
    kt, S16, X = pieces.hold(kt), pieces.hold(S16), pieces.hold(X)
    dS16 = pieces.load_rows(d_ends + here * K * V, cols, tl.arange(0, BV), V, K, V)
    k16 = kt.to(OP)
    _, recall, _, strength, _, _, _ = pieces.split_vectors(pieces.hold(vectors))
    # In units of `both`; products with [C, C] gradients 16 times smaller, lest they leave the range of float16.
    both = 1.0 / (f * fd)
    gLt = tl.zeros([C, C], tl.float32)
    dk_end = tl.zeros([C, BK], tl.float32)
    gL = tl.zeros([C, C], tl.float32)
    d_whole = 0.0
    d_strength = tl.zeros([C], tl.float32)
    for vb in tl.static_range(VB):
        out_cols = vb * BV + tl.arange(0, BV)
        if vb > 0:
            values = pieces.load_rows(v + first * V, i, out_cols, H * V, left, V)
            gR = pieces.load_rows(gR_in + first * V, i, out_cols, H * V, left, V)
            S16 = pieces.load_rows(states + chunk * K * V, cols, out_cols, V, K, V)
            dS16 = pieces.load_rows(d_ends + here * K * V, cols, out_cols, V, K, V)
            S16 = pieces.hold(S16)
        gR = pieces.hold(gR)
        if VB == 1:
            tl.debug_barrier()  # all of gR is read before dv is put in its place
            d_strength = _value_gradients(
                dv + first * V, gR, values, strength * (1.0 / fd), i, out_cols, H * V, left, V
            )
        new_v = pieces.new_values(k16, S16, X, values, strength * f, recall, OP, PREC)
        dS16 = pieces.hold(dS16)
        if OP == tl.float16:  # a product of which only the diagonal is wanted: less work than sums over float32 tiles
            square = tl.dot(S16, tl.trans(dS16), input_precision=PREC)
            d_whole += tl.sum(tl.where(cols[:, None] == cols[None, :], square, 0.0))
        else:
            d_whole += tl.sum(tl.sum(dS16.to(tl.float32) * S16.to(tl.float32), 1), 0)
        gLt = tl.dot(new_v, tl.trans(gR), gLt, input_precision=PREC)
        dk_end = tl.dot(new_v, tl.trans(dS16), dk_end, input_precision=PREC)
        gL = tl.dot(gR, tl.trans(new_v), gL, input_precision=PREC)
        if VB == 1:
            rows = tl.dot(gR, tl.trans(S16), input_precision=PREC)
    tl.debug_barrier()  # what comes later is on its way before the first half ends, but not before registers are free
    if READ:
        share = pieces.load_rows(dk_in + first * K, i, cols, H * K, left, K)
        d_read, read_scale = tl.load(dg_in + (bh * N + n) * 3 * C + i), tl.load(read_scales + bh * N + n)
    own = tl.load(g + first + i * H, mask=i < left, other=0.0).to(tl.float32)
    whole = tl.load(gates + chunk * 7 * C + C - 1)
    k32 = pieces.hold(kt).to(tl.float32)
    _, _, to_end, strength, coarse, rest, norm = pieces.split_vectors(pieces.hold(vectors))
    if NORM_K:
        k32 *= norm[:, None]
    to_end *= 0.0625 / norm
    to_last = tl.sum(k32 * dk_end, 1) * (to_end * (16.0 * both))
    dk_ = dk_end * to_end[:, None]
    row_coarse = coarse - tl.maximum(own, -128.0) if RAW else coarse
    # M = -gL e^(gc_i - gc_j); its sign is left to the factors of the products with it.
    Mt = gLt * pieces.decays(-row_coarse, -rest, -coarse, -rest, i[:, None] < i[None, :], TWO, 4)
    Mt *= (-strength * norm)[None, :]
    dk_ = tl.dot(Mt.to(OP), k16, dk_, input_precision=PREC)
    d_sum = tl.sum(k32 * dk_, 1) * (-16.0 * both)  # with to_last, which is taken off again below
    if READ:
        share = pieces.hold(share)
        dk_ += share.to(tl.float32) * (fd / read_scale)
        d_sum += d_read
    if VB > 1:
        rows = tl.zeros([C, BK], tl.float32)
        for vb in tl.static_range(VB):
            out_cols = vb * BV + tl.arange(0, BV)
            gR = pieces.load_rows(gR_in + first * V, i, out_cols, H * V, left, V)
            values = pieces.load_rows(v + first * V, i, out_cols, H * V, left, V)
            S16 = pieces.load_rows(states + chunk * K * V, cols, out_cols, V, K, V)
            tl.debug_barrier()
            d_strength += _value_gradients(
                dv + first * V, gR, values, strength * (1.0 / fd), i, out_cols, H * V, left, V
            )
            rows = tl.dot(gR, tl.trans(S16), rows, input_precision=PREC)
    tl.debug_barrier()  # keeps what comes next from being computed above, where registers are short
    M = gL * pieces.decays(coarse, rest, row_coarse, rest, i[:, None] > i[None, :], TWO, 4)
    if NORM_K:
        M *= norm[None, :]
    rows *= (tl.exp(row_coarse + rest if TWO else row_coarse) * 0.0625)[:, None]
    rows = tl.dot(M.to(OP), k16, rows, input_precision=PREC)
    d_row = tl.sum(k32 * rows, 1) * (-16.0 * both)
    d_strength = d_strength * (1.0 / fd) + d_row
    d_row *= strength
    d_sum += to_last + d_row
    dk_ = (dk_ - rows * strength[:, None]) * (16.0 * both)
    if NORM_K:
        dk_ = (dk_ - k32 * tl.sum(k32 * dk_, 1)[:, None]) * norm[:, None]
    pieces.store_rows(dk + first * K, dk_, i, cols, H * K, left, K)
    tl.store(d_beta + first + i * H, d_strength.to(d_beta.dtype.element_ty), mask=i < left)
    d_sum = tl.cumsum(d_sum, 0, reverse=True)
    if RAW:  # row i decays up to token i - 1 only
        d_sum -= d_row
    d_sum += tl.cumsum(to_last, 0) - to_last + d_whole * (whole * both)
    tl.store(dg + first + i * H, tl.where(own < -104.0, 0.0, d_sum).to(dg.dtype.element_ty), mask=i < left)


@triton.jit(do_not_specialize=SIZES)
def gradients_wide(
    k, v, g, gates, inverse, states, scales, d_ends, d_scales, dk_in, dg_in, gR_in, read_scales,
    dk, dv, d_beta, dg,
    first_head, T, H, N, R, NB,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VB: tl.constexpr,
    READ: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr, RAW: tl.constexpr, NORM_K: tl.constexpr,
):  # fmt: skip
    """`gradients` for keys wider than 64, of which registers hold less.

    The first half finds what depends on new_v row by row, the second what depends on gR; tiles are loaded again where they are
    needed again, and barriers and three vectors put aside in dg_in keep ptxas from drawing work up or putting it off.
    """
    TWO: tl.constexpr = OP == tl.float32
    pid = tl.program_id(0).to(tl.int64)
    n, bh_ = pid % N, pid // N
    bh = bh_ + first_head
    b, h = bh // H, bh % H
    i = tl.arange(0, C)
    cols = tl.arange(0, BK)
    first = (b * T + n * C) * H + h
    left = tl.minimum(T - n * C, C).to(tl.int32)
    chunk = (b * N + n) * H + h
    here = bh_ * N + n
    f, fd = tl.load(scales + bh), tl.load(d_scales + bh_ * NB + n // R)
    # In units of `both`; products with [C, C] gradients 16 times smaller, lest they leave the range of float16.
    both = 1.0 / (f * fd)
    k16 = pieces.load_rows(k + first * K, i, cols, H * K, left, K).to(OP)
    X = tl.load(inverse + chunk * C * C + i[:, None] * C + i[None, :])
    recall, strength = pieces.vector(gates, chunk, 1, i, C), pieces.vector(gates, chunk, 3, i, C)
    vectors = dg_in + (bh * N + n) * 3 * C + i
    gLt = tl.zeros([C, C], tl.float32)
    dk_end = tl.zeros([C, BK], tl.float32)
    gL = tl.zeros([C, C], tl.float32)
    d_whole = 0.0
    d_strength = tl.zeros([C], tl.float32)
    for vb in tl.static_range(VB):
        out_cols = vb * BV + tl.arange(0, BV)
        gR = pieces.load_rows(gR_in + first * V, i, out_cols, H * V, left, V)
        values = pieces.load_rows(v + first * V, i, out_cols, H * V, left, V)
        if VB == 1:
            tl.debug_barrier()  # all of gR is read before dv is put in its place
            d_strength = _value_gradients(
                dv + first * V, gR, values, strength * (1.0 / fd), i, out_cols, H * V, left, V
            )
            # At once: ptxas would put the sums off and keep two tiles in registers for them.
            tl.store(vectors + C, d_strength)
        S16 = pieces.load_rows(states + chunk * K * V, cols, out_cols, V, K, V)
        dS16 = pieces.load_rows(d_ends + here * K * V, cols, out_cols, V, K, V)
        d_whole += tl.sum(tl.sum(dS16.to(tl.float32) * S16.to(tl.float32), 1), 0)
        new_v = pieces.new_values(k16, S16, X, values, strength * f, recall, OP, PREC)
        gLt = tl.dot(new_v, tl.trans(gR), gLt, input_precision=PREC)
        dk_end = tl.dot(new_v, tl.trans(dS16), dk_end, input_precision=PREC)
        gL = tl.dot(gR, tl.trans(new_v), gL, input_precision=PREC)
    # Barriers keep what comes next from being computed above, where registers are short.
    tl.debug_barrier()
    k32 = pieces.load_rows(k + first * K, i, cols, H * K, left, K).to(tl.float32)
    to_end, norm = pieces.vector(gates, chunk, 2, i, C), pieces.vector(gates, chunk, 6, i, C)
    to_end *= 0.0625 / norm
    if NORM_K:
        k32 *= norm[:, None]
    tl.store(vectors + 2 * C, tl.sum(k32 * dk_end, 1) * (to_end * (16.0 * both)))
    dk_ = dk_end * to_end[:, None]
    tl.debug_barrier()
    own = tl.load(g + first + i * H, mask=i < left, other=0.0).to(tl.float32)
    coarse, rest = pieces.vector(gates, chunk, 4, i, C), pieces.vector(gates, chunk, 5, i, C)
    row_coarse = coarse - tl.maximum(own, -128.0) if RAW else coarse
    # M = -gL e^(gc_i - gc_j); its sign is left to the factors of the products with it.
    Mt = gLt * pieces.decays(-row_coarse, -rest, -coarse, -rest, i[:, None] < i[None, :], TWO, 4)
    strength, norm = pieces.vector(gates, chunk, 3, i, C), pieces.vector(gates, chunk, 6, i, C)
    Mt *= (-strength * norm)[None, :]
    dk_ = tl.dot(Mt.to(OP), k16, dk_, input_precision=PREC)
    tl.debug_barrier()
    k32 = pieces.load_rows(k + first * K, i, cols, H * K, left, K).to(tl.float32)
    if NORM_K:
        k32 *= norm[:, None]
    d_sum = tl.sum(k32 * dk_, 1) * (-16.0 * both)  # with to_last, which is taken off again below
    if READ:
        d_sum += tl.load(vectors)
    tl.debug_barrier()
    tl.store(vectors, d_sum)
    tl.debug_barrier()
    rows = tl.zeros([C, BK], tl.float32)
    for vb in tl.static_range(VB):
        if VB > 1:
            out_cols = vb * BV + tl.arange(0, BV)
            gR = pieces.load_rows(gR_in + first * V, i, out_cols, H * V, left, V)
            values = pieces.load_rows(v + first * V, i, out_cols, H * V, left, V)
            S16 = pieces.load_rows(states + chunk * K * V, cols, out_cols, V, K, V)
            tl.debug_barrier()
            d_strength += _value_gradients(
                dv + first * V, gR, values, strength * (1.0 / fd), i, out_cols, H * V, left, V
            )
        rows = tl.dot(gR, tl.trans(S16), rows, input_precision=PREC)
    tl.debug_barrier()
    coarse, rest = pieces.vector(gates, chunk, 4, i, C), pieces.vector(gates, chunk, 5, i, C)
    row_coarse = coarse - tl.maximum(own, -128.0) if RAW else coarse
    strength, norm = pieces.vector(gates, chunk, 3, i, C), pieces.vector(gates, chunk, 6, i, C)
    M = gL * pieces.decays(coarse, rest, row_coarse, rest, i[:, None] > i[None, :], TWO, 4)
    if NORM_K:
        M *= norm[None, :]
    rows *= (tl.exp(row_coarse + rest if TWO else row_coarse) * 0.0625)[:, None]
    rows = tl.dot(M.to(OP), k16, rows, input_precision=PREC)
    k32 = pieces.load_rows(k + first * K, i, cols, H * K, left, K).to(tl.float32)
    if NORM_K:
        k32 *= norm[:, None]
    d_row = tl.sum(k32 * rows, 1) * (-16.0 * both)
    own = tl.load(g + first + i * H, mask=i < left, other=0.0).to(tl.float32)
    if VB == 1:
        d_strength = tl.load(vectors + C)
    d_strength = d_strength * (1.0 / fd) + d_row
    d_row *= strength
    to_last = tl.load(vectors + 2 * C)
    d_sum = tl.load(vectors) + to_last + d_row
    dk_ -= rows * strength[:, None]
    if READ:
        tl.debug_barrier()
        share = pieces.load_rows(dk_in + first * K, i, cols, H * K, left, K)
        dk_ += share.to(tl.float32) * (fd / tl.load(read_scales + bh * N + n))
        tl.debug_barrier()  # before dk is put in its place
    dk_ *= 16.0 * both
    if NORM_K:
        dk_ = (dk_ - k32 * tl.sum(k32 * dk_, 1)[:, None]) * norm[:, None]
    pieces.store_rows(dk + first * K, dk_, i, cols, H * K, left, K)
    tl.store(d_beta + first + i * H, d_strength.to(d_beta.dtype.element_ty), mask=i < left)
    d_sum = tl.cumsum(d_sum, 0, reverse=True)
    if RAW:  # row i decays up to token i - 1 only
        d_sum -= d_row
    whole = tl.load(gates + chunk * 7 * C + C - 1)
    d_sum += tl.cumsum(to_last, 0) - to_last + d_whole * (whole * both)
    tl.store(dg + first + i * H, tl.where(own < -104.0, 0.0, d_sum).to(dg.dtype.element_ty), mask=i < left)


@triton.jit(do_not_specialize=SIZES)
def read_back(
    q, k, g, gates, states, scales, new_values, d_out, dq, dk, dg, d_new_values, d_states,
    scale, T, H, N,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VB: tl.constexpr,
    OP: tl.constexpr, PREC: tl.constexpr, NORM_Q: tl.constexpr, NORM_K: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk of a further read; d_new_values and d_states are what the write's backward takes over.

    Products as in `read_gradients`.
    """
    TWO: tl.constexpr = OP == tl.float32
    pid = tl.program_id(0).to(tl.int64)
    n, bh = pid % N, pid // N
    b, h = bh // H, bh % H
    i = tl.arange(0, C)
    cols = tl.arange(0, BK)
    first = (b * T + n * C) * H + h
    left = tl.minimum(T - n * C, C).to(tl.int32)
    chunk = (b * N + n) * H + h
    # All that is needed is on its way before anything waits.
    kt = pieces.load_rows(k + first * K, i, cols, H * K, left, K)
    qt = pieces.load_rows(q + first * K, i, cols, H * K, left, K)
    vectors = pieces.vectors(gates, chunk, i, C)
    do = pieces.load_rows(d_out + first * V, i, tl.arange(0, BV), H * V, left, V)
    tl.debug_barrier()  # scalars later, lest ptxas put them aside, which is a wait
    f = tl.load(scales + bh)
    new_v = pieces.load_rows(new_values + first * V, i, tl.arange(0, BV), H * V, left, V)
    S16 = pieces.load_rows(states + chunk * K * V, cols, tl.arange(0, BV), V, K, V)
    kt, qt = pieces.hold(kt), pieces.hold(qt)
    k16, q16 = kt.to(OP), qt.to(OP)
    from_start, _, _, _, coarse, rest, norm = pieces.split_vectors(pieces.hold(vectors))
    norm_q = pieces.inverse_norm(qt, NORM_Q)
    Pt = pieces.scores_t(k16, tl.trans(q16), coarse, rest, norm, norm_q, i, OP, PREC, NORM_K)
    size = pieces.amax(do)
    for vb in tl.static_range(1, VB):
        size = tl.maximum(
            size, pieces.amax(pieces.load_rows(d_out + first * V, i, vb * BV + tl.arange(0, BV), H * V, left, V))
        )
    fd = pieces.tight(size * tl.abs(scale), OP)
    both = 1.0 / (f * fd)
    dPt = tl.zeros([C, C], tl.float32)
    dq_t = tl.zeros([BK, C], tl.float32)
    for vb in tl.static_range(VB):
        out_cols = vb * BV + tl.arange(0, BV)
        new_v, S16 = pieces.hold(new_v), pieces.hold(S16)
        do = do.to(tl.float32) * (scale * fd)
        do16, aged = do.to(OP), ((from_start * norm_q)[:, None] * do).to(OP)
        dPt = tl.dot(new_v, tl.trans(do16), dPt, input_precision=PREC)
        dq_t = tl.dot(S16, tl.trans(do16), dq_t, input_precision=PREC)
        if vb + 1 < VB:
            next_cols = out_cols + BV
            do = pieces.load_rows(d_out + first * V, i, next_cols, H * V, left, V)
            new_v = pieces.load_rows(new_values + first * V, i, next_cols, H * V, left, V)
            S16 = pieces.load_rows(states + chunk * K * V, cols, next_cols, V, K, V)
        d_new_v = tl.dot(Pt, do16, input_precision=PREC) * (1.0 / fd)
        pieces.store_rows(d_new_values + first * V, d_new_v, i, out_cols, H * V, left, V)
        d_S = tl.dot(tl.trans(q16), aged, input_precision=PREC) * (1.0 / fd)
        pieces.store_rows(d_states + chunk * K * V, d_S, cols, out_cols, V, K, V)
    # Products with dP 16 times smaller, lest they leave the range of float16.
    tl.debug_barrier()  # keeps what comes next from being computed above, where registers are short
    own = tl.load(g + first + i * H, mask=i < left, other=0.0).to(tl.float32)
    from_start, _, _, _, coarse, rest, norm = pieces.split_vectors(pieces.hold(vectors))
    dPt *= pieces.decays(-coarse, -rest, -coarse, -rest, i[:, None] <= i[None, :], TWO, 4)
    dPt_k, dPt_q = dPt, dPt
    if NORM_K:
        dPt_k = dPt * norm[:, None]
    if NORM_Q:
        dPt_q = dPt * norm_q[None, :]
    dq_t *= (from_start * 0.0625)[None, :]
    dPt_k = dPt_k.to(OP)
    dq_t = tl.dot(tl.trans(k16), dPt_k, dq_t, input_precision=PREC)
    # For the last sums, behind the product that they take and before the other: Triton then takes them, and dq, in this order.
    qt = pieces.load_rows(q + first * K, i, cols, H * K, left, K)
    dk_ = tl.dot(dPt_q.to(OP), q16, input_precision=PREC) * (16.0 * both)
    k32 = kt.to(tl.float32)
    if NORM_K:
        k32 *= norm[:, None]
    d_k = tl.sum(k32 * dk_, 1)
    if NORM_K:
        dk_ = (dk_ - k32 * d_k[:, None]) * norm[:, None]
    if (NORM_Q or NORM_K) and not TWO:  # the two products took their own rounding of dP
        d_k = pieces.key_sums(dPt_k, k16, q16, norm_q, PREC, NORM_Q) * (16.0 * both)
    pieces.store_rows(dk + first * K, dk_, i, cols, H * K, left, K)
    dq_ = tl.trans(dq_t) * (16.0 * both)
    q32 = qt.to(tl.float32)
    if NORM_Q:
        q32 *= norm_q[:, None]
    d_q = tl.sum(q32 * dq_, 1)
    if NORM_Q:
        dq_ = (dq_ - q32 * d_q[:, None]) * norm_q[:, None]
    pieces.store_rows(dq + first * K, dq_, i, cols, H * K, left, K)
    d_sum = tl.cumsum(d_q - d_k, 0, reverse=True)
    tl.store(dg + first + i * H, tl.where(own < -104.0, 0.0, d_sum).to(dg.dtype.element_ty), mask=i < left)
