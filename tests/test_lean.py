"""lean.py and kernels_loss.py: the same numbers as the plain operations, with less kept."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import config
import core
import lean
import model

TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
TINY = config.HybridConfig(d_model=16, n_heads=2, head_dim=8, value_dim=12, vocab_size=32, window_size=4, chunk_size=8)


def loss_and_gradients(net, x, y):
    loss = net(x, y).loss
    return [loss, *torch.autograd.grad(loss, list(net.parameters()))]


@pytest.mark.parametrize("pattern", ["GS", "SGGS"])
@pytest.mark.parametrize("options", [{}, {"query_proj": True, "decay": "none"}, {"key_conv_width": 3}])
def test_lean_model_equals_the_plain_one(monkeypatch, pattern, options):
    net = model.build(config.HybridConfig(**{**TINY.to_dict(), "layer_pattern": pattern, **options})).double()
    x = torch.randint(32, (2, 18), generator=torch.Generator().manual_seed(0))
    plain = loss_and_gradients(net, x, x.roll(1))
    monkeypatch.setattr(lean, "KEEP_ALL", ())
    monkeypatch.setattr(model, "WHOLE_LOGITS", 64)
    for ours, expected in zip(loss_and_gradients(net, x, x.roll(1)), plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-12)


def kept_bytes(net, x):
    """Bytes that autograd keeps of a forward pass under bf16 autocast, each storage once, weights left out."""
    own, storages = {p.untyped_storage().data_ptr() for p in net.parameters()}, {}

    def pack(t):
        s = t.untyped_storage()
        if s.data_ptr() not in own:
            storages[s.data_ptr()] = s  # held, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", dtype=torch.bfloat16):
        net(x, x)
    return sum(s.nbytes() for s in storages.values())


def test_lean_model_keeps_less(monkeypatch):
    net = model.build(config.HybridConfig(d_model=64, n_heads=2, head_dim=32, value_dim=64, vocab_size=64))
    x = torch.randint(64, (2, 256), generator=torch.Generator().manual_seed(0))
    plain = kept_bytes(net, x)
    monkeypatch.setattr(lean, "KEEP_ALL", ())
    assert kept_bytes(net, x) < 0.7 * plain


def test_unused_results_get_no_gradient(monkeypatch):
    monkeypatch.setattr(lean, "KEEP_ALL", ())
    norm, x = nn.RMSNorm(8, eps=1e-6), torch.randn(2, 3, 8, requires_grad=True)
    a, b = nn.Linear(8, 4, bias=False), nn.Linear(8, 5, bias=False)
    y, _ = lean.normed_linears(x, norm, [a, b])
    y.sum().backward()
    assert b.weight.grad is None and a.weight.grad.abs().sum() > 0 and x.grad.abs().sum() > 0


@pytest.mark.parametrize("keeps", [("cpu",), ()])
def test_wide_products_are_fp32_and_the_others_autocast(monkeypatch, keeps):
    """The wide ones as one product, with the biases of each."""
    monkeypatch.setattr(lean, "KEEP_ALL", keeps)
    norm, x = nn.RMSNorm(8, eps=1e-6), torch.randn(2, 3, 8, requires_grad=True)
    low, *wide = nn.Linear(8, 4, bias=False), nn.Linear(8, 5), nn.Linear(8, 2, bias=False), nn.Linear(8, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, *given = lean.normed_linears(x, norm, [low], wide=wide)
    assert y.dtype == torch.bfloat16 and y.shape == (2, 3, 4)
    for z, linear in zip(given, wide, strict=True):
        exact = linear(norm(x))
        torch.testing.assert_close(z, exact, rtol=1e-6, atol=1e-6)
        for a, b in zip(
            *(torch.autograd.grad(s.sin().sum(), (x, linear.weight), retain_graph=True) for s in (z, exact)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_hooks_see_every_module(monkeypatch):
    """Somebody who looks at a projection must not find that it was never called."""
    monkeypatch.setattr(lean, "KEEP_ALL", ())
    net, x = model.build(TINY), torch.zeros(1, 6, dtype=torch.long)
    names = [n for n, m in net.named_modules() if isinstance(m, (nn.Linear, nn.RMSNorm))]
    for name in names:
        seen = []
        hook = net.get_submodule(name).register_forward_hook(
            lambda module, args, out, seen=seen: seen.append(out.shape)
        )
        net(x, x).loss.backward()
        hook.remove()
        assert len(seen) == 1, name


def test_transforms_of_the_weights_alone(monkeypatch):
    """As with frozen embeddings: the input is a plain tensor, its layer's weights are not."""
    monkeypatch.setattr(lean, "KEEP_ALL", ())
    norm, one, thin = torch.nn.RMSNorm(8), torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(8, 2)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))

    def run(weights):
        with torch.nn.utils.stateless._reparametrize_module(layers, weights):
            a, b = lean.normed_linears(x, norm, [one], wide=[thin])
            return a.sum() + b.square().sum() + lean.product_linear(x, x, last).sum()

    last = torch.nn.Linear(8, 5, bias=False)
    layers = torch.nn.ModuleList([norm, one, thin, last])
    weights = {name: p.detach() for name, p in layers.named_parameters()}
    found = torch.func.grad(run)(weights)
    run(dict(layers.named_parameters())).backward()
    for name, p in layers.named_parameters():
        torch.testing.assert_close(found[name], p.grad)


def test_compiled_layers_give_the_same_without_a_break():
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    net, x = model.build(TINY), torch.randint(32, (2, 18), generator=torch.Generator().manual_seed(0))
    plain = loss_and_gradients(net, x, x.roll(1))
    net.compile_layers(backend="aot_eager")
    for a, b in zip(loss_and_gradients(net, x, x.roll(1)), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert (
        counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]
    )  # G, S, and one for both feed-forwards
    torch._dynamo.reset()


def test_unscored_rows_count_for_nothing():
    """A CUDA graph passes every row on; the others choose rows first. Both give the same."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(9, 4, generator=g).double(), torch.randn(11, 4, generator=g).double()
    y = torch.randint(11, (9,), generator=g)
    y[::2] = -100
    results = []
    for rows, targets in ((x, y), (x[y != -100], y[y != -100])):
        rows, weight = rows.clone().requires_grad_(), w.clone().requires_grad_()
        loss = lean.summed_cross_entropy(rows, weight, targets, 4, torch.float64, True)
        dx, dw = torch.autograd.grad(loss, (rows, weight))
        results.append((loss.detach(), dx if len(dx) < 9 else dx[y != -100], dw))
        assert len(dx) < 9 or (dx[y == -100] == 0).all()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_second_backward_of_the_loss_is_refused():
    """Its gradients are scaled where they lie."""
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    loss = lean.summed_cross_entropy(x, w, torch.tensor([0, 1, 2]), 2, torch.float32, True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


INTERPRETED = """
import torch, kernels_loss, lean
g = torch.Generator().manual_seed(0)
fp32, fp16 = torch.float32, torch.float16
for dtype, vocab, width, bound in ((fp32, 300, 384, 1e-6), (fp32, 5000, 5120, 1e-6), (fp16, 300, 384, 1e-3)):
    x, y = 3 * torch.randn(6, width, generator=g), torch.randint(vocab, (6,), generator=g)
    y[1] = -100
    x[2, y[2]] += 25 if dtype == fp32 else 0  # sure: 1 - p far below the rounding of the log-sum-exp
    x[:, vocab:] = float("nan")  # padding
    grad = x.to(dtype)
    exact, expected = lean._margins(grad[:, :vocab].double(), y, True)
    kept = grad.clone()
    alone = kernels_loss.margins_(grad, y, vocab, gradient=False)
    assert torch.equal(grad[:, :vocab], kept[:, :vocab])
    margins = kernels_loss.margins_(grad, y, vocab, gradient=True)
    assert torch.equal(alone, margins)
    assert (grad[:, vocab:] == 0).all() and (grad[1] == 0).all() and margins[1] == -torch.inf
    assert ((margins - exact)[y >= 0].abs() < 2e-6 * exact[y >= 0].abs().clamp_min(1)).all(), margins - exact
    for i in (0, 2, 3, 4, 5):
        error = (grad[i, :vocab].double() - expected[i]).norm() / expected[i].norm()
        assert error < bound, (dtype, vocab, i, error)
for target in (-1, vocab):  # no id of the vocabulary, and not the one that says unscored
    assert kernels_loss.margins_(x.to(fp32), torch.full((6,), target), vocab, gradient=True).isnan().all()
print("fine")
"""


@TRITON
def test_kernel_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr


@TRITON
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernel_compiles(arch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    import kernels_loss

    types = {"logits": "*bf16", "targets": "*i64", "margins": "*fp32", "columns": "i32", "stride": "i32"}
    source = ASTSource(
        kernels_loss._margins_kernel,
        signature={**types, "BLOCK": "constexpr", "GRADIENT": "constexpr"},
        constexprs={(5,): kernels_loss.BLOCK, (6,): True},
        attrs={(0,): [["tt.divisibility", 16]], (4,): [["tt.divisibility", 16]]},
    )
    built = compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": kernels_loss.WARPS})
    assert built.metadata.shared <= 1024
    assert "ld.global.v4" in built.asm["ptx"], "rows are read number by number"


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("capture", [False, True])
def test_loss_on_gpu(capture):
    """bf16 products: against float64 of the same rounded inputs; and the same from a captured graph."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 700, 64, generator=g).bfloat16().float()
    w = (0.3 * torch.randn(50257, 64, generator=g)).bfloat16().float()
    y = torch.randint(50257, (3, 700), generator=g)
    y[:, ::3] = -100
    exact = [t.double().cuda().requires_grad_() for t in (x, w)]
    loss = F.cross_entropy(F.linear(*exact).flatten(0, 1), y.cuda().flatten())
    expected = [loss, *torch.autograd.grad(loss, exact)]
    a, b, y = x.cuda().requires_grad_(), w.cuda().requires_grad_(), y.cuda()

    def ours():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model.cross_entropy(a, b, y)
        return [loss, *torch.autograd.grad(loss, (a, b))]

    if capture:  # what a graph holds must not be tied to the stream of before
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            ours()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = ours()
        graph.replay()
    else:
        got = ours()
    for mine, true in zip(got, expected, strict=True):
        assert (mine.double() - true).norm() / true.norm() < 6e-3


@pytest.mark.gpu
def test_loss_on_a_gpu_that_runs_no_triton(monkeypatch):
    x, weight = (torch.randn(n, 16, device="cuda", requires_grad=True) for n in (40, 30))
    targets = torch.arange(40, device="cuda") % 30
    expected = lean.summed_cross_entropy(x, weight, targets, 16, torch.float32, True)
    monkeypatch.setattr(core, "triton_problem", lambda device, dtype: "not installed")
    monkeypatch.setitem(sys.modules, "kernels_loss", None)
    torch.testing.assert_close(lean.summed_cross_entropy(x, weight, targets, 16, torch.float32, True), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [200, 256])
def test_window_attention_on_gpu(T):
    """Keys and values are views that overlap: the backward must not write through them."""
    g = torch.Generator().manual_seed(0)
    q, k, v, w = (torch.randn(3, T, 4, 64, generator=g).bfloat16().cuda() for _ in range(4))
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        heads = [t.transpose(1, 2) for t in leaves]
        if dtype == torch.float64:
            i, j = torch.arange(T, device="cuda")[:, None], torch.arange(T, device="cuda")[None]
            out = F.scaled_dot_product_attention(*heads, attn_mask=(j <= i) & (j > i - 64))
        else:
            out = model.window_attention(*heads, 64, None)
        results.append([out, *torch.autograd.grad(out, leaves, w.to(dtype).transpose(1, 2))])
    for exact, ours in zip(*results, strict=True):
        assert (ours.double() - exact).norm() / exact.norm() < 1e-2


@pytest.mark.gpu
def test_lean_model_on_gpu_equals_the_plain_one(monkeypatch):
    net = model.build(TINY).cuda()
    x = torch.randint(32, (2, 18), generator=torch.Generator().manual_seed(0)).cuda()
    ours = loss_and_gradients(net, x, x.roll(1))
    monkeypatch.setattr(lean, "KEEP_ALL", ("cuda",))
    for a, b in zip(ours, loss_and_gradients(net, x, x.roll(1)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
