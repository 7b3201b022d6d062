"""Work of the Triton kernels by formula, and their measured times beside it: what bounds each, and how far it is from that.

    work = bench_roofline.kernel_work(shape, bench_roofline.plan_of(shape))     {"walk": Work(flops, bytes), ...}
    bench_roofline.kernel_table(row, plan, rate=700e12)                         a row of bench_gpu.py, kernel by kernel

A kernel can run no faster than its matrix products at the speed of a large one, nor than its bytes at the speed of a copy:
its two roofs. The formulas follow kernels_forward.py and kernels_backward.py product by product; a test counts the products
there and fails when they part.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

import bench_measure
import core


class Work(NamedTuple):
    """What a kernel does over all its launches in one forward+backward: floating-point operations of its matrix products, and
    bytes if each of its inputs is read once and each of its results written once."""

    flops: float
    bytes: float


def plan_of(shape: bench_measure.Shape, dtype: str = "bf16"):
    """kernels.plan of a shape (chunks, blocks), or None on a machine without Triton."""
    if not core.HAS_TRITON:
        return None
    import kernels

    return kernels.plan(shape.T, shape.K, shape.V, bench_measure.DTYPES[dtype])


def kernel_work(shape: bench_measure.Shape, plan, *, dtype: str = "bf16") -> dict[str, Work]:
    """Work of each kernel in a forward+backward of `shape` (queries given, no initial state), by kernel name.

    Counted at the widths K and V, not at the padded ones; what several programs of a kernel load or compute again, once.
    Elementwise work and exponentials are not counted.
    """
    B, T, H, K, V = shape
    C, N, NB = plan.C, plan.N, plan.NB
    heads, blocks, chunks = B * H, B * H * NB, B * H * N
    # Chunks that a summary walks over: forward all but the last block's, backward all but the first's.
    summed, summed_back = heads * plan.R * (NB - 1), heads * (N - plan.R)
    # FLOP of the products of a chunk: [C, K] with [K, V], [C, C] with [C, V] or [C, K]. Bytes of its tiles: k, v, what kernels
    # hand on of their shapes, X, the state, one vector of gates, the state in float32.
    ckv, ccv, cck, ckk = 2 * C * K * V, 2 * C * C * V, 2 * C * C * K, 2 * C * K * K
    trace = 2 * K * K * V if dtype != "fp32" and plan.BK <= 64 else 0
    x, h = bench_measure.DTYPES[dtype].itemsize, 4 if dtype == "fp32" else 2
    k, v, v16, k16, X, S16, gate, S = C * K * x, C * V * x, C * V * h, C * K * h, C * C * h, K * V * h, 4 * C, K * V * 4
    inverse = 10 * (C // 16) * 2 * 16**3  # blocks of 16 tokens, X and its transpose, ...
    for half in (16, 32, 64):  # ... then pairs of halves, up to C, the transpose of the last one left out
        inverse += (3 if 2 * half < C else 2) * (C // (2 * half)) * 2 * half**3
    work = {
        "intra": Work(chunks * (cck + inverse), chunks * (k + v + 9 * gate + X)),
        "walk": Work(
            chunks * (3 * ckv + 2 * ccv + cck),
            chunks * (2 * k + 2 * v + X + 7 * gate + S16) + (heads + blocks * (NB > 1)) * S,
        )
        if plan.reads_as_it_walks
        else Work(
            chunks * (2 * ckv + ccv), chunks * (k + v + X + 4 * gate + S16 + v16) + (heads + blocks * (NB > 1)) * S
        ),
        "read_gradients": Work(
            chunks * (2 * ckv + 3 * ccv + 3 * cck), chunks * (3 * k + 2 * v + X + S16 + 7 * gate + k16 + v16)
        ),
        "walk_back": Work(
            (chunks + summed_back) * (3 * ckv + ccv),
            (chunks + summed_back) * (2 * k + v + X + v16 + 3 * gate)
            + (blocks + heads * (NB - 1)) * (NB > 1) * S
            + chunks * (S16 + v16),
        ),
        "gradients" if plan.BK <= 64 else "gradients_wide": Work(
            chunks * (3 * ckv + 3 * ccv + 2 * cck + trace),
            chunks * (2 * k + 2 * v + X + 2 * S16 + v16 + k16 + 14 * gate),
        ),
    }
    if not plan.reads_as_it_walks:
        work["read"] = Work(chunks * (ckv + ccv + cck), chunks * (2 * k + v + S16 + v16 + 3 * gate))
    if NB > 1:
        of_state, of_map = 2 * ckv + ccv, 2 * ckk + cck  # columns of v and of k
        work["summarise"] = Work(
            summed * of_state + chunks * of_map,
            summed * v + chunks * (k + X + 3 * gate) + blocks * K * K * h + heads * (NB - 1) * S,
        )
        work["scan"] = Work(2 * blocks * 2 * K * K * V, 2 * blocks * (K * K * h + 2 * S))  # forward and back
    return work


def kernel_table(row: dict, plan, *, rate: float) -> pd.DataFrame:
    """Each kernel of a speed row's forward+backward beside its roof, the longest first.

    rate: FLOP/s of a large matrix product. Columns: kernel, ms, share of time, GFLOP, MB, FLOP/byte, TFLOP/s, TB/s, and
    `of roof`, the least time that the two roofs allow over ms. What has no formula (copies, fills) has nan there; the last line
    is the sum.
    """
    spent = row["kernels"].get("forward_backward", {})
    work = kernel_work(bench_measure.Shape(*row["shape"]), plan, dtype=row["dtype"])
    lines, total = [], sum(spent.values())
    for name, ms in sorted(spent.items(), key=lambda item: -item[1]):
        lines.append((name, ms, *work.get(name, (math.nan, math.nan))))
    lines.append(("all kernels", total, *np.nansum([line[2:] for line in lines], axis=0)) if lines else ())
    table = pd.DataFrame([line for line in lines if line], columns=["kernel", "ms", "flops", "bytes"])
    seconds, least = table["ms"] / 1e3, np.maximum(table["flops"] / rate, table["bytes"] / row["bandwidth"])
    table["share of time"] = table["ms"] / total if total else math.nan
    table["GFLOP"], table["MB"] = table.pop("flops") / 1e9, table.pop("bytes") / 1e6
    table["FLOP/byte"] = 1e3 * table["GFLOP"] / table["MB"]
    table["TFLOP/s"], table["TB/s"] = table["GFLOP"] / 1e3 / seconds, table["MB"] / 1e6 / seconds
    table["of roof"] = least / seconds
    # Kernels run one after the other: what they allow together is the sum of what each does.
    table.loc[table["kernel"] == "all kernels", "of roof"] = least.iloc[:-1].sum() / seconds.iloc[-1] if total else 0
    return table
