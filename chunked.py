"""The gated delta rule in chunks, in plain PyTorch: runs on every device. `core` checks the input and calls it.

Inside a chunk of C tokens with entry state S, and with gc the running sum of g from the chunk's start:

    L[i, j] = beta_i (k_i . k_j) e^(gc_i - gc_j)  for j < i          what token i erases of what token j wrote
    T       = (I + L)^-1
    new_v   = T (beta v - beta e^gc (k S))                           the values that are written in the end
    S'      = e^gc_last S + (e^(gc_last - gc) k)^T new_v             the next chunk's entry state
    out     = scale (e^gc (q S) + tril(q k^T e^(gc_i - gc_j)) new_v)

so only the two products with S wait for the chunk before. With erase="raw" token i recalls from a state that has decayed up to
token i - 1 only: gc_i becomes gc_{i-1} in L and in front of k S, and nothing is divided by a decay that may have underflowed.

Written as two autograd functions with hand-written backwards, because autograd's own would keep a dozen tensors of this
size: `write` maps (k, v, beta, g, S0) to (new_v, states, T), `read` adds the queries. Both keep their inputs and outputs and
rebuild the rest. What lies between is laid out chunks first, [N, B H, C, *], so that the chunks of one step of the chain
lie together, and is built for a group of chunks at a time: on a CPU a group fits in cache, where fresh memory, every page
of which costs a fault, would take longer to come by than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

GROUP_CPU, GROUP_GPU = 64, 2048  # chunks of C tokens, over all sequences and heads, that are worked on at once


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the state and of all arithmetic for inputs of `dtype`: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_precision(device: torch.device):
    """Autocast off: the recurrence sums over thousands of tokens, which bfloat16 products would not survive."""
    return torch.autocast(device_type=device.type, enabled=False)


class _Layout:
    """Where the chunks of `x [B, T, H, *]` lie, and which of them are worked on together."""

    def __init__(self, x, C):
        self.B, self.T, self.H = x.shape[:3]
        self.C, self.N, self.BH = C, -(-self.T // C), self.B * self.H
        at_once = GROUP_CPU if x.device.type == "cpu" else GROUP_GPU
        step = max(1, at_once // self.BH)
        self.groups = [(a, min(a + step, self.N)) for a in range(0, self.N, step)]

    def load(self, x, a, b):
        """Chunks a to b of x [B, T, H, *] as [(b - a) B H, C, *] in the dtype of the arithmetic, zeros after the last token.

        A padded token has k = 0, beta = 0 and g = 0, and so leaves the state as it is.
        """
        x = x[:, a * self.C : b * self.C]
        missing = (b - a) * self.C - x.shape[1]
        if missing:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
        x = x.reshape(self.B, b - a, self.C, self.H, *x.shape[3:]).transpose(0, 1).movedim(3, 2)  # [n, B, H, C, *]
        return x.reshape(-1, self.C, *x.shape[4:]).to(state_dtype(x.dtype)).contiguous()

    def store(self, x, chunks, a, b):
        """The inverse of `load`: writes the chunks into x [B, T, H, *], padding dropped."""
        chunks = chunks.reshape(b - a, self.B, self.H, self.C, *chunks.shape[2:]).movedim(2, 3).transpose(0, 1)
        x = x[:, a * self.C : b * self.C]
        if x.shape[1] < (b - a) * self.C:
            x.copy_(chunks.flatten(1, 2)[:, : x.shape[1]])
        else:
            x.unflatten(1, (b - a, self.C)).copy_(chunks)

    def steps(self, x, a, b):
        """[(b - a) B H, *] as [b - a, B H, *]: one entry per step of the chain."""
        return x.unflatten(0, (b - a, self.BH))


def _cumulative(g):
    """Running sums of g [M, C] inside each chunk, as a coarse part and a remainder whose sum they are.

    One closed gate (g = -50, or -inf) would otherwise cost every later difference of sums its last digits. Multiples of 1/16
    above the clamp add up without rounding in float32, so the coarse parts cancel exactly and only the remainder rounds. The
    clamp changes nothing: one factor of e^-128 is already zero in float32 (e^-1024 in float64).
    """
    g = g.clamp(min=-1024.0 if g.dtype == torch.float64 else -128.0)
    coarse = torch.round(g * 16) / 16
    return coarse.cumsum(1), (g - coarse).cumsum(1)


def _decays(g, *, raw=False, strict=False):
    """Decay factors inside chunks of log-decays g [M, C].

    from_start [M, C]  e^gc_i: from the chunk's start to token i (raw: to token i - 1)
    to_end [M, C]      e^(gc_last - gc_i)
    whole [M]          e^gc_last
    pairs [M, C, C]    e^(gc_i - gc_j) for j <= i (strict: j < i; raw: gc_{i-1}), zero above
    """
    coarse, rest = _cumulative(g)
    to_end = ((coarse[:, -1:] - coarse) + (rest[:, -1:] - rest)).exp_()
    whole = (coarse[:, -1] + rest[:, -1]).exp_()
    row_coarse, row_rest = (F.pad(x, (1, -1)) for x in (coarse, rest)) if raw else (coarse, rest)
    pairs = row_coarse[:, :, None] - coarse[:, None, :]
    pairs += row_rest[:, :, None]
    pairs -= rest[:, None, :]
    # Masked before exp, where the differences above the diagonal would overflow, and again after it: on a CPU filling with -inf
    # and its exp take ten times as long.
    diagonal = -1 if strict else 0
    pairs.tril_(diagonal).exp_().tril_(diagonal)
    return (row_coarse + row_rest).exp_(), to_end, whole, pairs


def _after(x):
    """Sum over this token and the later ones: reverse cumulative sum over the last axis."""
    return x.flip(-1).cumsum(-1).flip(-1)


def _gate_gradient(g, dg):
    """dg, and zero where e^g is zero: a gradient of g has the factor e^g, which sums that cancel do not show exactly."""
    return torch.where(g.exp() > 0, dg, 0.0)


def _dot(x, y):
    """Scalar product over the last axis."""
    return (x * y).sum(-1)


def _rows(factor, x):
    """factor [M, C] times the rows of x [M, C, *]."""
    return factor[:, :, None] * x


def _write_group(lay, a, b, k, v, beta, g, new_v, states, T, raw):
    """Write chunks a to b. Fills new_v and T [b - a, B H, C, *] and states[1:], the entry state being states[0]."""
    k, v, beta, g = (lay.load(x, a, b) for x in (k, v, beta, g))
    from_start, to_end, whole, pairs = _decays(g, raw=raw, strict=True)
    L = torch.bmm(_rows(beta, k), k.mT).mul_(pairs)
    eye = torch.eye(lay.C, dtype=k.dtype, device=k.device).expand_as(L)
    # Solved from the right, whose row-major result needs no copy. Substitution keeps its accuracy where keys are nearly
    # parallel; a product of powers of L does not.
    T = T.flatten(0, 1)
    torch.linalg.solve_triangular(L, eye, upper=False, unitriangular=True, left=False, out=T)
    T_beta = T * beta[:, None, :]
    # W S is what the entry state S takes away from the new_v of an empty one.
    torch.bmm(T_beta, v, out=new_v.flatten(0, 1))
    W = lay.steps(torch.bmm(T_beta, _rows(from_start, k)), a, b)
    k_end = lay.steps(_rows(to_end, k), a, b).mT
    whole = lay.steps(whole, a, b)[:, :, None, None]
    for n in range(b - a):
        new_v[n].baddbmm_(W[n], states[n], alpha=-1)
        torch.mul(states[n], whole[n], out=states[n + 1]).baddbmm_(k_end[n], new_v[n])


def _read_group(lay, a, b, q, k, g, new_v, states, out, scale):
    """Read chunks a to b into out [B, T, H, V]."""
    q, k, g = (lay.load(x, a, b) for x in (q, k, g))
    from_start, _, _, pairs = _decays(g)
    o = torch.bmm(_rows(from_start, q), states.flatten(0, 1))
    o.baddbmm_(torch.bmm(q, k.mT).mul_(pairs), new_v.flatten(0, 1), beta=scale, alpha=scale)
    lay.store(out, o, a, b)


def _buffers(lay, n, k, v, S0):
    """new_v, states (with the entry state in the first) and T for n chunks."""
    dtype, K, V = state_dtype(k.dtype), k.shape[-1], v.shape[-1]
    new_v = k.new_empty(n, lay.BH, lay.C, V, dtype=dtype)
    states = k.new_empty(n + 1, lay.BH, K, V, dtype=dtype)
    states[0] = 0.0 if S0 is None else S0.reshape(lay.BH, K, V)
    return new_v, states, k.new_empty(n, lay.BH, lay.C, lay.C, dtype=dtype)


def _write_forward(k, v, beta, g, S0, C, raw):
    lay = _Layout(k, C)
    new_v, states, T = _buffers(lay, lay.N, k, v, S0)
    for a, b in lay.groups:
        _write_group(lay, a, b, k, v, beta, g, new_v[a:b], states[a : b + 1], T[a:b], raw)
    return new_v, states, states[-1].reshape(lay.B, lay.H, *states.shape[2:]).clone(), T


def _read_forward(q, k, g, new_v, states, scale, C):
    lay = _Layout(q, C)
    out = q.new_empty(*q.shape[:3], new_v.shape[-1])
    for a, b in lay.groups:
        _read_group(lay, a, b, q, k, g, new_v[a:b], states[a:b], out, scale)
    return out


def _both_forward(q, k, v, beta, g, S0, scale, C, raw):
    """Write and read group by group, keeping nothing: for when no gradient is wanted."""
    lay = _Layout(q, C)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    new_v, states, T = _buffers(lay, lay.groups[0][1], k, v, S0)
    for a, b in lay.groups:
        n = b - a
        _write_group(lay, a, b, k, v, beta, g, new_v[:n], states[: n + 1], T[:n], raw)
        _read_group(lay, a, b, q, k, g, new_v[:n], states[:n], out, scale)
        states[0] = states[n]
    return out, states[0].reshape(lay.B, lay.H, *states.shape[2:]).clone()


def _write_backward(k, v, beta, g, new_v, states, T, d_new_v, d_states, d_last, C, raw):
    lay = _Layout(k, C)
    K, V = states.shape[-2:]
    dk, dv, d_beta, dg = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v, beta, g))
    dS = d_states[-1] + d_last.reshape(lay.BH, K, V)
    for a, b in reversed(lay.groups):
        k_, v_, beta_, g_ = (lay.load(x, a, b) for x in (k, v, beta, g))
        from_start, to_end, whole, pairs = _decays(g_, raw=raw, strict=True)
        T_t, new_v_, S = T[a:b].flatten(0, 1).mT, new_v[a:b].flatten(0, 1), states[a:b].flatten(0, 1)
        # gR, the gradient of R = beta (v - e^gc k S), is T^T d_new_v, where d_new_v is what the reads send plus k_end dS', dS'
        # the gradient of the state that the chunk leaves: the chain runs backwards over dS.
        X = lay.steps(torch.bmm(T_t, _rows(to_end, k_)), a, b)
        gR = torch.bmm(T_t, d_new_v[a:b].flatten(0, 1))
        gR_steps = lay.steps(gR, a, b)
        k_start = lay.steps(_rows(beta_ * from_start, k_), a, b).mT
        whole_ = lay.steps(whole, a, b)[:, :, None, None]
        d_ends = torch.empty_like(S)
        d_ends_steps = lay.steps(d_ends, a, b)
        for n in reversed(range(b - a)):
            d_ends_steps[n] = dS
            gR_steps[n].baddbmm_(X[n], dS)
            dS.mul_(whole_[n]).add_(d_states[a + n]).baddbmm_(k_start[n], gR_steps[n], alpha=-1)
        # gL = -tril(gR new_v^T, -1); `pairs` is zero where it must not count.
        M = torch.bmm(gR, new_v_.mT).mul_(pairs).neg_()
        recall = _rows(from_start, torch.bmm(gR, S.mT))
        write = _rows(to_end, torch.bmm(new_v_, d_ends.mT))
        rows = torch.bmm(M, k_).sub_(recall)
        cols = torch.bmm(M.mT, _rows(beta_, k_))
        # The gradient of a factor inside a product with k is the dot product of k and that product's share of dk: no [C, C] sums.
        d_row = _dot(k_, rows)
        to_last = _dot(k_, write)
        lay.store(d_beta, _dot(gR, v_) + d_row, a, b)
        d_row *= beta_
        if raw:  # row i decays up to token i - 1 only
            d_row = F.pad(d_row, (-1, 1))
        d_whole = whole * _dot(d_ends.flatten(1), S.flatten(1))
        dg_ = _after(d_row - _dot(k_, cols)) + F.pad(to_last.cumsum(1), (1, -1)) + d_whole[:, None]
        lay.store(dg, _gate_gradient(g_, dg_), a, b)
        lay.store(dk, write.add_(cols).add_(_rows(beta_, rows)), a, b)
        lay.store(dv, _rows(beta_, gR), a, b)
    return dk, dv, d_beta, dg, dS.reshape(lay.B, lay.H, K, V)


def _read_backward(q, k, g, new_v, states, d_out, scale, C):
    lay = _Layout(q, C)
    dq, dk, dg = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, g))
    d_new_v, d_states = torch.empty_like(new_v), torch.empty_like(states)
    d_states[-1] = 0.0  # no chunk reads the last state
    for a, b in lay.groups:
        q_, k_, g_, d_out_ = (lay.load(x, a, b) for x in (q, k, g, d_out))
        q_ = q_ * scale
        from_start, _, _, pairs = _decays(g_)
        torch.bmm(torch.bmm(q_, k_.mT).mul_(pairs).mT, d_out_, out=d_new_v[a:b].flatten(0, 1))
        torch.bmm(_rows(from_start, q_).mT, d_out_, out=d_states[a:b].flatten(0, 1))
        M = torch.bmm(d_out_, new_v[a:b].flatten(0, 1).mT).mul_(pairs)
        # A token's read of its own write does not decay. Kept apart, or its two equal terms in dg would cancel to rounding only.
        diagonal = M.diagonal(dim1=1, dim2=2)
        own = diagonal.clone()
        diagonal.zero_()
        rows = _rows(from_start, torch.bmm(d_out_, states[a:b].flatten(0, 1).mT)).baddbmm_(M, k_)
        cols = torch.bmm(M.mT, q_)
        lay.store(dg, _gate_gradient(g_, _after(_dot(q_, rows) - _dot(k_, cols))), a, b)
        lay.store(dq, rows.add_(_rows(own, k_)).mul_(scale), a, b)
        lay.store(dk, cols.add_(_rows(own, q_)), a, b)
    return dq, dk, dg, d_new_v, d_states


def _folds_members(inputs, outputs):
    """Class decorator: torch.func.vmap over an autograd function joins the mapped axis to the batch.

    `inputs` and `outputs` give the position of the batch axis B in every tensor argument and result. The functions
    themselves then only ever see plain tensors, and may write in place.
    """

    def decorate(cls):
        def vmap(info, in_dims, *args):
            E = info.batch_size

            def fold(x, dim, axis):
                x = (
                    x.unsqueeze(axis).expand(*x.shape[:axis], E, *x.shape[axis:])
                    if dim is None
                    else x.movedim(dim, axis)
                )
                return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

            tensors = [x if x is None else fold(x, d, axis) for x, d, axis in zip(args, in_dims, inputs, strict=False)]
            results = cls.apply(*tensors, *args[len(inputs) :])
            many = isinstance(results, tuple)
            results = [
                x.unflatten(axis, (E, -1)) for x, axis in zip(results if many else (results,), outputs, strict=True)
            ]
            return (tuple(results), outputs) if many else (results[0], outputs[0])

        cls.vmap = staticmethod(vmap)
        return applied(cls)

    return decorate


def applied(cls: type[torch.autograd.Function]) -> Callable:
    """`cls.apply`, in place of the class: IPython's autoreload walks the classes of a module it reloads, attribute by attribute,
    and from one of these, whose `_backward_cls` leads back to it, never returns."""
    return cls.apply


class _NoBackward:
    """A function that vmap folds and nothing differentiates: the backwards, and the forward that keeps nothing for one."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError("impl='torch' of the delta rule has no second derivative; impl='reference' has one")


@_folds_members(inputs=(0, 0, 0, 0, 1, 1, 1, 1, 1, 0), outputs=(0, 0, 0, 0, 0))
class _differentiate_write(_NoBackward, torch.autograd.Function):
    forward = staticmethod(_write_backward)


@_folds_members(inputs=(0, 0, 0, 1, 1, 0), outputs=(0, 0, 0, 1, 1))
class _differentiate_read(_NoBackward, torch.autograd.Function):
    forward = staticmethod(_read_backward)


@_folds_members(inputs=(0, 0, 0, 0, 0, 0), outputs=(0, 0))
class both(_NoBackward, torch.autograd.Function):
    """(q, k, v, beta, g, S0) to out [B, T, H, V] and the last state [B, H, K, V], where no gradient is wanted."""

    forward = staticmethod(_both_forward)


@_folds_members(inputs=(0, 0, 0, 0, 0), outputs=(1, 1, 0, 1))
class write(torch.autograd.Function):
    """(k, v, beta, g, S0) to new_v [N, B H, C, V], states [N + 1, B H, K, V], the last again [B, H, K, V], T [N, B H, C, C]."""

    forward = staticmethod(_write_forward)

    @staticmethod
    def setup_context(ctx, inputs, output):
        k, v, beta, g, S0, ctx.C, ctx.raw = inputs
        new_v, states, last, T = output
        ctx.has_entry, ctx.last_shape = S0 is not None, last.shape
        ctx.mark_non_differentiable(T)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(k, v, beta, g, new_v, states, T)

    @staticmethod
    def backward(ctx, d_new_v, d_states, d_last, _):
        *_, new_v, states, _ = ctx.saved_tensors
        if d_new_v is None:  # never read
            d_new_v, d_states = torch.zeros_like(new_v), torch.zeros_like(states)
        if d_last is None:
            d_last = states.new_zeros(ctx.last_shape)
        with full_precision(d_last.device):
            *grads, dS = _differentiate_write(*ctx.saved_tensors, d_new_v, d_states, d_last, ctx.C, ctx.raw)
        return *grads, dS if ctx.has_entry else None, None, None


@_folds_members(inputs=(0, 0, 0, 1, 1), outputs=(0,))
class read(torch.autograd.Function):
    """(q, k, g, new_v, states) to out [B, T, H, V]."""

    forward = staticmethod(_read_forward)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scale, ctx.C = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, d_out):
        with full_precision(d_out.device):
            return *_differentiate_read(*ctx.saved_tensors, d_out, ctx.scale, ctx.C), None, None
