"""The Triton kernels as PyTorch operators: shapes for tracing, gradients, and vmap. Nothing here computes.

    delta_write(q, k, v, beta, g, initial_state, ...)                 kernels.write, write_backward
    delta_read(q, k, g, gates, states, scales, new_v, links, ...)     kernels.read, read_backward
    delta_step(q, k, v, beta, g, state, ...)                          kernels.step
    window_attention(q, k, v, window)                                 kernels_window.forward, backward

Each is an operator `torch.ops.groundthink.*` and, with gradients, the Python function `write`, `read`, `step` or `attend`
below, which is what `core` and, for the last, `model` call. An operator returns no None: what is absent is an empty tensor of
shape [0]. A plain call, which goes past the operator, leaves it None: ten empty tensors a call take as long as two launches.

A memory that is read several times gets gradients from each read. Autograd adds up what arrives as gradients of one tensor,
but these are float32, and what a read takes in (new_v, states) is 16 bit. So delta_write also returns two `links`, float32 zeros
that take one element of storage: link_v [B, T, H, V] stands for new_v and link_s [B, N, H, K, V] for states. delta_read takes
them in, looks at neither, and returns the gradients of new_v and states as theirs.

Eager calls run an autograd function around the operator, which costs half of what the operator's own registered gradient does;
under torch.compile the operator itself goes into the graph. Both use the same functions. torch.func transforms work in eager
mode; torch.compile around torch.func.grad does not, as for any operator with a registered gradient. Letters: see core.py.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import library

# A notebook that reloads this module gets operators of another namespace: torch 2.11 confuses them where the same names are
# defined again. Those of before stay for graphs that hold them. Kept where a reload, which may empty this module, does not reach.
_libraries = vars(library).setdefault("_of_groundthink", [])
NAMESPACE = f"groundthink_{len(_libraries)}" if _libraries else "groundthink"
_libraries.append(library.Library(NAMESPACE, "FRAGMENT"))
PLAIN = (torch.Tensor, torch.nn.Parameter)  # and no subclass, which may want to see the operator


class Write(NamedTuple):
    """What delta_write returns: `out` and `state`, then what its backward and later reads need, then the links.

    kernels.Written has shapes, dtypes and meanings; what is None there may be an empty tensor here. A plain call that is not to
    be read later returns `out` and `state` alone.
    """

    out: torch.Tensor | None
    state: torch.Tensor
    gates: torch.Tensor | None = None
    inverse: torch.Tensor | None = None
    states: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    maps: torch.Tensor | None = None
    new_v: torch.Tensor | None = None
    link_v: torch.Tensor | None = None
    link_s: torch.Tensor | None = None

    @property
    def saved(self):
        """What kernels.write_backward takes of it."""
        return self[2:7]

    @property
    def links(self):
        return self.link_v, self.link_s


@functools.cache
def _kernels():
    """The workbook's kernels.py, imported on first use: machines without Triton get this far only by asking for it."""
    import kernels

    here = pathlib.Path(__file__).resolve().with_name("kernels.py")
    found = pathlib.Path(kernels.__file__ or "kernels").resolve()
    if not (hasattr(kernels, "plan") and hasattr(kernels, "write_backward")):
        raise ImportError(
            f"`import kernels` found {found}, which is not the workbook's {here}. A package of the same name is installed "
            "or was imported before: put the workbook's folder first on sys.path, or uninstall that package"
        )
    return kernels


@functools.cache
def _window_kernels():
    import kernels_window

    return kernels_window


# ------------------------------------------------------------------------------------------------ registration


def _fold(x, dim, members):
    """The mapped axis joined to the batch: [.., E, .., B, ..] to [E B, ...]; every member its own copy of what is shared."""
    if x is None or not isinstance(x, torch.Tensor) or x.numel() == 0:
        return x
    x = x.unsqueeze(0).expand(members, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def _members_join_the_batch(op):
    """The vmap rule of every operator here, all of whose tensors lead with B."""

    def rule(info, in_dims, *args):
        results = op(*(_fold(x, dim, info.batch_size) for x, dim in zip(args, in_dims, strict=True)))
        many = isinstance(results, tuple)
        results = results if many else (results,)
        absent = [x.dim() == 1 for x in results]
        results = tuple(x if a else x.unflatten(0, (info.batch_size, -1)) for x, a in zip(results, absent, strict=True))
        dims = tuple(None if a else 0 for a in absent)
        return (results, dims) if many else (results[0], dims[0])

    return rule


def _without_none(launch):
    """`launch` with an empty tensor, in the dtype of its first argument that is one, for every None among its results."""

    def full(*args):
        results = launch(*args)
        if not isinstance(results, tuple):
            return results
        like = next(x for x in args if x is not None)
        return tuple(like.new_empty(0) if x is None else x for x in results)

    return full


def _everything(inputs, output):
    return output


def _operator(
    name: str, schema: str, launch: Callable, fake: Callable, keep: Callable, backward: Callable, seen=_everything
):
    """Define an operator and return the function that calls it with gradients.

    `launch` runs it and `fake` describes its results; `keep(ctx, inputs, output)` and `backward(ctx, *grads)` are its gradient,
    as library.register_autograd and torch.autograd.Function take them. `seen(inputs, output)` is what a plain call with gradients
    returns of its results: autograd takes its time over each.
    """
    path, lib = f"{NAMESPACE}::{name}", _libraries[-1]
    library.define(path, schema, lib=lib, tags=(torch.Tag.pt2_compliant_tag,))
    # Where a graph breaks around an operator, Dynamo would trace into its launches.
    library.impl(path, ("cpu", "cuda"), torch.compiler.disable(_without_none(launch)), lib=lib)
    library.register_fake(path, fake, lib=lib)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    library.register_autograd(path, backward, setup_context=keep, lib=lib)
    library.register_vmap(path, _members_join_the_batch(op), lib=lib)

    def function(forward, **more):
        members = {n: staticmethod(method) for n, method in dict(forward=forward, backward=backward, **more).items()}
        return type(f"_{name}", (torch.autograd.Function,), members | dict(generate_vmap_rule=True))

    def run(ctx, *inputs):
        output = launch(*inputs)
        keep(ctx, inputs, output)
        return seen(inputs, output)

    # Transforms see the operator. A plain call goes past it, and past Function.apply's look at its signature: what
    # Function.apply ends in where no transform is active. Together these cost more than the launches of a small memory.
    transformed = function(lambda *args: op(*args), setup_context=keep).apply
    plain = super(torch.autograd.Function, function(run)).apply

    def call(*args):
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or type(args[1]) not in PLAIN:
            return op(*args)
        if torch._C._are_functorch_transforms_active():
            return transformed(*args) if torch.is_grad_enabled() else op(*args)
        wanted = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args)
        return plain(*args) if wanted else launch(*args)

    return call


def _keep_nothing(ctx, inputs, output):
    pass


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError("impl='triton' of the delta rule has no second derivative; impl='reference' has one")


def _no_derivative_of_a_step(ctx, *grads):
    raise NotImplementedError(
        "the one-token kernel has no derivative: core.delta_step takes another path where one is wanted"
    )


def wants_gradients(*tensors: torch.Tensor | None) -> bool:
    """Whether a gradient of any of them may be asked for. Under a functorch transform, where it cannot be seen, always."""
    if not torch.is_grad_enabled():
        return False
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return True
    return any(x is not None and x.requires_grad for x in tensors)


# ------------------------------------------------------------------------------------------------ shapes


def _dense(x):
    """Kernels take row-major tensors. Gradients arrive expanded, inputs as slices of one projection."""
    return x if x is None else x.contiguous()


def _links(k, v, N):
    """link_v and link_s. Two tensors of one element each, because results of an operator may not share storage."""
    B, T, H, K = k.shape
    V = v.shape[-1]
    zero = functools.partial(k.new_zeros, (), dtype=torch.float32)
    return zero().expand(B, T, H, V), zero().expand(B, N, H, K, V)


def _plan(k, V):
    """kernels.plan, for fake tensors too: where there is no GPU to ask, that of an H100."""
    kernels = _kernels()
    # A traced length becomes a number, since chunks and blocks follow from it: torch.compile compiles once per length.
    T, _, K, V = (int(x) for x in (*k.shape[1:], V))
    real = k.device.type == "cuda" and torch.cuda.is_available()
    return kernels.plan(T, K, V, k.dtype, *kernels.limits(k.device if real else torch.device("cpu")))


# ------------------------------------------------------------------------------------------------ write


def _write_backward(q, k, v, beta, g, S0, *rest):
    *saved_and_grads, scale, raw, norm_q, norm_k = rest
    tensors = (q, k, v, beta, g, S0, *saved_and_grads)
    tensors = [None if x is None or x.numel() == 0 else x.contiguous() for x in tensors]
    return _kernels().write_backward(*tensors, scale=scale, raw=raw, norm_q=norm_q, norm_k=norm_k)


def _write_backward_fake(q, k, v, beta, g, S0, *rest):
    return tuple(k.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, beta, g, S0))


_write_backward_call = _operator(
    "delta_write_backward",
    "(Tensor? q, Tensor k, Tensor v, Tensor beta, Tensor g, Tensor? initial_state, Tensor gates, Tensor inverse, "
    "Tensor states, Tensor scales, Tensor maps, Tensor? d_out, Tensor? d_state, Tensor? d_new_v, "
    "Tensor? d_states, float scale, bool raw, bool norm_q, bool norm_k) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbeta, "
    "Tensor dg, Tensor d_initial_state)",
    _write_backward,
    _write_backward_fake,
    _keep_nothing,
    _no_second_derivative,
)


def _write(q, k, v, beta, g, S0, scale, raw, norm_q, norm_k, saves, readable):
    tensors = map(_dense, (q, k, v, beta, g, S0))
    written = _kernels().write(
        *tensors, scale=scale, raw=raw, norm_q=norm_q, norm_k=norm_k, saves=saves, readable=readable
    )
    return Write(*written, *_links(k, v, written.states.shape[1])) if saves and readable else Write(*written)


def _write_fake(q, k, v, beta, g, S0, scale, raw, norm_q, norm_k, saves, readable):
    B, T, H, K = k.shape
    V = v.shape[-1]
    p, keeps = _plan(k, V), saves or readable
    C, N, half, full = p.C, p.N, torch.float32 if k.dtype == torch.float32 else torch.float16, torch.float32

    def new(wanted, dtype, *shape):
        return k.new_empty(shape, dtype=dtype) if wanted else k.new_empty(0)

    return Write(
        new(q is not None, v.dtype, B, T, H, V),
        new(True, full, B, H, K, V),
        new(keeps, full, B, N, H, 7, C),
        new(saves, half, B, N, H, C, C),
        new(keeps, half, B, N, H, K, V),
        new(keeps, full, B, H),
        new(saves and p.NB > 1, half, B, p.NB, H, K, K),
        new(readable, half, B, T, H, V),
        *(_links(k, v, N) if saves and readable else (k.new_empty(0), k.new_empty(0))),
    )


def _keep_write(ctx, inputs, output):
    *tensors, scale, raw, norm_q, norm_k, saves, _ = inputs
    written = Write(*output)
    ctx.set_materialize_grads(False)
    absent = [x for x in (written.out, *written.links) if x is not None and x.dim() == 1]
    ctx.mark_non_differentiable(*[x for x in (*written.saved, written.new_v, *absent) if x is not None])
    ctx.save_for_backward(*tensors, *written.saved)
    ctx.options, ctx.saves = (scale, raw, norm_q, norm_k), saves


def _write_seen(inputs, output):
    *_, readable = inputs
    return output if readable else output[:2]


def _write_gradients(ctx, d_out, d_state, *others):
    d_new_v, d_states = others[-2:] or (None, None)
    if not ctx.saves:
        raise RuntimeError("delta_write with saves=False keeps nothing that gradients could be computed from")
    q, *tensors = ctx.saved_tensors
    if d_out is None:  # written with queries, and what they read not used
        q = None
    dq, *grads, d_S0 = _write_backward_call(q, *tensors, d_out, d_state, d_new_v, d_states, *ctx.options)
    return None if q is None else dq, *grads, d_S0 if ctx.needs_input_grad[5] else None, *[None] * 6


_write_call = _operator(
    "delta_write",
    "(Tensor? q, Tensor k, Tensor v, Tensor beta, Tensor g, Tensor? initial_state, float scale, bool raw, bool norm_q, "
    "bool norm_k, bool saves, bool readable) -> (" + ", ".join(f"Tensor {name}" for name in Write._fields) + ")",
    _write,
    _write_fake,
    _keep_write,
    _write_gradients,
    _write_seen,
)


def write(
    q: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor,
    initial_state: torch.Tensor | None,
    *,
    scale: float = 1.0,
    raw: bool = False,
    norm_q: bool = False,
    norm_k: bool = False,
    readable: bool = False,
) -> Write:
    """Write a memory, and read it with q unless that is None. With `readable` the result can go to `read` as often as wanted.

    q, k `[B, T, H, K]`, v `[B, T, H, V]`, beta, g `[B, T, H]`, initial_state `[B, H, K, V]` float32: as `core.delta_rule` takes
    them, checked. Keeps what a backward needs only where a gradient can be asked for.
    """
    saves = wants_gradients(q, k, v, beta, g, initial_state)
    return Write(*_write_call(q, k, v, beta, g, initial_state, scale, raw, norm_q, norm_k, saves, readable))


# ------------------------------------------------------------------------------------------------ read


def _read_backward(*args):
    *tensors, scale, norm_q, norm_k = args
    return tuple(_kernels().read_backward(*map(_dense, tensors), scale=scale, norm_q=norm_q, norm_k=norm_k))


def _read_backward_fake(q, k, g, gates, states, scales, new_v, *rest):
    inputs = tuple(x.new_empty(x.shape) for x in (q, k, g))
    return *inputs, *(x.new_empty(x.shape, dtype=torch.float32) for x in (new_v, states))


_read_backward_call = _operator(
    "delta_read_backward",
    "(Tensor q, Tensor k, Tensor g, Tensor gates, Tensor states, Tensor scales, Tensor new_v, Tensor d_out, float scale, "
    "bool norm_q, bool norm_k) -> (Tensor dq, Tensor dk, Tensor dg, Tensor d_new_v, Tensor d_states)",
    _read_backward,
    _read_backward_fake,
    _keep_nothing,
    _no_second_derivative,
)


def _read(q, k, g, gates, states, scales, new_v, link_v, link_s, scale, norm_q, norm_k):
    tensors = map(_dense, (q, k, gates, states, scales, new_v))
    return _kernels().read(*tensors, scale=scale, norm_q=norm_q, norm_k=norm_k)


def _read_fake(q, k, g, gates, states, scales, new_v, link_v, link_s, scale, norm_q, norm_k):
    return q.new_empty(new_v.shape)


def _keep_read(ctx, inputs, output):
    *tensors, _link_v, _link_s, scale, norm_q, norm_k = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (scale, norm_q, norm_k)


def _read_gradients(ctx, d_out):
    dq, dk, dg, d_new_v, d_states = _read_backward_call(*ctx.saved_tensors, d_out, *ctx.options)
    if not ctx.needs_input_grad[7]:  # a memory that was written without gradients has no links
        d_new_v = d_states = None
    return dq, dk, dg, *[None] * 4, d_new_v, d_states, *[None] * 3


_read_call = _operator(
    "delta_read",
    "(Tensor q, Tensor k, Tensor g, Tensor gates, Tensor states, Tensor scales, Tensor new_v, Tensor? link_v, "
    "Tensor? link_s, float scale, bool norm_q, bool norm_k) -> Tensor",
    _read,
    _read_fake,
    _keep_read,
    _read_gradients,
)


def read(
    q: torch.Tensor,
    k: torch.Tensor,
    g: torch.Tensor,
    written: Write,
    *,
    scale: float = 1.0,
    norm_q: bool = False,
    norm_k: bool = False,
) -> torch.Tensor:
    """Read a memory with `q [B, T, H, K]`: `[B, T, H, V]` in the dtype of q. k, g and norm_k are those it was written with."""
    tensors = q, k, g, written.gates, written.states, written.scales, written.new_v, *written.links
    return _read_call(*tensors, scale, norm_q, norm_k)


# ------------------------------------------------------------------------------------------------ one token


def _step(q, k, v, beta, g, state, scale, raw, norm_q, norm_k):
    tensors = map(_dense, (q, k, v, beta, g, state))
    return tuple(_kernels().step(*tensors, scale=scale, raw=raw, norm_q=norm_q, norm_k=norm_k))


def _step_fake(q, k, v, beta, g, state, scale, raw, norm_q, norm_k):
    return v.new_empty(v.shape), state.new_empty(state.shape)


_step_call = _operator(
    "delta_step",
    "(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor g, Tensor state, float scale, bool raw, bool norm_q, bool norm_k) "
    "-> (Tensor out, Tensor next_state)",
    _step,
    _step_fake,
    _keep_nothing,
    _no_derivative_of_a_step,
)


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor,
    *,
    scale: float = 1.0,
    raw: bool = False,
    norm_q: bool = False,
    norm_k: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token: q, k `[B, H, K]`, v `[B, H, V]`, beta, g `[B, H]`, state `[B, H, K, V]` float32. Returns out and the next state.

    No gradients: `wants_gradients` says when to take another path.
    """
    return _step_call(q, k, v, beta, g, state, scale, raw, norm_q, norm_k)


# ------------------------------------------------------------------------------------------------ window attention

WINDOW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WINDOW_WIDTH = 128  # the widest head, kernels_window.WIDEST: known without importing Triton


def _no_second_derivative_of_attention(ctx, *grads):
    raise NotImplementedError(
        "window attention by a kernel has no second derivative; on a CPU and in float64 it has one"
    )


def _attend(q, k, v, window):
    return _window_kernels().forward(q, k, v, window)


def _attend_fake(q, k, v, window):
    B, T, H, D = q.shape
    return q.new_empty(B, T, H, D), q.new_empty(B, H, T, dtype=torch.float32)


def _attend_backward(q, k, v, out, lse, d_out, window):
    # One sequence for many members of a transform is a view without strides.
    return _window_kernels().backward(q, k, v, _dense(out), _dense(lse), d_out, window)


def _attend_backward_fake(q, k, v, out, lse, d_out, window):
    return tuple(q.new_empty(q.shape) for _ in range(3))


_attend_backward_call = _operator(
    "window_attention_backward",
    "(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor d_out, int window) -> (Tensor dq, Tensor dk, Tensor dv)",
    _attend_backward,
    _attend_backward_fake,
    _keep_nothing,
    _no_second_derivative_of_attention,
)


def _keep_attend(ctx, inputs, output):
    q, k, v, ctx.window = inputs
    out, lse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse)


def _attend_gradients(ctx, d_out, _):
    if d_out is None:
        return None, None, None, None
    return *_attend_backward_call(*ctx.saved_tensors, d_out, ctx.window), None


_attend_call = _operator(
    "window_attention",
    "(Tensor q, Tensor k, Tensor v, int window) -> (Tensor out, Tensor lse)",
    _attend,
    _attend_fake,
    _keep_attend,
    _attend_gradients,
)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Softmax attention of every token to itself and the window - 1 before it, scores over sqrt(D) (Dao, FlashAttention-2, 2023).

    q, k, v `[B, T, H, D]` of one dtype of WINDOW_DTYPES, D up to WINDOW_WIDTH; views are read as they lie where the last axis
    does. Returns `[B, T, H, D]`, contiguous. Keeps q, k, v, the result and `[B, H, T]` float32 for the backward pass.
    ValueError for other tensors and a window below 1; NotImplementedError where a second derivative is asked for. Like the
    operators above, of torch's transforms it takes vmap, grad and jacrev, and no forward-mode derivatives.
    """
    return _attend_call(q, k, v, window)[0]
