"""kernel_ops.py: the operators around the kernels. What the kernels compute, and how exactly, is test_kernels.py's matter.

The cases run twice: on a GPU, and without one in Triton's interpreter, which has to be chosen before Triton is imported and so
gets a process of its own. `python tests/test_kernel_ops.py` is that process: it runs every case and prints what each raised.
"""

from __future__ import annotations

import importlib
import sys
import types

import kernel_child as child
import pytest
import torch
from test_core import NAMES, draw
from torch import library
from torch.func import grad, vmap

import core
import kernel_ops
import model

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# bfloat16 is wrong in the interpreter. Key and value widths that fill no tile, and lengths of one block and of several.
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if CUDA else (torch.float32, torch.float16)
SIZES = ((3, 150, 2, 24, 40), (2, 2000, 2, 64, 64)) if CUDA else ((2, 20, 1, 5, 7), (1, 300, 1, 5, 7))
# Largest relative error of a result against the float64 reference: a wrong link or a lost gradient is off by more than a tenth.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def inputs(size, dtype=torch.float32, *, seed=0, requires_grad=False):
    """Arguments by name, with `second`, a second set of queries."""
    x = draw(*size, dtype=dtype, seed=seed, device=DEVICE)
    x["second"] = draw(*size, dtype=dtype, seed=seed + 100, device=DEVICE)["q"]
    return {name: y.requires_grad_(requires_grad) for name, y in x.items()}


def through_memory(impl, q, k, v, beta, g, initial_state, second):
    """out, a second read with normalised queries, and the state."""
    memory = core.delta_write(k, v, beta, g, initial_state=initial_state, erase="raw", normalize_k=True, impl=impl)
    return memory.read(q), memory.read(second, 0.4, normalize=True), memory.state


def read_as_written(impl, q, k, v, beta, g, initial_state, second):
    """As `through_memory`, the first read in one call with the write."""
    options = dict(initial_state=initial_state, erase="raw", normalize_k=True, impl=impl)
    memory = core.delta_write(k, v, beta, g, q=q, **options)
    return memory.out, memory.read(second, 0.4, normalize=True), memory.state


def through_rule(impl, q, k, v, beta, g, initial_state, second):
    return core.delta_rule(q, k, v, beta, g, scale=0.7, initial_state=initial_state, normalize_qk=True, impl=impl)


def loss(results):
    return 0.1 * sum((n + 1) * y.float().square().sum() for n, y in enumerate(results))  # gradients within float16


def everything(function, impl, x):
    """Results and gradients of `loss`; `second` has none where it is not read."""
    leaves = {name: y.detach().clone().requires_grad_() for name, y in x.items()}
    results = function(impl, **leaves)
    grads = torch.autograd.grad(loss(results), list(leaves.values()), allow_unused=True)
    return [*(y.detach() for y in results), *(d for d in grads if d is not None)]


def close(given, expected, tolerance):
    assert len(given) == len(expected)
    for n, (a, b) in enumerate(zip(given, expected, strict=True)):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert a.shape == b.shape and error <= tolerance, f"result {n}: {error:.1e}"


def same(given, expected):
    """Bit for bit."""
    assert len(given) == len(expected)
    for n, (a, b) in enumerate(zip(given, expected, strict=True)):
        assert a.dtype == b.dtype and torch.equal(a, b), f"result {n} differs"


def refuses(call):
    try:
        call()
    except NotImplementedError as error:
        assert "reference" in str(error)
    else:
        raise AssertionError("a second derivative was not refused")


# ------------------------------------------------------------------------------------------------ cases


def case_opcheck():
    """Schema, autograd registration, fake tensors and tracing with dynamic shapes, of every operator and its absent outputs. One
    dtype: none of that depends on it."""
    ops = torch.ops.groundthink

    def opcheck(op, *args):
        library.opcheck(op.default, args)

    for size in SIZES if CUDA else SIZES[:1]:
        for dtype in DTYPES[-1:]:
            for wanted in (True, False):
                q, k, v, beta, g, S0, _ = inputs(size, dtype, requires_grad=wanted).values()
                norms = (True, False)
                opcheck(ops.delta_write, q, k, v, beta, g, S0, 0.7, False, *norms, wanted, False)
                opcheck(ops.delta_write, None, k, v, beta, g, None, 1.0, True, *norms, wanted, True)
                opcheck(ops.delta_write, q, k, v, beta, g, None, 1.0, True, *norms, wanted, True)
                plain = tuple(y.detach() for y in (q, k, v, beta, g, S0))
                written = kernel_ops.Write(*ops.delta_write.default(*plain, 1.0, False, *norms, True, True))
                links = tuple(torch.zeros_like(y).requires_grad_(wanted) for y in written.links)
                memory = (written.gates, written.states, written.scales, written.new_v)
                opcheck(ops.delta_read, q, k, g, *memory, *links, 0.5, True, False)
            d_out, d_state = torch.ones_like(plain[2]), torch.ones_like(plain[5])
            later = tuple(torch.ones_like(y) for y in links)
            saved = written.saved
            opcheck(ops.delta_write_backward, *plain, *saved, d_out, None, *later, 0.5, True, *norms)
            no_queries = (None, *plain[1:5], None)
            opcheck(ops.delta_write_backward, *no_queries, *saved, None, d_state, None, None, 1.0, False, *norms)
            opcheck(ops.delta_read_backward, plain[0], plain[1], plain[4], *memory, d_out, 0.5, True, False)
            token = tuple(y[:, 0] for y in plain[:5])
            opcheck(ops.delta_step, *token, plain[5], 0.5, False, True, True)


def gradients_reach_every_input(dtype):
    """One write, two reads, the state; the first read with the write; the fused call. For both numbers of blocks."""
    for size in SIZES:
        x = inputs(size, dtype)
        for function in (through_memory, read_as_written, through_rule):
            exact = everything(function, "reference", {name: y.double() for name, y in x.items()})
            close(everything(function, "triton", x), exact, TOLERANCE[dtype])


def case_gradients_of_float32_reach_every_input():
    gradients_reach_every_input(torch.float32)


def case_gradients_of_16_bit_reach_every_input():
    for dtype in DTYPES[1:]:
        gradients_reach_every_input(dtype)


def case_gradients_of_some_inputs_through_some_results():
    """What is not asked for must not change what is."""
    x = inputs(SIZES[0])
    for use in ((0,), (1,), (2,), (0, 2)):
        for names in (("v",), ("second",), ("beta", "initial_state"), ("k", "g")):
            grads = []
            for impl in ("triton", "reference"):
                leaves = {n: y.detach().clone().requires_grad_(n in names) for n, y in x.items()}
                results = through_memory(impl, **leaves)
                wanted = [leaves[n] for n in names]
                total = loss([results[n] for n in use]) + 0 * sum(y.sum() for y in wanted)
                grads.append(torch.autograd.grad(total, wanted))
            for a, b in zip(*grads, strict=True):
                assert (a - b).norm() <= TOLERANCE[torch.float32] * b.norm(), (use, names)


def case_nothing_is_kept_without_gradients():
    q, k, v, beta, g, S0, _ = inputs(SIZES[0], requires_grad=True).values()
    with torch.no_grad():
        written = kernel_ops.write(q, k, v, beta, g, S0)
    assert not written.out.requires_grad and all(y is None for y in written[2:])
    written = kernel_ops.write(q, k, v, beta, g, S0)
    assert written.out.requires_grad and all(y is None for y in written[2:])
    gates, inverse, states, *_ = written.out.grad_fn.saved_tensors[6:]  # kept, and not returned
    assert gates.numel() and inverse.numel() and states.numel()
    written = kernel_ops.write(None, k, v, beta, g, S0, readable=True)
    assert written.inverse.numel() and not written.states.requires_grad
    assert written.link_v.shape == v.shape and written.link_v.untyped_storage().nbytes() == 4
    assert written.link_s.shape == written.states.shape and written.link_s.untyped_storage().nbytes() == 4
    # Read with queries that want gradients, written without: no links, and the gradient of the queries all the same.
    with torch.no_grad():
        written = kernel_ops.write(None, k, v, beta, g, S0, readable=True)
    out = kernel_ops.read(q, k.detach(), g.detach(), written)
    (dq,) = torch.autograd.grad(out.sum(), q)
    memory = core.delta_write(k, v, beta, g, initial_state=S0, impl="reference")
    close([dq], torch.autograd.grad(memory.read(q).sum(), q), TOLERANCE[torch.float32])


def case_second_derivatives_are_refused():
    x = inputs(SIZES[0], requires_grad=True)
    for function in (through_memory, through_rule):
        (first,) = torch.autograd.grad(loss(function("triton", **x)), x["k"], create_graph=True)
        refuses(lambda first=first: torch.autograd.grad(first.sum(), x["k"]))


def case_strided_inputs_and_expanded_gradients():
    x = inputs(SIZES[0])
    views = {name: y.transpose(0, 1).contiguous().transpose(0, 1) for name, y in x.items()}
    assert not views["k"].is_contiguous()
    leaves = [{name: y.requires_grad_() for name, y in z.items()} for z in (x, views)]
    grads = [
        torch.autograd.grad(core.delta_rule(*list(z.values())[:5], impl="triton").out.sum(), z["v"]) for z in leaves
    ]
    same(grads[1], grads[0])


def case_ensembles_equal_a_loop():
    """torch.func.vmap over members: the bits of every member alone. Gradients inside and outside of the map."""
    members = [inputs(SIZES[0], seed=seed) for seed in range(2)]
    names = (*NAMES, "second")
    for function in (through_memory, through_rule):

        def scalar(*args, function=function):
            return loss(function("triton", *args))

        for mapped in (names, ("v",)):
            dims = tuple(0 if name in mapped else None for name in names)
            stacked = [
                torch.stack([m[n] for m in members]) if d == 0 else members[0][n]
                for n, d in zip(names, dims, strict=True)
            ]
            which = tuple(range(6))
            given = vmap(grad(scalar, argnums=which), in_dims=dims)(*stacked)
            for e in range(2):
                alone = [y[e] if d == 0 else y for y, d in zip(stacked, dims, strict=True)]
                same([y[e] for y in given], grad(scalar, argnums=which)(*alone))
            leaves = [y.clone().requires_grad_() for y in stacked]
            outside = torch.autograd.grad(vmap(scalar, in_dims=dims)(*leaves).sum(), leaves[:6])
            for d, a, b in zip(dims, outside, given, strict=False):
                close([a], [b if d == 0 else b.sum(0)], 1e-4)
            with torch.no_grad():
                torch.testing.assert_close(vmap(scalar, in_dims=dims)(*stacked)[1], scalar(*alone), rtol=1e-5, atol=0)


def case_compiled_equals_eager():
    """torch.compile without a graph break, over lengths that change, backward included."""
    for dynamic in (False, True):
        for function in (through_memory, through_rule):
            torch._dynamo.reset()
            compiled = torch.compile(
                lambda *args, function=function: tuple(function("triton", *args)),
                fullgraph=True, dynamic=dynamic, backend="inductor" if CUDA else "aot_eager",
            )  # fmt: skip
            for T in (20, 33):
                x = inputs((2, T, *SIZES[0][2:]))
                same(
                    everything(lambda impl, compiled=compiled, **z: compiled(*z.values()), "triton", x),
                    everything(function, "triton", x),
                )
                with torch.no_grad():
                    same(compiled(*x.values()), function("triton", **x))


def case_one_token():
    x = inputs(SIZES[0])
    token = [x[name][:, 0].contiguous() for name in NAMES[:5]]
    options = dict(scale=0.5, raw=True, norm_q=True, norm_k=True)
    given = kernel_ops.step(*token, x["initial_state"], **options)
    same(
        torch.compile(kernel_ops.step, fullgraph=True, backend="aot_eager")(*token, x["initial_state"], **options),
        given,
    )
    sequence = {name: y[:, None] for name, y in zip(NAMES, token, strict=False)}
    whole = core.delta_rule(
        **sequence, initial_state=x["initial_state"], scale=0.5, erase="raw", normalize_qk=True, impl="reference"
    )
    close(given, [whole.out[:, 0], whole.state], 1e-5)
    mapped = vmap(lambda q: kernel_ops.step(q, *token[1:], x["initial_state"], **options))(torch.stack([token[0]] * 2))
    same([y[1] for y in mapped], given)


def case_heads_in_groups_give_the_same_bits():
    """A backward pass that holds the gradients of few states at once takes heads in groups, which a batch may fill or not."""
    kernels, x = kernel_ops._kernels(), inputs(SIZES[1])
    together, kept = everything(through_memory, "triton", x), kernels.AT_ONCE
    try:
        kernels.AT_ONCE = 1
        same(everything(through_memory, "triton", x), together)
    finally:
        kernels.AT_ONCE = kept


def case_edited_pieces():
    """As after an edit of kernels_pieces.py alone: every kernel is built anew."""
    kernels, x = kernel_ops._kernels(), inputs(SIZES[0])
    before, walk = everything(through_rule, "triton", x), kernels.kernels_forward.walk
    importlib.reload(sys.modules["kernels_pieces"])
    same(everything(through_rule, "triton", x), before)
    assert kernels.kernels_forward.walk is not walk
    same(everything(through_rule, "triton", x), before)
    walk = kernels.kernels_forward.walk
    importlib.reload(sys.modules["kernels_pieces"])
    importlib.reload(sys.modules["kernels_launch"])  # both at once, as after a branch is switched
    same(everything(through_rule, "triton", x), before)
    assert kernels.kernels_forward.walk is not walk


def case_edited_launchers():
    """What was compiled for launchers of before is not launched again: their plans, and the numbers of these, may be others."""
    kernels, compiled = kernel_ops._kernels(), sys.modules["kernels_launch"]._COMPILED
    compiled["write", 3, 0] = {}
    importlib.reload(kernels)
    assert kernels.plan(20, 64, 128, torch.bfloat16).code == 0, "the numbers of plans begin again"
    assert not compiled


def case_reloaded():
    """As a notebook's autoreload does after an edit: the operators are defined anew, in the module that others hold."""
    x = inputs(SIZES[0])
    before = everything(through_memory, "triton", x)
    kept = {name: value for name, value in vars(kernel_ops).items() if name in ("__name__", "__loader__", "__spec__")}
    vars(kernel_ops).clear()  # as IPython does
    vars(kernel_ops).update(kept)
    importlib.reload(kernel_ops)
    same(everything(through_memory, "triton", x), before)
    given = vmap(lambda v: core.delta_rule(*list(x.values())[:2], v, x["beta"], x["g"], impl="triton").out)(
        torch.stack([x["v"]] * 2)
    )
    assert torch.equal(given[0], given[1])


CASES = {name: value for name, value in globals().items() if name.startswith("case_")}


# ------------------------------------------------------------------------------------------------ in the interpreter


@pytest.fixture(scope="module")
def interpreted():
    """What every case raised in Triton's interpreter, by name; an empty string where it passed."""
    return child.raised_in_interpreter(__file__)


@pytest.mark.parametrize("case", CASES)
def test_in_the_interpreter(interpreted, case):
    assert interpreted[case] == "", interpreted[case]


def test_another_package_of_the_name_kernels(monkeypatch):
    other = types.ModuleType("kernels")
    other.__file__ = "/elsewhere/kernels/__init__.py"
    monkeypatch.setitem(sys.modules, "kernels", other)
    kernel_ops._kernels.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"elsewhere.*not the workbook's.*kernels\.py.*first on sys\.path"):
            kernel_ops._kernels()
    finally:
        kernel_ops._kernels.cache_clear()


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case):
    CASES[case]()


@pytest.mark.gpu
def test_auto_runs_the_kernels():
    assert core.explain_impl(device="cuda").startswith("triton")
    x = inputs(SIZES[0], torch.bfloat16)
    same(everything(through_memory, "auto", x), everything(through_memory, "triton", x))
    token = {name: x[name][:, 0] for name in NAMES[:5]}
    with torch.no_grad():
        given = core.delta_step(**token, state=x["initial_state"])
    same(given, kernel_ops.step(*token.values(), x["initial_state"]))
    # A gradient takes the path that has one.
    q = token["q"].detach().requires_grad_()
    assert core.delta_step(**(token | dict(q=q)), state=x["initial_state"]).out.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_two_runs_agree_and_so_does_a_sequence_in_a_batch(size, dtype):
    x = inputs(size, dtype)
    for function in (through_memory, read_as_written, through_rule):
        together = everything(function, "triton", x)
        same(everything(function, "triton", x), together)
        for b in range(size[0]):
            alone = everything(function, "triton", {name: y[b : b + 1] for name, y in x.items()})
            same(alone, [y[b : b + 1] for y in together])


@pytest.mark.gpu
def test_more_than_2_31_numbers():
    """Offsets beyond 32 bits: the last tokens of a tensor of 2.2e9 numbers, as they come out alone from the state before them."""
    T, H, width, tail = 1 << 20, 33, 64, 512
    if torch.cuda.mem_get_info()[0] < 70 << 30:
        pytest.skip("needs 70 GiB of GPU memory")
    gen = torch.Generator("cuda").manual_seed(0)
    draw_wide = lambda: torch.randn(1, T, H, width, dtype=torch.bfloat16, device="cuda", generator=gen)  # noqa: E731
    x = [draw_wide(), draw_wide(), draw_wide()]
    x += [torch.rand(1, T, H, dtype=torch.bfloat16, device="cuda", generator=gen) * s for s in (1.0, -0.01)]
    assert x[0].numel() > 2**31
    with torch.no_grad():
        state = core.delta_rule(*(y[:, :-tail] for y in x), normalize_qk=True, impl="triton").state
    results = []
    for whole in (False, True):
        leaves = [y.requires_grad_() if whole else y[:, -tail:].detach().clone().requires_grad_() for y in x]
        start = {} if whole else dict(initial_state=state)
        out = core.delta_rule(*leaves, **start, normalize_qk=True, impl="triton").out
        d_out = torch.zeros_like(out)
        d_out[:, -tail:] = torch.randn(d_out[:, -tail:].shape, device="cuda", generator=gen.manual_seed(1))
        grads = torch.autograd.grad(out, leaves, d_out)
        results.append([y[:, -tail:].clone() for y in (out.detach(), *grads)])
    close(*reversed(results), 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("function", [through_memory, through_rule])
def test_in_a_cuda_graph(function):
    """Forward and backward captured once and replayed on other values."""
    first, second = (inputs(SIZES[0], torch.bfloat16, seed=seed) for seed in (0, 1))
    static = {name: y.detach().clone().requires_grad_() for name, y in first.items()}

    def run():
        results = function("triton", **static)
        grads = torch.autograd.grad(loss(results), list(static.values()), allow_unused=True)
        return [*(y.detach() for y in results), *(d for d in grads if d is not None)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for x in (first, second):
        with torch.no_grad():
            for name, y in static.items():
                y.copy_(x[name])
        graph.replay()
        torch.cuda.synchronize()
        same(captured, everything(function, "triton", x))


@pytest.mark.gpu
def test_a_step_in_a_cuda_graph():
    x = inputs(SIZES[0], torch.bfloat16)
    token = [x[name][:, 0].contiguous() for name in NAMES[:5]]
    state = x["initial_state"].clone()
    with torch.no_grad():
        core.delta_step(*token, state)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, after = core.delta_step(*token, state)
            state.copy_(after)
        expected = x["initial_state"]
        state.copy_(expected)
        for _ in range(3):
            graph.replay()
            step = core.delta_step(*token, expected)
            expected = step.state
        torch.cuda.synchronize()
    same([out, state], [step.out, expected])


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_the_memory_layer_compiles_whole(autocast):
    """torch.compile(fullgraph=True) on the G layer of the hybrid, read again by a second set of queries, against eager."""
    cfg = model.config.HybridConfig(
        d_model=64, n_heads=2, head_dim=32, value_dim=32, layer_pattern="G", vocab_size=32, impl="triton"
    )
    torch.manual_seed(0)
    layer = next(m for m in model.TransparentHybrid(cfg).modules() if isinstance(m, model.MemoryLayer)).cuda()
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(2, 150, 64, generator=gen).cuda().requires_grad_()
    tokens = torch.randint(0, 32, (2, 150), generator=gen).cuda()
    queries = torch.randn(2, 150, 2, 32, generator=gen).to("cuda", torch.bfloat16 if autocast else torch.float32)

    def forward(x):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            y, memory, *_ = layer(x, tokens, None, 0, None)
            return y, memory.read(queries)

    def results(function):
        out = function(x)
        return [*(y.detach() for y in out), *torch.autograd.grad(loss(out), [x, *layer.parameters()])]

    close(results(torch.compile(forward, fullgraph=True)), results(forward), 2e-2 if autocast else 1e-3)


if __name__ == "__main__":
    child.print_raised(CASES)
