"""kernels_window.py: window attention and its gradients against float64, and the operator around them.

The cases run twice: on a GPU, and without one in Triton's interpreter, which has to be chosen before Triton is imported and so
gets a process of its own. `python tests/test_window.py` is that process: it runs every case and prints what each raised.
"""

from __future__ import annotations

import importlib
import itertools
import math

import kernel_child as child
import pytest
import test_kernels
import torch
import torch.nn.functional as F
from torch import library

import core
import kernel_ops
import model

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# bfloat16 is wrong in the interpreter.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if CUDA else (torch.float32, torch.float16)
LENGTHS, WINDOWS, WIDTHS = (1, 63, 64, 65, 130), (1, 4, 64, 100), (16, 50, 64)
SHAPES = list(itertools.product(LENGTHS, WINDOWS, WIDTHS))
if CUDA:
    SHAPES += [(300, 64, 128), (700, 300, 64), (200, 1000, 100), (100, 7, 1), (2048, 64, 64)]
else:  # every length with every window, and every width with some
    SHAPES = [(T, window, WIDTHS[n % 3]) for n, (T, window) in enumerate(itertools.product(LENGTHS, WINDOWS))]
needs_triton = pytest.mark.skipif(not core.HAS_TRITON, reason="Triton is not installed here: it exists for Linux only")
compiler, poisoned = test_kernels.compiler, test_kernels.poisoned


def inputs(B, T, H, D, dtype=torch.float32, *, seed=0):
    """q, k, v and the gradient of the output, [B, T, H, D]."""
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, H, D, generator=gen).to(DEVICE, dtype) for _ in range(4)]


def everything(q, k, v, d_out, window, attend=kernel_ops.attend):
    """out, dq, dk, dv."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, window)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def plain(q, k, v, window):
    """The definition, with all scores at once."""
    i, j = (torch.arange(q.shape[1], device=q.device)[at] for at in ((slice(None), None), (None, slice(None))))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill((j > i) | (j <= i - window), -math.inf)
    return torch.einsum("bhij,bjhd->bihd", torch.softmax(scores, -1), v)


def bound(name, dtype):
    """Largest relative error in Euclidean norms. P and dS are rounded to the dtype of the inputs, so is what comes out, and so
    was `out`, which dq and dk are formed with: independent errors of a quarter of eps to half."""
    if dtype == torch.float32:
        return 5e-6
    return torch.finfo(dtype).eps * (0.6 if name in ("out", "dv") else 1.0)


def check(T, window, D, dtype, B=1, H=2):
    x = inputs(B, T, H, D, dtype, seed=T + window + D)
    given = everything(*x, window)
    exact = everything(*(y.double() for y in x), window, plain)
    least = 0.2 * exact[3].norm()  # dq and dk vanish where a token sees only itself: rounding is left of them
    for name, a, b in zip(("out", "dq", "dk", "dv"), given, exact, strict=True):
        error = ((a.double() - b).norm() / b.norm().clamp_min(least)).item()
        assert a.dtype == dtype and a.shape == b.shape and a.is_contiguous(), (name, a.dtype, a.shape)
        assert error <= bound(name, dtype), f"T {T}, window {window}, D {D}, {dtype}, {name}: {error:.2e}"


def same(given, expected):
    """Bit for bit."""
    for n, (a, b) in enumerate(zip(given, expected, strict=True)):
        assert a.dtype == b.dtype and torch.equal(a, b), f"result {n} differs"


# ------------------------------------------------------------------------------------------------ cases


def case_float32():
    for shape in SHAPES:
        check(*shape, torch.float32)


def case_16_bit():
    for shape, dtype in itertools.product(SHAPES, DTYPES[1:]):
        check(*shape, dtype)


def case_other_tiles_are_not_touched():
    """NaN two tiles away from what is compared: too far to be a key, or a key of a query that sees it."""
    for dtype in DTYPES[:2]:
        x = inputs(1, 384, 1, 16, dtype)
        clean = everything(*x, 64)
        for y in x:
            y[:, :64], y[:, 320:] = math.nan, math.nan
        same([y[:, 128:256] for y in everything(*x, 64)], [y[:, 128:256] for y in clean])


def case_keys_outside_the_window_do_not_matter():
    """Not those of the same tile either: the same bits whatever they are."""
    x = inputs(1, 200, 1, 16)
    changed = [y.clone() for y in x]
    for y in changed[1:3]:
        y[:, :111], y[:, 151:] = 30.0 * y[:, :111] + 1.0, -20.0 * y[:, 151:]
    for a, b in zip(everything(*x, 40)[:2], everything(*changed, 40)[:2], strict=True):
        assert torch.equal(a[:, 150], b[:, 150]) and not torch.equal(a[:, 149], b[:, 149])


def case_nothing_uninitialised_is_read():
    if CUDA:
        pytest.skip("fences are for the CPU")
    with child.Fenced() as fenced:
        x = [fenced.place(y) for y in inputs(2, 70, 2, 5)]
        results = everything(*x, 9)
    assert all(y.isfinite().all() for y in results) and not fenced.breached()


def case_strides():
    """Slices of one projection, heads first, rows that do not lie together, a gradient without strides: the same bits."""
    x = inputs(2, 70, 3, 16, DTYPES[1])
    expected = everything(*x, 20)
    fused = torch.stack(x, 2).unbind(2)
    heads_first = [y.transpose(1, 2).contiguous().transpose(1, 2) for y in x]
    columns = [y.mT.contiguous().mT for y in x]
    odd = [F.pad(y, (0, 1))[..., :16] for y in x]
    for views in (fused, heads_first, columns, odd):
        assert not views[0].is_contiguous()
        same(everything(*views, 20), expected)
    one = torch.ones((), device=DEVICE, dtype=x[0].dtype)
    same(everything(*x[:3], one.expand(x[0].shape), 20), everything(*x[:3], one.expand(x[0].shape).contiguous(), 20))


def case_alone_and_in_a_batch():
    for dtype in DTYPES:
        x = inputs(3, 130 if CUDA else 70, 2, 64 if CUDA else 16, dtype)
        together = everything(*x, 64)
        same(everything(*x, 64), together)
        same(everything(*(y[1:2] for y in x), 64), [y[1:2] for y in together])


def case_large_scores():
    """Far beyond the range of exp, and the first keys of a window the largest."""
    x = inputs(1, 100, 1, 16)
    x[0] *= 100.0
    given, exact = everything(*x, 30), everything(*(y.double() for y in x), 30, plain)
    for a, b in zip(given, exact, strict=True):
        # Scores in the hundreds, in float32 or, on a GPU, from three products of tf32.
        assert (a.double() - b).norm() / b.norm() < (1e-3 if CUDA else 1e-4)


def case_nothing_to_do():
    for B, T, D in ((0, 5, 16), (2, 0, 16)):
        results = everything(*inputs(B, T, 2, D), 4)
        assert all(y.shape == (B, T, 2, D) for y in results)


def case_opcheck():
    ops = torch.ops.groundthink if kernel_ops.NAMESPACE == "groundthink" else getattr(torch.ops, kernel_ops.NAMESPACE)
    q, k, v, d_out = inputs(2, 33, 2, 16, DTYPES[-1])
    for wanted in (True, False):
        library.opcheck(ops.window_attention.default, (*(y.clone().requires_grad_(wanted) for y in (q, k, v)), 7))
    out, lse = ops.window_attention.default(q, k, v, 7)
    library.opcheck(ops.window_attention_backward.default, (q, k, v, out, lse, d_out, 7))


def case_compiled_equals_eager():
    for dynamic in (False, True):
        torch._dynamo.reset()
        backend = "inductor" if CUDA else "aot_eager"
        compiled = torch.compile(kernel_ops.attend, fullgraph=True, dynamic=dynamic, backend=backend)
        for T in (20, 33):
            x = inputs(2, T, 2, 16)
            same(everything(*x, 7, compiled), everything(*x, 7))


def case_transforms():
    """vmap over members, and gradients inside it: the bits of every member alone."""
    members = [inputs(1, 20, 2, 16, seed=seed) for seed in (0, 1)]
    stacked = [torch.stack(y) for y in zip(*members, strict=True)]

    def scalar(q, k, v, d_out):
        return (kernel_ops.attend(q, k, v, 7) * d_out).sum()

    given = torch.func.vmap(torch.func.grad(scalar, (0, 1, 2)))(*stacked)
    for n, x in enumerate(members):
        same([y[n] for y in given], everything(*x, 7)[1:])
    # One sequence, of which every member asks for another gradient.
    q, k, v, d_out = inputs(1, 5, 1, 16)
    rows = torch.func.jacrev(lambda q: kernel_ops.attend(q, k, v, 3))(q).flatten(0, 3)
    for n in (0, 17, 79):
        one = torch.zeros(80, device=q.device).index_fill(0, torch.tensor(n, device=q.device), 1.0).view(1, 5, 1, 16)
        same([rows[n]], [everything(q, k, v, one, 3)[1]])


def case_what_it_cannot_do_is_an_error():
    q, k, v, _ = inputs(1, 5, 2, 16)
    wide = q.new_ones(1, 2, 1, 129)
    for x, window in ((q, k[:, :4], v), 3), ((q, k, v.half()), 3), ((q, k, v), 0), ((wide, wide, wide), 3):
        with pytest.raises(ValueError, match="expected"):
            kernel_ops.attend(*x, window)


def case_second_derivatives_are_refused():
    q, k, v, d_out = (y.requires_grad_() for y in inputs(1, 20, 1, 16))
    (dq,) = torch.autograd.grad(kernel_ops.attend(q, k, v, 7), q, d_out, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(dq.sum(), k)


def case_reloaded():
    """As after an edit of the module, or of the pieces alone, in a notebook: kernels are built anew."""
    import kernels_pieces
    import kernels_window

    x = inputs(1, 20, 1, 16)
    before = everything(*x, 7)
    for module in (kernels_window, kernels_pieces):
        kernel = kernels_window.attend
        importlib.reload(module)
        same(everything(*x, 7), before)
        assert kernels_window.attend is not kernel


CASES = {name: value for name, value in globals().items() if name.startswith("case_")}


# ------------------------------------------------------------------------------------------------ in the interpreter


@pytest.fixture(scope="module")
def interpreted():
    """What every case raised in Triton's interpreter, by name; an empty string where it passed."""
    return child.raised_in_interpreter(__file__)


@pytest.mark.parametrize("case", CASES)
def test_in_the_interpreter(interpreted, case):
    assert interpreted[case] == "", interpreted[case]


# ------------------------------------------------------------------------------------------------ compiled ahead of time


def launches(arch, D, dtype, window, T=2048, B=8, H=8):
    import kernels_window

    with test_kernels.recorded(arch, kernels_window) as found:
        x = torch.empty(B, T, H, D, dtype=dtype, device="meta")
        out, lse = kernels_window.forward(x, x, x, window)
        kernels_window.backward(x, x, x, out, lse, x, window)
    assert test_kernels.used_kernels(found) == {"attend", "attend_back"}
    return found


@needs_triton
def test_operator_and_kernels_agree_on_the_widest_head():
    import kernels_window

    assert kernel_ops.WINDOW_WIDTH == kernels_window.WIDEST


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles(compiler, arch):
    """To binaries, at the model's sizes; tokens are read 16 bytes at a time."""
    found = launches(arch, 64, torch.bfloat16, 64)
    test_kernels.check_fits(arch, found)
    for launched in found:
        ptx = test_kernels.compiled(launched, arch).asm["ptx"]
        assert "ld.global.v4" in ptx and "st.global.v4" in ptx, launched.kernel.__name__


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_fits_shared_memory(compiler, arch):
    """Where the most is held: the widest heads, and windows of many tiles."""
    for D, dtype, window in ((128, torch.bfloat16, 1000), (128, torch.float32, 1000)):
        test_kernels.check_fits(arch, launches(arch, D, dtype, window), binary=False)


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case):
    CASES[case]()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_poisoned_memory(poisoned, dtype):
    for shape in ((63, 64, 64), (130, 4, 50), (200, 100, 128)):
        check(*shape, dtype, B=2, H=3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_model_uses_it(monkeypatch, dtype):
    """And not where it must not: after earlier tokens, in float64, for wide heads, inside transforms."""
    calls, attend = [], kernel_ops.attend
    monkeypatch.setattr(kernel_ops, "attend", lambda *args: calls.append(args) or attend(*args))
    q, k, v, d_out = (y.transpose(1, 2) for y in inputs(2, 100, 2, 64, dtype))
    given = everything(q, k, v, d_out, 20, lambda *args: model.window_attention(*args, None))
    assert len(calls) == 1
    exact = everything(*(y.double().transpose(1, 2) for y in (q, k, v, d_out)), 20, plain)
    for a, b in zip(given, exact, strict=True):
        assert (a.double().transpose(1, 2) - b).norm() / b.norm() < (1e-2 if dtype == torch.bfloat16 else 1e-3)
    calls.clear()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = model.window_attention(q, k, v, 20, None)
    assert out.dtype == torch.bfloat16 and len(calls) == 1
    assert (out.double().transpose(1, 2) - exact[0]).norm() / exact[0].norm() < 1e-2
    calls.clear()
    model.window_attention(q, k, v, 20, model.WindowState(k[:, :, :5], v[:, :, :5]))
    model.window_attention(q.double(), k.double(), v.double(), 20, None)
    model.window_attention(*(torch.cat([y] * 3, -1) for y in (q, k, v)), 20, None)
    torch.func.vmap(lambda q, k, v: model.window_attention(q, k, v, 20, None))(*(y[None] for y in (q, k, v)))
    assert not calls


@pytest.mark.gpu
def test_the_model_compiles():
    x = [y.transpose(1, 2) for y in inputs(2, 100, 2, 64, torch.bfloat16)]
    torch._dynamo.reset()
    compiled = torch.compile(model.window_attention, fullgraph=True)
    same(*(everything(*x, 20, lambda *args, f=f: f(*args, None)) for f in (compiled, model.window_attention)))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        x = [y.float() for y in x]
        same(*([f(*x[:3], 20, None)] for f in (compiled, model.window_attention)))


@pytest.mark.gpu
def test_in_a_cuda_graph():
    """Forward and backward captured once and replayed on other values."""
    first, second = (inputs(2, 200, 2, 64, torch.bfloat16, seed=seed) for seed in (0, 1))
    static = [y.clone() for y in first]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        everything(*static, 64)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(*static, 64)
    for x in (first, second):
        for y, value in zip(static, x, strict=True):
            y.copy_(value)
        graph.replay()
        same(captured, everything(*x, 64))


@pytest.mark.gpu
def test_more_than_2_31_numbers():
    """Offsets beyond 32 bits: the last tokens of the last head as they come out alone from those that they see."""
    B, T, H, D, window = 2, 1 << 19, 40, 64, 64
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB of GPU memory")
    gen = torch.Generator("cuda").manual_seed(0)
    x = [torch.randn(B, T, H, D, dtype=torch.bfloat16, device="cuda", generator=gen) for _ in range(4)]
    assert x[0].numel() > 2**31
    whole = [y[-1:, -64:, -1:].clone() for y in everything(*x, window)]
    tail = [y[-1:, -256:, -1:].clone() for y in x]
    same([y[:, -64:] for y in everything(*tail, window)], whole)


if __name__ == "__main__":
    child.print_raised(CASES)
