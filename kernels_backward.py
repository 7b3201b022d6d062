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

SIZES = ["T", "N", "R", "NB", "first_head"]  # one compiled kernel serves all of them


@triton.jit(do_not_specialize=SIZES)
def walk_back(
    q, k, gates, inverse, sizes, d_out, d_new_values, d_states, exits, wholes, d_ends, d_scales, gR_out, read_scales,
    scale, first_head, T, H, N, R, NB, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VB: tl.constexpr,
    SUMMARY: tl.constexpr, READ: tl.constexpr, LATER: tl.constexpr,
    STAGES: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr, NORM_Q: tl.constexpr,
):  # fmt: skip
    """One block, from its last chunk to its first, BV columns of it.

    SUMMARY: what reaches the state on entry of the block when nothing reaches that on its exit goes to `exits`.
    Otherwise `exits` holds the gradient of the state on exit of the block. Written are gR, where `read_gradients` left P^T d_out,
    and for each chunk the gradient of the state that it leaves, both 16 bit times `d_scales`; where there is one block, the
    gradient of the first state goes to `exits`.
    """
    pid = tl.program_id(0).to(tl.int64)
    vb = (pid % VB).to(tl.int32)
    block, bh_ = pid // VB % NB, pid // VB // NB
    bh = bh_ + first_head
    b, h = bh // H, bh % H
    i = tl.arange(0, C)
    cols = tl.arange(0, BK)
    out_cols = vb * BV + tl.arange(0, BV)
    entry = (b * NB + block) * H + h
    if SUMMARY:
        dS = tl.zeros([BK, BV], tl.float32)
    else:
        dS = pieces.load_rows(exits + entry * K * V, cols, out_cols, V, K, V)
    total = 1.0
    end = tl.minimum(block * R + R, N)
    f = pieces.fit_gradients(sizes + bh * N, block * R, end, dS, OP)  # what dS is multiplied by
    dS *= f
    for step in tl.range(block * R, end, num_stages=STAGES):
        n = end - 1 - (step - block * R)
        first = (b * T + n * C) * H + h
        left = tl.minimum(T - n * C, C).to(tl.int32)
        chunk = (b * N + n) * H + h
        kt = pieces.load_rows(k + first * K, i, cols, H * K, left, K)
        k_t = pieces.load_columns(k + first * K, cols, i, H * K, left, K)
        Xt = tl.load(inverse + chunk * C * C + i[:, None] + i[None, :] * C)
        recall, to_end = pieces.vector(gates, chunk, 1, i, C), pieces.vector(gates, chunk, 2, i, C)
        whole = tl.load(gates + chunk * 7 * C + C - 1)
        if READ:
            do = pieces.load_rows(d_out + first * V, i, out_cols, H * V, left, V)
            q_t = pieces.load_columns(q + first * K, cols, i, H * K, left, K)
            norm_q = pieces.inverse_norm_of_columns(q_t, NORM_Q)
            d_new_v = pieces.load_rows(gR_out + first * V, i, out_cols, H * V, left, V)
            change = f / tl.load(read_scales + bh * N + n)
            from_start = pieces.vector(gates, chunk, 0, i, C) * norm_q
        if LATER:
            later = pieces.load_rows(d_new_values + first * V, i, out_cols, H * V, left, V).to(tl.float32)
            later_S = pieces.load_rows(d_states + chunk * K * V, cols, out_cols, V, K, V)
        dS16 = dS.to(OP)
        if not SUMMARY:
            pieces.store_rows(d_ends + (bh_ * N + n) * K * V, dS16, cols, out_cols, V, K, V)
        recalled = tl.dot(kt.to(OP), dS16, input_precision=PREC) * to_end[:, None]
        if READ:
            d_new_v = d_new_v.to(tl.float32) * change + recalled
        else:
            d_new_v = recalled
        if LATER:
            d_new_v += later * f
        gR = tl.dot(Xt, d_new_v.to(OP), input_precision=PREC)
        if not SUMMARY:
            pieces.store_rows(gR_out + first * V, gR, i, out_cols, H * V, left, V)
        dS = tl.dot(k_t.to(OP), (-recall[:, None] * gR).to(OP), dS * whole, input_precision=PREC)
        if READ:
            aged = (from_start * (scale * f))[:, None] * do.to(tl.float32)
            dS = tl.dot(q_t.to(OP), aged.to(OP), dS, input_precision=PREC)
        if LATER:
            dS += later_S * f
        total *= whole
    dS *= 1.0 / f
    if SUMMARY:
        pieces.store_rows(exits + entry * K * V, dS, cols, out_cols, V, K, V)
        if vb == 0:
            tl.store(wholes + entry, total)
    else:
        if NB == 1:
            pieces.store_rows(exits + entry * K * V, dS, cols, out_cols, V, K, V)
        tl.store(d_scales + (bh_ * NB + block) * VB + vb, f)


@triton.jit(do_not_specialize=SIZES)
def read_gradients(
    q, k, v, gates, inverse, states, scales, sizes, d_out, dq, dk_out, dg_out, d_new_values, d_scales_out,
    scale, T, H, N, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VB: tl.constexpr, HAS_SIZES: tl.constexpr,
    OP: tl.constexpr, PREC: tl.constexpr, NORM_Q: tl.constexpr, NORM_K: tl.constexpr,
):  # fmt: skip
    """What one chunk's own read sends back: dq, its share of dk and dg, and P^T d_out, dk's share and the last times powers
    of two: `d_scales_out`, of each chunk its own. `sizes` takes the largest of every chunk."""
    TWO: tl.constexpr = OP == tl.float32
    pid = tl.program_id(0).to(tl.int64)
    n, bh = pid % N, pid // N
    b, h = bh // H, bh % H
    i = tl.arange(0, C)
    cols = tl.arange(0, BK)
    first = (b * T + n * C) * H + h
    left = tl.minimum(T - n * C, C).to(tl.int32)
    chunk = (b * N + n) * H + h
    size = 0.0
    for vb in tl.static_range(VB):
        do = pieces.load_rows(d_out + first * V, i, vb * BV + tl.arange(0, BV), H * V, left, V)
        size = tl.maximum(size, pieces.amax(do) * tl.abs(scale))
    f, fd = tl.load(scales + bh), pieces.tight(size, OP)
    tl.store(d_scales_out + pid, fd)
    tl.store(sizes + pid, tl.maximum(size, tl.load(sizes + pid)) if HAS_SIZES else size)
    k16 = pieces.load_rows(k + first * K, i, cols, H * K, left, K).to(OP)
    q_t = pieces.load_columns(q + first * K, cols, i, H * K, left, K)
    X = tl.load(inverse + chunk * C * C + i[:, None] * C + i[None, :])
    recall, strength = pieces.vector(gates, chunk, 1, i, C), pieces.vector(gates, chunk, 3, i, C)
    Pt = pieces.scores_t(
        k16, q_t.to(OP), gates, chunk, pieces.inverse_norm_of_columns(q_t, NORM_Q), i, C, OP, PREC, NORM_K
    )
    dP = tl.zeros([C, C], tl.float32)
    dq_ = tl.zeros([C, BK], tl.float32)
    for vb in tl.static_range(VB):
        out_cols = vb * BV + tl.arange(0, BV)
        do = pieces.load_rows(d_out + first * V, i, out_cols, H * V, left, V)
        S16 = pieces.load_rows(states + chunk * K * V, cols, out_cols, V, K, V)
        values = pieces.load_rows(v + first * V, i, out_cols, H * V, left, V)
        new_v = pieces.new_values(k16, S16, X, values, strength * f, recall, OP, PREC)
        do16 = (do.to(tl.float32) * (scale * fd)).to(OP)
        d_new_v = tl.dot(Pt, do16, input_precision=PREC)
        pieces.store_rows(d_new_values + first * V, d_new_v, i, out_cols, H * V, left, V)
        dP = tl.dot(do16, tl.trans(new_v), dP, input_precision=PREC)
        dq_ = tl.dot(do16, tl.trans(S16), dq_, input_precision=PREC)
    # In units of `both`; products with dP 16 times smaller, lest they leave the range of float16.
    both = 1.0 / (f * fd)
    coarse, rest = pieces.vector(gates, chunk, 4, i, C), pieces.vector(gates, chunk, 5, i, C)
    qt = pieces.load_rows(q + first * K, i, cols, H * K, left, K)
    norm_q = pieces.inverse_norm(qt, NORM_Q)
    dP *= pieces.decays(coarse, rest, coarse, rest, i[:, None] >= i[None, :], TWO) * 0.0625
    dP_k, dP_q = dP, dP
    if NORM_K:
        dP_k = dP * pieces.vector(gates, chunk, 6, i, C)[None, :]
    if NORM_Q:
        dP_q = dP * norm_q[:, None]
    dq_ *= (pieces.vector(gates, chunk, 0, i, C) * 0.0625)[:, None]
    dq_ = tl.dot(dP_k.to(OP), k16, dq_, input_precision=PREC) * (16.0 * both)
    columns = tl.dot(tl.trans(qt.to(OP)), dP_q.to(OP), input_precision=PREC)
    pieces.store_rows(dk_out + first * K, tl.trans(columns), i, cols, H * K, left, K)
    q32 = qt.to(tl.float32)
    if NORM_Q:
        q32 *= norm_q[:, None]
    d_sum = tl.sum(q32 * dq_, 1)
    tl.store(dg_out + pid * C + i, d_sum)
    if NORM_Q:
        dq_ = (dq_ - q32 * d_sum[:, None]) * norm_q[:, None]
    pieces.store_rows(dq + first * K, dq_, i, cols, H * K, left, K)


@triton.jit(do_not_specialize=SIZES)
def gradients(
    k, v, g, gates, inverse, states, scales, d_ends, d_scales, dk_in, dg_in, gR_in, read_scales,
    dk, dv, d_beta, dg,
    first_head, T, H, N, R, NB, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VB: tl.constexpr,
    READ: tl.constexpr, OP: tl.constexpr, PREC: tl.constexpr, RAW: tl.constexpr,
    NORM_K: tl.constexpr,
):  # fmt: skip
    """Gradients of k, v, beta and g of one chunk, from the states on both its ends and gR.

    dv takes the place of gR, and dk that of the share that `read_gradients` found.
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
    # Columns that different programs of `walk_back` took have scales of their own; the smallest serves all.
    d_scales += (bh_ * NB + n // R) * VB
    f, fd = tl.load(scales + bh), tl.load(d_scales)
    for vb in tl.static_range(1, VB):
        fd = tl.minimum(fd, tl.load(d_scales + vb))
    # In units of `both`; products with [C, C] gradients 16 times smaller, lest they leave the range of float16.
    both = 1.0 / (f * fd)
    gL = tl.zeros([C, C], tl.float32)
    dk_end = tl.zeros([C, BK], tl.float32)
    rows = tl.zeros([C, BK], tl.float32)
    d_strength = tl.zeros([C], tl.float32)
    d_whole = 0.0
    k16 = pieces.load_rows(k + first * K, i, cols, H * K, left, K).to(OP)
    X = tl.load(inverse + chunk * C * C + i[:, None] * C + i[None, :])
    recall, strength = pieces.vector(gates, chunk, 1, i, C), pieces.vector(gates, chunk, 3, i, C)
    for vb in tl.static_range(VB):
        out_cols = vb * BV + tl.arange(0, BV)
        gR = pieces.load_rows(gR_in + first * V, i, out_cols, H * V, left, V)
        values = pieces.load_rows(v + first * V, i, out_cols, H * V, left, V)
        tl.debug_barrier()  # all of gR is read before dv is put in its place
        fd_here = tl.load(d_scales + vb)
        gR32 = gR.to(tl.float32) * (1.0 / fd_here)
        pieces.store_rows(dv + first * V, gR32 * strength[:, None], i, out_cols, H * V, left, V)
        d_strength += tl.sum(gR32 * values.to(tl.float32), 1)
        S16 = pieces.load_rows(states + chunk * K * V, cols, out_cols, V, K, V)
        dS16 = pieces.load_rows(d_ends + here * K * V, cols, out_cols, V, K, V)
        change = fd / fd_here
        d_whole += tl.sum(tl.sum(dS16.to(tl.float32) * S16.to(tl.float32), 1), 0) * change
        if VB > 1:
            gR = (gR.to(tl.float32) * change).to(OP)
            dS16 = (dS16.to(tl.float32) * change).to(OP)
        rows = tl.dot(gR, tl.trans(S16), rows, input_precision=PREC)
        new_v = pieces.new_values(k16, S16, X, values, strength * f, recall, OP, PREC)
        dk_end = tl.dot(new_v, tl.trans(dS16), dk_end, input_precision=PREC)
        gL = tl.dot(gR, tl.trans(new_v), gL, input_precision=PREC)
    k16 = pieces.load_rows(k + first * K, i, cols, H * K, left, K).to(OP)  # again: kept, it would not fit in registers
    own = tl.load(g + first + i * H, mask=i < left, other=0.0).to(tl.float32)
    coarse, rest = pieces.vector(gates, chunk, 4, i, C), pieces.vector(gates, chunk, 5, i, C)
    to_end, norm = pieces.vector(gates, chunk, 2, i, C), pieces.vector(gates, chunk, 6, i, C)
    row_coarse = coarse - tl.maximum(own, -128.0) if RAW else coarse
    M = gL * pieces.decays(coarse, rest, row_coarse, rest, i[:, None] > i[None, :], TWO) * -0.0625
    columns = tl.dot(tl.trans(k16), ((strength * norm)[:, None] * M).to(OP), input_precision=PREC)
    if NORM_K:
        M *= norm[None, :]
    rows *= (tl.exp(row_coarse + rest if TWO else row_coarse) * -0.0625)[:, None]
    rows = tl.dot(M.to(OP), k16, rows, input_precision=PREC) * 16.0
    dk_end *= (to_end / norm)[:, None]
    k32 = pieces.load_rows(k + first * K, i, cols, H * K, left, K).to(tl.float32)
    if NORM_K:
        k32 *= norm[:, None]
    to_last = tl.sum(k32 * dk_end, 1) * both
    d_row = tl.sum(k32 * rows, 1) * both
    d_strength += d_row
    d_row *= strength
    dk_ = dk_end + strength[:, None] * rows
    dk_columns = tl.trans(columns)
    d_sum = tl.zeros([C], tl.float32)
    if READ:
        share = pieces.load_rows(dk_in + first * K, i, cols, H * K, left, K).to(tl.float32)
        dk_columns += share * (fd / tl.load(read_scales + bh * N + n))
        d_sum = tl.load(dg_in + (bh * N + n) * C + i)
        tl.debug_barrier()
    dk_columns *= 16.0
    d_sum += d_row - tl.sum(k32 * dk_columns, 1) * both
    dk_ = (dk_ + dk_columns) * both
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
    scale, T, H, N, K, V,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, VB: tl.constexpr,
    OP: tl.constexpr, PREC: tl.constexpr, NORM_Q: tl.constexpr, NORM_K: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk of a further read; d_new_values and d_states are what the write's backward takes over."""
    TWO: tl.constexpr = OP == tl.float32
    pid = tl.program_id(0).to(tl.int64)
    n, bh = pid % N, pid // N
    b, h = bh // H, bh % H
    i = tl.arange(0, C)
    cols = tl.arange(0, BK)
    first = (b * T + n * C) * H + h
    left = tl.minimum(T - n * C, C).to(tl.int32)
    chunk = (b * N + n) * H + h
    kt = pieces.load_rows(k + first * K, i, cols, H * K, left, K)
    qt = pieces.load_rows(q + first * K, i, cols, H * K, left, K)
    norm = pieces.inverse_norm(kt, NORM_K)
    norm_q = pieces.inverse_norm(qt, NORM_Q)
    k16, q16 = kt.to(OP), qt.to(OP)
    q_t = pieces.load_columns(q + first * K, cols, i, H * K, left, K)
    Pt = pieces.scores_t(k16, q_t.to(OP), gates, chunk, norm_q, i, C, OP, PREC, NORM_K)
    from_start = pieces.vector(gates, chunk, 0, i, C)
    coarse, rest = pieces.vector(gates, chunk, 4, i, C), pieces.vector(gates, chunk, 5, i, C)
    dP = tl.zeros([C, C], tl.float32)
    dq_entry = tl.zeros([C, BK], tl.float32)
    size = 0.0
    for vb in range(VB):
        do = pieces.load_rows(d_out + first * V, i, vb * BV + tl.arange(0, BV), H * V, left, V)
        size = tl.maximum(size, pieces.amax(do) * tl.abs(scale))
    f, fd = tl.load(scales + bh), pieces.tight(size, OP)
    both = 1.0 / (f * fd)
    for vb in tl.static_range(VB):
        out_cols = vb * BV + tl.arange(0, BV)
        S16 = pieces.load_rows(states + chunk * K * V, cols, out_cols, V, K, V)
        new_v = pieces.load_rows(new_values + first * V, i, out_cols, H * V, left, V)
        do = pieces.load_rows(d_out + first * V, i, out_cols, H * V, left, V).to(tl.float32) * (scale * fd)
        dP = tl.dot(do.to(OP), tl.trans(new_v), dP, input_precision=PREC)
        dq_entry = tl.dot(do.to(OP), tl.trans(S16), dq_entry, input_precision=PREC)
        d_new_v = tl.dot(Pt, do.to(OP), input_precision=PREC) * (1.0 / fd)
        pieces.store_rows(d_new_values + first * V, d_new_v, i, out_cols, H * V, left, V)
        aged = ((from_start * norm_q)[:, None] * do).to(OP)
        d_S = tl.dot(tl.trans(q16), aged, input_precision=PREC) * (1.0 / fd)
        pieces.store_rows(d_states + chunk * K * V, d_S, cols, out_cols, V, K, V)
    dP *= pieces.decays(coarse, rest, coarse, rest, i[:, None] >= i[None, :], TWO) * 0.0625
    q32, k32 = qt.to(tl.float32) * norm_q[:, None], kt.to(tl.float32) * norm[:, None]
    dq_ = tl.dot((dP * norm[None, :]).to(OP), k16, input_precision=PREC) * 16.0
    dq_ = (dq_ + from_start[:, None] * dq_entry) * both
    dk_ = tl.trans(tl.dot(tl.trans(q16), (dP * norm_q[:, None]).to(OP), input_precision=PREC)) * (16.0 * both)
    d_q, d_k = tl.sum(q32 * dq_, 1), tl.sum(k32 * dk_, 1)
    if NORM_Q:
        dq_ = (dq_ - q32 * d_q[:, None]) * norm_q[:, None]
    if NORM_K:
        dk_ = (dk_ - k32 * d_k[:, None]) * norm[:, None]
    pieces.store_rows(dq + first * K, dq_, i, cols, H * K, left, K)
    pieces.store_rows(dk + first * K, dk_, i, cols, H * K, left, K)
    own = tl.load(g + first + i * H, mask=i < left, other=0.0).to(tl.float32)
    d_sum = tl.cumsum(d_q - d_k, 0, reverse=True)
    tl.store(dg + first + i * H, tl.where(own < -104.0, 0.0, d_sum).to(dg.dtype.element_ty), mask=i < left)
