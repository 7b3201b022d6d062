"""Triton kernels of the gated delta rule and their launchers. Imported by `core` when a call runs on a GPU, never before.

A sequence of T tokens is cut into N chunks of C tokens and NB blocks of R chunks. With S the state on entry of a chunk, gc the
running sum of the log-decays in it, and all products taken over the tokens of the chunk:

    L[i, j] = beta_i (k_i . k_j) e^(gc_i - gc_j)  for j < i              X = (I + L)^-1
    new_v   = X (beta (v - e^gc (k S)))                                  the values that are written in the end
    S'      = e^gc_last S + k^T (e^(gc_last - gc) new_v)
    out     = scale (e^gc (q S) + tril(q k^T e^(gc_i - gc_j)) new_v)

    intra         X and the decays of every chunk, all in parallel
    summarise     every block from an empty state: S' = w S - M S + D, the block as one affine map (w its whole decay)
    scan          the chain over blocks: the state on entry of each, one product per block
    walk          every block again from its true entry state: out, the states on entry of its chunks, the last state

A block map M is what the block would hold had it written the values w k instead of v, so `summarise` is one walk over V + K
columns. Backwards the same maps, transposed, carry dS from block to block:

    read_gradients    what each chunk's own read sends back: dq, shares of dk and dg, and d_new_v = P^T d_out
    walk_back         every block from nothing, then, after `scan` reversed, again: dS at the end of every chunk, and X^T d_new_v
    gradients         dk, dv, d_beta and dg of every chunk, all in parallel; `gradients_wide` for keys wider than 64
    read, read_back   a memory that is read again, and its gradients

Sequences of one block need neither summaries nor a scan. Block sizes depend on T and the widths, never on B, and nothing is
added up atomically: a sequence gives the same bits alone, in a batch and on every run.

Precision: operands of products in float16 with float32 sums for 16-bit inputs, all else in float32. Values that could leave the
range of float16 are multiplied by powers of two first (`pieces.fit`). float32 inputs multiply in float32 as torch's own
matrix products do: `torch.set_float32_matmul_precision`.

Other names for the same: X is the inverse of the WY or UT transform, which `intra` computes; new_v is u - w S; `summarise`,
`scan` and `walk` are state passing, in blocks.

Letters: B batch, T tokens, H heads, K key width, V value width, C chunk, N chunks, R chunks per block, NB blocks. BK, BV: padded
widths of tiles. Algebra: Yang et al., "Gated Delta Networks" (2024); the block maps are its chunk form composed.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch

import kernels_backward
import kernels_forward
from kernels_launch import LEAST, Launch, Launches, forget, limits, on_device, operands, power_of_two, scratch

forget()

# ------------------------------------------------------------------------------------------------ plan


class Plan(NamedTuple):
    """Sizes that a shape runs with. Never a function of B: bits must not depend on the batch a sequence is in."""

    C: int  # tokens per chunk
    R: int  # chunks per block
    N: int  # chunks
    NB: int  # blocks
    BK: int  # padded K
    BV: int  # columns of V per program
    VB: int  # programs over V
    walk_columns: int  # columns of V per program of the walks
    scan_columns: int
    read_columns: int  # columns of V that `read_gradients` takes at once
    gradient_columns: int  # and `gradients`
    reads_as_it_walks: bool  # one kernel for both, or `read` after `walk`
    intra: Launch
    summarise: Launch
    scan: Launch
    walk: Launch
    read: Launch
    walk_back: Launch
    read_gradients: Launch
    gradients: Launch
    read_back: Launch
    code: int = 0  # a number for all that compiled kernels and their order depend on: not R and N, nor how many blocks beyond one


_CODES, _NUMBERS = {}, itertools.count()  # {plan without sizes: its code}; no two get the same, in no two threads


@functools.lru_cache(maxsize=4096)
def plan(T: int, K: int, V: int, dtype: torch.dtype, shared: int = 232_448, generation: int = 9) -> Plan:
    """Sizes and launches for sequences of T tokens, keys of width K, values of width V.

    How many sequences and heads there are does not matter: bits must not depend on the batch, and where they fill the GPU by
    themselves one block for all tokens was no faster (4 x 2,048 tokens, 8 heads: 328 us against 325).

    `shared`: bytes of shared memory that one program may take (99 KiB on sm_86, sm_89 and sm_120; 163 KiB on sm_80; 227 KiB on
    sm_90 and sm_100). `generation`: the major compute capability.
    """
    BK, BV = max(LEAST, power_of_two(K)), max(LEAST, min(64, power_of_two(V)))
    full = dtype == torch.float32
    wide = BK > 128 or full  # tiles that registers hold only over twice the threads and half the tokens
    small = shared < 160 << 10
    # Not 16 for float32: ptxas then loses the address of a tile in `read_gradients` on Hopper.
    C = min(32 if wide or small else 64, power_of_two(T, 32 if full else 16))
    if BK > 128 and (small or generation >= 10):  # sums live in tensor memory on sm_100, of 512 columns
        BV = min(BV, 16 if small and full else 32)
        C = min(C, 16) if small else C
    if BK > 128 and full and shared < 200 << 10:  # six tiles of keys and queries in `read_back`
        C = min(C, 16)
    N = -(-T // C)
    # About as many blocks as chunks in a block; one block where the chain over blocks, which holds a whole map, would not fit.
    chain = (BK + 64) * BK * (8 if full else 2)
    R = N if N <= 8 or chain > shared else 1 << ((N - 1).bit_length() + 1) // 2
    walking = Launch(8 if wide else 4, 1 if wide or small else 3)
    single = walking._replace(stages=1)
    lean = generation == 9 and BK <= 128 and not full  # 168 registers: three programs a multiprocessor instead of two
    broad = BV if full or small else max(LEAST, min(128, power_of_two(V)))
    # Sequences of one block come in large batches: fewer and wider programs then read q, k and X once. 39 + 39 us become 33 + 35
    # (32 x 256 tokens); with several blocks nothing is gained.
    walk_columns = broad if N <= R and lean and BK <= 64 else BV
    walks = walking if walk_columns == BV else walking._replace(stages=2)
    p = Plan(
        C=C,
        R=R,
        N=N,
        NB=-(-N // R),
        BK=BK,
        BV=BV,
        VB=-(-V // BV),
        walk_columns=walk_columns,
        scan_columns=16,
        read_columns=broad if BK <= 128 else BV,
        gradient_columns=broad if BK <= 64 else BV,
        reads_as_it_walks=BK <= 64 or wide,  # 128 columns of q, k and P beside S spill: 135 us in one, 100 in two
        intra=Launch(1),  # all of it in the registers of one warp
        summarise=walking,
        scan=single if BK <= 64 else single._replace(warps=8),
        walk=walks,
        read=single._replace(registers=168) if lean else single,
        walk_back=walks if BK <= 64 else walking._replace(stages=min(walking.stages, 2)),
        read_gradients=single,
        # Unasked, ptxas takes 32 registers for float32 and spills 17 KB.
        gradients=single._replace(registers=255) if full else single,
        read_back=single if BK <= 64 else single._replace(warps=8),
    )
    return p._replace(code=_CODES.setdefault(p._replace(R=0, N=0, NB=min(p.NB, 2)), next(_NUMBERS)))


# ------------------------------------------------------------------------------------------------ launchers


class Written(NamedTuple):
    """What `write` returns; None for what was not asked for. 16 bit: float16, or float32 for float32 inputs.

    out [B, T, H, V] in the dtype of v             what was read with q
    state [B, H, K, V] float32                     after the last token
    gates [B, N, H, 7, C] float32                  decays inside every chunk (`vector`)
    inverse [B, N, H, C, C] 16 bit                 X of every chunk
    states [B, N, H, K, V] 16 bit                  on entry of every chunk, times its scale
    scales [B, H] float32                          powers of two
    maps [B, NB, H, K, K] 16 bit                   M of every block (its decay w is not in it), where there is more than one
    new_v [B, T, H, V] 16 bit                      the values written, times the scale
    """

    out: torch.Tensor | None
    state: torch.Tensor
    gates: torch.Tensor | None
    inverse: torch.Tensor | None
    states: torch.Tensor | None
    scales: torch.Tensor | None
    maps: torch.Tensor | None
    new_v: torch.Tensor | None


@on_device
def write(
    q: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor,
    S0: torch.Tensor | None,
    *,
    scale: float,
    raw: bool,
    norm_q: bool,
    norm_k: bool,
    saves: bool,
    readable: bool,
) -> Written:
    """Write a memory and, with q, read it. `saves` keeps what `write_backward` needs, `readable` what `read` needs.

    q, k [B, T, H, K], v [B, T, H, V] of one dtype, float32, bfloat16 or float16; beta, g [B, T, H] in it or in float32; S0
    [B, H, K, V] float32 or None. All row-major and checked: by `core`, and made so by `kernel_ops`.
    """
    B, T, H, K = k.shape
    V = v.shape[-1]
    p = plan(T, K, V, k.dtype, *limits(k.device))
    op, prec, half = operands(k)
    new, C, N, NB, BK, BV, VB = k.new_empty, p.C, p.N, p.NB, p.BK, p.BV, p.VB
    tiles = dict(C=C, BK=BK, OP=op, PREC=prec)
    key = ("write", H, K, V, p.code, prec, raw, norm_q, norm_k, saves, readable)
    run = Launches(key, (k, q, v, beta, g, S0), together=True)
    reads = q is not None
    gates = new((B, N, H, 7, C), dtype=torch.float32)
    inverse = new((B, N, H, C, C), dtype=half)
    many = B * NB * H if NB > 1 else 0
    sizes, wholes, entries = scratch(k, B * H * N, many, many * K * V)
    run(
        kernels_forward.intra, B * H * N,
        (k, v, beta, g, k if S0 is None else S0, inverse, gates, sizes), (T, H, N, K, V),
        lambda: dict(BV=BV, VB=VB, HAS_START=S0 is not None, RAW=raw, NORM_K=norm_k, **tiles, **p.intra.options()),
    )  # fmt: skip
    maps = None
    if NB > 1:
        maps = new((B, NB, H, K, K), dtype=half)
        KB = -(-K // BV)
        run(
            kernels_forward.summarise, B * H * NB * (VB + KB),
            (k, v, gates, inverse, sizes, maps, entries, wholes), (T, N, p.R, NB),
            lambda: dict(
                H=H, K=K, V=V, BV=BV, VB=VB, KB=KB, STAGES=p.summarise.stages, **tiles, **p.summarise.options()
            ),
        )  # fmt: skip
        _chain(run, p, (B, H, K, V), S0, maps, entries, wholes, sizes, None, reverse=False)
    else:
        entries = S0
    state = new((B, H, K, V), dtype=torch.float32)
    keeps, fused = saves or readable, reads and p.reads_as_it_walks
    stores, stores_v = keeps or (reads and not fused), readable or (reads and not fused)
    out = torch.empty_like(v) if fused else None
    states = new((B, N, H, K, V), dtype=half) if stores else None
    scales = new((B, H), dtype=torch.float32) if stores else None
    new_v = new((B, T, H, V), dtype=half) if stores_v else None
    WB = -(-V // p.walk_columns)
    run(
        kernels_forward.walk, B * H * NB * WB,
        (
            q if fused else k, k, v, gates, inverse, sizes, k if entries is None else entries,
            out if fused else k, state, states if stores else k, scales if stores else k, new_v if stores_v else k,
        ),
        (scale, T, N, p.R, NB),
        lambda: dict(
            H=H, K=K, V=V, BV=p.walk_columns, VB=WB, STAGES=p.walk.stages, HAS_ENTRY=entries is not None, READ=fused, SAVE=stores,
            KEEP=stores_v, NORM_Q=norm_q, NORM_K=norm_k, **tiles, **p.walk.options(),
        ),
    )  # fmt: skip
    options = dict(scale=scale, norm_q=norm_q, norm_k=norm_k)
    tensors = q, k, v, beta, g, S0, gates, inverse, states, scales, maps, new_v
    run.finish(lambda: _what_follows(*tensors, raw=raw, saves=saves, readable=readable, **options))
    if reads and not fused:
        out = read(q, k, gates, states, scales, new_v, **options)
    return Written(
        out,
        state,
        gates if keeps else None,
        inverse if saves else None,
        states if keeps else None,
        scales if keeps else None,
        maps if saves else None,
        new_v if readable else None,
    )


def _what_follows(
    q, k, v, beta, g, S0, gates, inverse, states, scales, maps, new_v, *, raw, saves, readable, **options
):
    """Call what is likely to be called after a write, for `Launches.finish`: on the first tokens of its first sequence, as many
    as take the same kernels, lest it allocates more than that."""
    T, H, K = k.shape[1:]
    full = plan(T, K, v.shape[-1], k.dtype, *limits(k.device))
    few = min(T, (9 if full.NB > 1 else 8) * full.C)
    p = plan(few, K, v.shape[-1], k.dtype, *limits(k.device))
    first = lambda n, *tensors: [None if x is None else x[:1, :n] for x in tensors]  # noqa: E731
    q, k, v, beta, g, new_v = first(few, q, k, v, beta, g, new_v)
    gates, inverse, states, maps = first(p.N, gates, inverse, states, maps)
    S0, scales = first(H, S0, scales)
    reader, later = k if q is None else q, (None, None)
    if new_v is not None:
        read(reader, k, gates, states, scales, new_v, **options)
    if saves and readable:
        later = read_backward(reader, k, g, gates, states, scales, new_v, v, **options)[3:]
    if saves:
        d_out = None if q is None else v
        write_backward(
            q, k, v, beta, g, S0, gates, inverse, states, scales, maps, d_out, None, *later, raw=raw, **options
        )  # fmt: skip


def _sizes(run, p, T, x, states, start):
    """`size` of what later reads sent back, x [B, T, H, V] and states [B, N, H, K, V], and of `start` [B, H, K, V], where they
    are: [B, H, N] float32, None for neither."""
    if x is None and start is None:
        return None
    given = states if start is None else start
    B, (H, K, V) = len(given), given.shape[-3:]
    sizes = given.new_empty((B, H, p.N), dtype=torch.float32)
    run(
        kernels_forward.size, B * H * p.N,
        (given if x is None else x, given, given if x is None else states, sizes), (T, H, p.N, K, V),
        lambda: dict(C=p.C, BV=min(128, power_of_two(V)), HAS_X=x is not None, HAS_START=start is not None, num_warps=4),
    )  # fmt: skip
    return sizes


def _chain(run, p, shape, start, maps, deltas, wholes, sizes, last, *, reverse):
    """`scan` over the blocks of all sequences and heads, in place in `deltas`. `shape`: that of a state."""
    B, H, K, V = shape
    VB = -(-V // p.scan_columns)
    op, prec, _ = operands(maps)
    run(
        kernels_forward.scan, B * H * VB,
        (deltas if start is None else start, maps, deltas, wholes, sizes, deltas if last is None else last),
        (H, p.N, p.NB, K, V),
        lambda: dict(
            BK=p.BK, BV=p.scan_columns, VB=VB, HAS_START=start is not None, REVERSE=reverse, HAS_LAST=last is not None,
            OP=op, PREC=prec, **p.scan.options(),
        ),
    )  # fmt: skip


AT_ONCE = 64 << 20  # bytes of gradients of states that are held at once, where heads can be taken in groups


@on_device
def write_backward(
    q: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor,
    S0: torch.Tensor | None,
    gates: torch.Tensor,
    inverse: torch.Tensor,
    states: torch.Tensor,
    scales: torch.Tensor,
    maps: torch.Tensor | None,
    d_out: torch.Tensor | None,
    d_state: torch.Tensor | None,
    d_new_v: torch.Tensor | None,
    d_states: torch.Tensor | None,
    *,
    scale: float,
    raw: bool,
    norm_q: bool,
    norm_k: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients (dq, dk, dv, d_beta, dg, dS0) of `write`, from those of out, of the last state, and of later reads.

    Arguments as `write` took them and, from gates to maps, as `Written` has them. d_out [B, T, H, V] in the dtype of v; d_state
    [B, H, K, V] float32; d_new_v [B, T, H, V] and d_states [B, N, H, K, V], float32, are what `read_backward` returns, added up
    over reads; None for those that do not come. Each gradient has shape and dtype of what it is the gradient of, dS0 float32;
    None for dq without q or d_out, and for dS0 without S0.
    """
    B, T, H, K = k.shape
    V = v.shape[-1]
    p = plan(T, K, V, k.dtype, *limits(k.device))
    op, prec, half = operands(k)
    new, C, N, NB, BK, WB = k.new_empty, p.C, p.N, p.NB, p.BK, -(-V // p.walk_columns)
    tiles = dict(C=C, BK=BK, OP=op, PREC=prec)
    run = Launches(
        ("write_backward", H, K, V, p.code, prec, raw, norm_q, norm_k),
        (k, q, v, beta, g, S0, d_out, d_state, d_new_v, d_states, inverse, states),
        together=True,
    )
    reads, later = q is not None and d_out is not None, d_new_v is not None
    per_chunk, per_block = B * H * N, B * H * NB if NB > 1 else 0
    given_sizes = _sizes(run, p, T, d_new_v, d_states, d_state)
    has_sizes = given_sizes is not None
    # dg_read: a share of dg from the first kernel, and two more vectors that `gradients_wide` puts aside.
    own_sizes, own_scales = 0 if has_sizes else per_chunk, per_chunk if reads else 0
    dg_read, sizes, read_scales = scratch(k, per_chunk * 3 * C, own_sizes, own_scales)
    if has_sizes:
        sizes = given_sizes
    # dv and dk hold, in 16 bit, what one kernel hands the next, until the last writes them.
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    gR, dk_read = dv.view(half), dk.view(half)
    dq = None
    if reads:  # before all that this kernel does without: the GPU may be waiting
        dq = torch.empty_like(q)
        run(
            kernels_backward.read_gradients, per_chunk,
            (q, k, v, gates, inverse, states, scales, sizes, d_out, dq, dk_read, dg_read, gR, read_scales),
            (scale, T, H, N),
            lambda: dict(
                K=K, V=V, BV=p.read_columns, VB=-(-V // p.read_columns), HAS_SIZES=has_sizes, NORM_Q=norm_q, NORM_K=norm_k,
                **tiles, **p.read_gradients.options(),
            ),
        )  # fmt: skip
    else:
        read_scales = sizes if has_sizes else sizes.zero_()
    group = min(B * H, max(1, AT_ONCE // (N * K * V * half.itemsize)))
    wholes, exits, d_scales, d_ends = scratch(
        k, per_block, per_block * K * V, group * NB, -(-group * N * K * V * half.itemsize // 4)
    )
    d_ends = d_ends.view(half)
    exits = exits if NB > 1 else d_state
    d_beta, dg = torch.empty_like(beta), torch.empty_like(g)
    dS0 = new((B, H, K, V), dtype=torch.float32) if S0 is not None else None

    # What later reads send back is float32 and takes shared memory that a third stage would need.
    stages = min(p.walk_back.stages, 2) if later else p.walk_back.stages

    def walk(count, first_head, summary):
        run(
            kernels_backward.walk_back, count * NB * WB,
            (
                q if reads else k, k, gates, inverse, sizes, d_out if reads else k,
                d_new_v if later else k, d_states if later else k,
                k if exits is None else exits, k if dS0 is None else dS0, wholes, d_ends, d_scales,
                gR, read_scales,
            ),
            (scale, first_head, T, N, p.R, NB),
            lambda: dict(
                H=H, K=K, V=V, BV=p.walk_columns, VB=WB, SUMMARY=summary, HAS_EXIT=exits is not None, FIRST=S0 is not None,
                STAGES=stages, READ=reads, LATER=later, NORM_Q=norm_q, **tiles, **p.walk_back.options(),
            ),
        )  # fmt: skip

    if NB > 1:
        walk(B * H, 0, True)
        _chain(run, p, (B, H, K, V), d_state, maps, exits, wholes, sizes, dS0, reverse=True)
    for first_head in range(0, B * H, group):
        count = min(group, B * H - first_head)
        walk(count, first_head, False)
        run(
            kernels_backward.gradients if BK <= 64 else kernels_backward.gradients_wide, count * N,
            (
                k, v, g, gates, inverse, states, scales, d_ends, d_scales, dk_read, dg_read, gR, read_scales,
                dk, dv, d_beta, dg,
            ),
            (first_head, T, H, N, p.R, NB),
            lambda: dict(
                K=K, V=V, BV=p.gradient_columns, VB=-(-V // p.gradient_columns), READ=reads, RAW=raw, NORM_K=norm_k,
                **tiles, **p.gradients.options(),
            ),
        )  # fmt: skip
    run.finish()
    return dq, dk, dv, d_beta, dg, dS0


@on_device
def read(
    q: torch.Tensor,
    k: torch.Tensor,
    gates: torch.Tensor,
    states: torch.Tensor,
    scales: torch.Tensor,
    new_v: torch.Tensor,
    *,
    scale: float,
    norm_q: bool,
    norm_k: bool,
) -> torch.Tensor:
    """A further read of a memory written with `readable=True`: out [B, T, H, V] in the dtype of q.

    q [B, T, H, K] in the dtype of k, row-major; the rest as `write` took and returned it.
    """
    B, T, H, K = k.shape
    V = new_v.shape[-1]
    p = plan(T, K, V, k.dtype, *limits(k.device))
    op, prec, _ = operands(k)
    run = Launches(("read", H, K, V, p.code, prec, norm_q, norm_k), (k, q, states, new_v))
    out = q.new_empty((B, T, H, V))
    run(
        kernels_forward.read, B * H * p.N * p.VB,
        (q, k, gates, states, scales, new_v, out), (scale, T, H, p.N),
        lambda: dict(
            K=K, V=V, C=p.C, BK=p.BK, BV=p.BV, VB=p.VB, OP=op, PREC=prec, NORM_Q=norm_q, NORM_K=norm_k, **p.read.options()
        ),
    )  # fmt: skip
    return out


@on_device
def read_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    g: torch.Tensor,
    gates: torch.Tensor,
    states: torch.Tensor,
    scales: torch.Tensor,
    new_v: torch.Tensor,
    d_out: torch.Tensor,
    *,
    scale: float,
    norm_q: bool,
    norm_k: bool,
) -> tuple[torch.Tensor, ...]:
    """Gradients (dq, dk, dg, d_new_v, d_states) of `read`; the last two, float32, go to `write_backward`.

    d_out [B, T, H, V] in the dtype of q; g and the rest as `write` took and returned it.
    """
    B, T, H, K = k.shape
    V = new_v.shape[-1]
    p = plan(T, K, V, k.dtype, *limits(k.device))
    op, prec, _ = operands(k)
    run = Launches(("read_backward", H, K, V, p.code, prec, norm_q, norm_k), (k, q, g, states, new_v, d_out))
    dq, dk, dg = (torch.empty_like(x) for x in (q, k, g))
    d_new_v = k.new_empty((B, T, H, V), dtype=torch.float32)
    d_states = k.new_empty((B, p.N, H, K, V), dtype=torch.float32)
    run(
        kernels_backward.read_back, B * H * p.N,
        (q, k, g, gates, states, scales, new_v, d_out, dq, dk, dg, d_new_v, d_states), (scale, T, H, p.N),
        lambda: dict(
            K=K, V=V, C=p.C, BK=p.BK, BV=p.BV, VB=p.VB, OP=op, PREC=prec, NORM_Q=norm_q, NORM_K=norm_k,
            **p.read_back.options(),
        ),
    )  # fmt: skip
    return dq, dk, dg, d_new_v, d_states


@on_device
def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor,
    *,
    scale: float,
    raw: bool,
    norm_q: bool,
    norm_k: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token: q, k [B, H, K], v [B, H, V], beta, g [B, H], state [B, H, K, V] float32. Returns (out, next state)."""
    B, H, K = k.shape
    V = v.shape[-1]
    BK = power_of_two(K)
    BV = min(power_of_two(V), max(16, 2048 // BK))
    VB = -(-V // BV)
    run = Launches(("step", H, K, V, raw, norm_q, norm_k), (k, q, v, beta, g, state))
    out, next_state = torch.empty_like(v), torch.empty_like(state)
    run(
        kernels_forward.step, B * H * VB,
        (q, k, v, beta, g, state, out, next_state), (scale, K, V),
        lambda: dict(BK=BK, BV=BV, VB=VB, RAW=raw, NORM_Q=norm_q, NORM_K=norm_k, num_warps=4),
    )  # fmt: skip
    return out, next_state
