"""Linear maps that keep less for the backward pass: what is cheap is computed again, matrix products are not.

    a, b = lean.normed_linears(x, norm, [w1, w2])      a = w1(norm(x)), b = w2(norm(x)); keeps x, which the residual keeps
    y = lean.product_linear(a, b, w3, silu=True)       w3(silu(a) * b); keeps a and b

Written with plain operations, autograd keeps every intermediate: the normed x once in fp32 and, under autocast, once more
in bf16 for each weight; silu(a), and the product. At 2,048 x 8 tokens, d 512 and bf16 that is a third of a training step.
The plain operations run where a module is hooked or replaced, and where keeping less does not pay: on a CPU, whose memory
is not what a step runs out of and where computing again costs 7% of it; inside torch.func transforms, which cannot look
into these functions; and under torch.compile, which decides itself what to keep.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import chunked
import core

KEEP_ALL = ("cpu",)  # devices on which autograd keeps what it likes


def under_transform(*tensors: Tensor) -> bool:
    """Is one of them inside torch.func.vmap or torch.func.grad, where its values cannot be looked at?"""
    # Asked of the compiler first, which cannot trace the question; it is never at work inside a transform here.
    return not torch.compiler.is_compiling() and any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors))


def matmul_dtype(x: Tensor) -> torch.dtype:
    """What matrix products of x are computed in: the autocast dtype of its device, where autocast is on, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def full_precision(x: Tensor):
    """Autocast off, on the device of x."""
    return chunked.full_precision(x.device)


def keeps_all(x: Tensor, *others: Tensor) -> bool:
    """Whether operations on x and the others keep what autograd likes: the device of x, a transform of any of them or the
    compiler says so, or no gradient."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.device.type in KEEP_ALL:
        return True
    return under_transform(x, *others)


def _weight_gradient(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dy [..., n], x [..., m] -> [n, m], the gradient of w in y = x w^T."""
    return (dy.flatten(0, -2).mT @ x.flatten(0, -2)).to(dtype)


@chunked.applied
class _products_of_normed(torch.autograd.Function):
    """(x, scale, eps, dtype, n, weights) to rms_norm(x) w^T: the first n weights in `dtype`, the others in fp32 or wider."""

    @staticmethod
    def forward(ctx, x, scale, eps, dtype, n, *weights):
        ctx.eps, ctx.dtype, ctx.n = eps, dtype, n
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, scale, *weights)
        h = F.rms_norm(x, scale.shape, scale, eps)
        low, wide = h.to(dtype), h.to(torch.promote_types(h.dtype, torch.float32))
        inputs = (low if i < n else wide for i in range(len(weights)))
        return tuple(F.linear(y, w.to(y.dtype)) for y, w in zip(inputs, weights, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, scale, *weights = ctx.saved_tensors
        with full_precision(x):
            with torch.enable_grad():
                x, scale = x.detach().requires_grad_(), scale.detach().requires_grad_()
                h = F.rms_norm(x, scale.shape, scale, ctx.eps)
            low, wide = h.detach().to(ctx.dtype), h.detach().to(torch.promote_types(h.dtype, torch.float32))
            dh, d_weights = None, []
            for i, (dy, w) in enumerate(zip(grads, weights, strict=True)):
                if dy is None:  # a result that nothing used
                    d_weights.append(None)
                    continue
                y = low if i < ctx.n else wide
                d_weights.append(_weight_gradient(dy, y, w.dtype))
                part = dy @ w.to(y.dtype)
                dh = part.to(h.dtype) if dh is None else dh.add_(part)  # summed in the dtype of x, as autograd would
            dx, d_scale = (None, None) if dh is None else torch.autograd.grad(h, (x, scale), dh)
        return dx, d_scale, None, None, None, *d_weights


def _watched(*modules: nn.Module) -> bool:
    """Whether somebody looks at these modules or put others in their place: then each is called."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(type(m) not in (nn.Linear, nn.RMSNorm) or any(getattr(m, h) for h in hooks) for m in modules)


def _with_bias(y: Tensor, linear: nn.Linear) -> Tensor:
    return y if linear.bias is None else y + linear.bias.to(y.dtype)


def normed_linears(
    x: Tensor, norm: nn.RMSNorm, linears: list[nn.Linear], *, wide: list[nn.Linear] | tuple = ()
) -> tuple[Tensor, ...]:
    """linear(norm(x)) for every one of `linears`, in the dtype of matrix products, then for every one of `wide`, in fp32.

    x [..., d]; each result is [..., n]. Keeps x alone for the backward pass and normalises it once more there. Those of `wide`
    are thin: one product makes them all, so that norm(x) is read once.
    """
    watched = _watched(norm, *linears, *wide)
    if watched or keeps_all(x, norm.weight, *[m.weight for m in (*linears, *wide)]):
        h = norm(x)
        low = tuple(linear(h) for linear in linears)
        with full_precision(x):
            h = h.to(torch.promote_types(h.dtype, torch.float32)) if wide else h
            if watched or len(wide) < 2:
                return *low, *(linear(h) for linear in wide)
            return *low, *_parts(F.linear(h, torch.cat([m.weight for m in wide])), wide)
    dtype = matmul_dtype(x)
    with full_precision(x):
        weights = [m.weight for m in linears] + ([torch.cat([m.weight for m in wide])] if wide else [])
        products = _products_of_normed(x, norm.weight, norm.eps, dtype, len(linears), *weights)
        low = tuple(_with_bias(y, linear) for y, linear in zip(products, linears, strict=False))
        return *low, *(_parts(products[-1], wide) if wide else ())


def _parts(y: Tensor, linears) -> tuple[Tensor, ...]:
    """What each of `linears` gives, from the product of all of them."""
    parts = y.split([linear.out_features for linear in linears], -1)
    return tuple(_with_bias(part, linear) for part, linear in zip(parts, linears, strict=True))


@chunked.applied
class _linear_of_product(torch.autograd.Function):
    """(a, b, weight, silu) to (a * b) w^T, or (silu(a) * b) w^T; the last axes of a * b are joined to the width of w."""

    @staticmethod
    def forward(ctx, a, b, weight, silu):
        ctx.silu = silu
        ctx.save_for_backward(a, b, weight)
        product = (F.silu(a) if silu else a) * b
        return F.linear(product.flatten(2), weight.to(product.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        a, b, weight = ctx.saved_tensors
        with full_precision(dy):
            factor = F.silu(a) if ctx.silu else a
            product = factor * b
            d_weight = _weight_gradient(dy, product.flatten(2), weight.dtype)
            d_product = (dy @ weight.to(dy.dtype)).view(product.shape)
            del product
            da = (d_product * b).sum_to_size(a.shape)
            if ctx.silu:
                da = torch.ops.aten.silu_backward(da, a)
            return da, (d_product * factor).sum_to_size(b.shape), d_weight, None


def product_linear(a: Tensor, b: Tensor, linear: nn.Linear, *, silu: bool = False) -> Tensor:
    """linear(a * b), or linear(silu(a) * b): the product is formed again in the backward pass instead of being kept.

    a and b [B, T, ...] of one dtype, broadcast against each other; what follows T is joined to the input of `linear`, which
    has no bias. Returns [B, T, n].
    """
    if _watched(linear) or keeps_all(b, a, linear.weight):
        return linear(((F.silu(a) if silu else a) * b).flatten(2))
    dtype = matmul_dtype(b)
    with full_precision(b):
        return _linear_of_product(a.to(dtype), b.to(dtype), linear.weight, silu)


# ------------------------------------------------------------------------------------------------ loss


@chunked.applied
class summed_cross_entropy(torch.autograd.Function):
    """Sum over rows of cross-entropy(x W^T, target) that never holds more than `rows` rows of logits; -100 scores nothing.

    Both gradients are formed on the way forward, part by part; W's accumulates in fp32 whatever the matmul dtype. The loss
    is softplus(margin), margin = logsumexp of the other logits minus the target's, and not lse - target: once the model
    is sure, 1 - p is far below the rounding of lse, and a gradient made from p - 1 would point anywhere.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, rows, dtype, need):
        vocab, d = weight.shape
        wide = torch.promote_types(x.dtype, torch.float32)
        fused = x.device.type == "cuda" and core.triton_problem(x.device, dtype) is None
        # On a GPU rows of logits, and the rows of W that they come from, are padded to a multiple of 128: matrix products of
        # odd width are slow there.
        width = -(-vocab // 128) * 128 if fused else vocab
        w = F.pad(weight.to(dtype), (0, 0, 0, width - vocab)) if width > vocab else weight.to(dtype)
        margins = torch.empty(len(x), device=x.device, dtype=wide)
        dx = torch.empty_like(x, dtype=dtype) if need else None
        dw = torch.zeros_like(w, dtype=wide) if need else None
        logits = x.new_empty(min(rows, len(x)), width, dtype=dtype)
        for start in range(0, len(x), rows):
            part, target = x[start : start + rows].to(dtype), targets[start : start + rows]
            grad = torch.mm(part, w.T, out=logits[: len(part)])
            if fused:
                import kernels_loss

                margins[start : start + rows] = kernels_loss.margins_(grad, target, vocab, gradient=need)
            else:
                margins[start : start + rows], grad = _margins(grad.to(wide), target, need)
            if need:
                grad = grad.to(dtype)
                torch.mm(grad, w, out=dx[start : start + rows])
                _add_product(dw, grad.T, part)
            del grad
        if need:
            ctx.save_for_backward(dx, dw[:vocab])
            ctx.dtypes = x.dtype, weight.dtype
        return F.softplus(margins).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        # In place: it is the gradient of W as soon as it is scaled. A second backward of the same loss is an error of autograd.
        return (dx * grad).to(ctx.dtypes[0]), dw.mul_(grad).to(ctx.dtypes[1]), None, None, None, None


def _margins(logits: Tensor, target: Tensor, need: bool) -> tuple[Tensor, Tensor | None]:
    """logits [n, vocab], target [n] -> margins [n], -inf where target is -100, and, in place of the logits, their gradient."""
    unscored, target = (target == -100)[:, None], target.clamp_min(0)[:, None]
    right = logits.gather(1, target)
    logits.scatter_(1, target, -math.inf)
    others = torch.logsumexp(logits, dim=-1, keepdim=True)
    margin = (others - right).masked_fill_(unscored, -math.inf)
    if not need:
        return margin[:, 0], None
    wrong = torch.sigmoid(margin)  # 1 - p(target), to relative precision
    return margin[:, 0], logits.sub_(others).exp_().mul_(wrong).scatter_(1, target, -wrong)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, accumulated in the dtype of `total`, which may be wider than that of a and b."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cuda" and _mixed_addmm(total.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


@functools.cache
def _mixed_addmm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this release of torch adds a product of `dtype` matrices to an fp32 one without a copy between."""
    total, a = torch.ones(16, 16, device=device), torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())
