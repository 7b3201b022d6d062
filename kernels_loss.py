"""The softmax of the loss as one Triton kernel: logits in, margins out, and the gradient in place of the logits.

The vocabulary is read twice and written once, in the dtype of the matrix products; arithmetic is fp32. Never imported on a
machine without Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK, WARPS = 4096, 8  # columns at a time, and the warps that share them
IGNORED = tl.constexpr(-100)  # as torch.nn.functional.cross_entropy has it
LOWEST = tl.constexpr(-3.0e38)  # below any logit; unlike -inf it can be subtracted from itself


@triton.jit
def _margins_kernel(logits, targets, margins, columns, stride, BLOCK: tl.constexpr, GRADIENT: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row).to(tl.int32)
    scored = target != IGNORED
    known = (target >= 0) & (target < columns)
    right = tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32)

    # logsumexp over every column but the target's. Each lane keeps its own maximum and sum; they meet once, at the end.
    best = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        others = (column < columns) & (column != target)
        # Padding is loaded and then left out: a mask that ends at the vocabulary would split the loads into single numbers.
        x = tl.load(logits + column, mask=column < stride, other=0.0).to(tl.float32)
        x = tl.where(others, x, LOWEST)
        higher = tl.maximum(best, x)
        total = total * tl.exp(best - higher) + tl.where(others, tl.exp(x - higher), 0.0)
        best = higher
    highest = tl.max(best, axis=0)
    rest = highest + tl.log(tl.sum(total * tl.exp(best - highest), axis=0))
    margin = rest - right
    tl.store(margins + row, tl.where(scored, margin, float("-inf")))

    if GRADIENT:
        # d loss / d logit: p_j = softmax over the others times 1 - p(target), and p(target) - 1 = -(1 - p(target)).
        wrong = tl.where(scored, 1.0 / (1.0 + tl.exp(-margin)), 0.0)
        for start in range(0, stride, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(logits + column, mask=column < stride, other=0.0).to(tl.float32)
            grad = tl.where(column == target, -wrong, tl.exp(tl.minimum(x - rest, 0.0)) * wrong)
            grad = tl.where(column < columns, grad, 0.0)
            tl.store(logits + column, grad.to(logits.dtype.element_ty), mask=column < stride)


def margins_(logits: torch.Tensor, targets: torch.Tensor, vocab: int, *, gradient: bool) -> torch.Tensor:
    """Margins of rows of logits; with `gradient` the logits are overwritten by that of sum softplus(margin).

    logits [n, width] with the vocabulary in the first `vocab` columns; the others are padding and become zero. targets [n]
    int64, -100 where nothing is scored: gradient 0 and margin -inf there; any other number outside the vocabulary gives NaN.
    Returns [n] fp32: logsumexp of the other logits minus the target's, whose softplus is the cross-entropy.
    """
    margins = torch.empty(len(logits), device=logits.device, dtype=torch.float32)
    if len(logits):
        block = min(BLOCK, triton.next_power_of_2(vocab))
        with torch.cuda.device_of(logits):  # Triton launches on the current device
            _margins_kernel[(len(logits),)](
                logits, targets, margins, vocab, logits.stride(0), BLOCK=block, GRADIENT=gradient, num_warps=WARPS
            )
    return margins
