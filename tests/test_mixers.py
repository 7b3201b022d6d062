"""Softmax and linear attention against their definitions; gates, penalties and state sizes of models made of any layers."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from test_model import TINY, build, tokens

import config
import mixers
import model
import train


def drawn(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


def in_a_loop(q, k, v, state):
    B, T, H, K = q.shape
    S, z = state[..., :-1].clone(), state[..., -1].clone()
    out = []
    for t in range(T):
        S = S + k[:, t, :, :, None] * v[:, t, :, None]
        z = z + k[:, t]
        read = torch.einsum("bhkv,bhk->bhv", S, q[:, t])
        out.append(read / ((z * q[:, t]).sum(-1, keepdim=True) + 1e-6))
    return torch.stack(out, 1), torch.cat([S, z[..., None]], dim=-1)


@pytest.mark.parametrize("T", [1, 7, 8, 9, 30])
@pytest.mark.parametrize("carried", [False, True])
def test_linear_attention_equals_its_recurrence(T, carried):
    B, H, K, V = 2, 3, 4, 5
    q, k, v, state = drawn((B, T, H, K), (B, T, H, K), (B, T, H, V), (B, H, K, V + 1), seed=T)
    q_, k_ = q.exp(), k.exp()
    start = state.exp() if carried else torch.zeros_like(state)
    expected = in_a_loop(q_, k_, v, start)
    given = mixers.linear_attention(q_, k_, v, start if carried else None, chunk=8)
    w = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) for x in given]
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    wanted = (q, k, v, state)[: 4 if carried else 3]
    grad = lambda results: torch.autograd.grad(results, wanted, w, retain_graph=True)  # noqa: E731
    grads = [grad(given), grad(expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_linear_attention_takes_any_dtype_and_sums_in_float32():
    q, k, v = (x.detach().abs() for x in drawn((1, 300, 2, 8), (1, 300, 2, 8), (1, 300, 2, 4)))
    exact, _ = mixers.linear_attention(q, k, v)
    out, state = mixers.linear_attention(*(x.to(torch.bfloat16) for x in (q, k, v)))
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert (out.double() - exact).norm() / exact.norm() < 5e-3


@pytest.mark.parametrize("T, S", [(1, 1), (9, 9), (1, 9), (4, 9)])
def test_causal_attention_equals_a_mask(T, S):
    q, k, v = drawn((2, 3, T, 4), (2, 3, S, 4), (2, 3, S, 4))
    i, j = torch.arange(S - T, S)[:, None], torch.arange(S)
    expected = torch.softmax((q @ k.mT / 2).masked_fill(j > i, -math.inf), dim=-1) @ v
    torch.testing.assert_close(mixers.causal_attention(q, k, v), expected, rtol=1e-11, atol=1e-12)
    mapped = torch.func.vmap(mixers.causal_attention)(*(torch.stack([x, 2 * x]) for x in (q, k, v)))
    torch.testing.assert_close(mapped[0], expected, rtol=1e-11, atol=1e-12)


def test_layers_by_hand():
    """L and A layers pair the key before with a value; an A layer rotates by position, from where an earlier call ended."""
    net, x = build("L"), tokens(1, 9)
    layer, H = net.layers[0], TINY.n_heads
    with torch.no_grad():
        y = net.embed(x)
        h = layer.norm(y)
        q, k = (F.elu(w(h).view(1, 9, H, -1)) + 1 for w in (layer.query, layer.key))
        v = layer.value(h).view(1, 9, H, -1)
        shifted = torch.cat([torch.zeros_like(k[:, :1]), k[:, :-1]], dim=1)
        zero = torch.zeros(1, H, TINY.head_dim, TINY.value_dim + 1, dtype=torch.float64)
        read, memory = in_a_loop(q, shifted, v, zero)
        out, state = layer(y, None, 0, None)
    torch.testing.assert_close(out, y + layer.out(read.flatten(2)), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state.memory, memory, rtol=1e-10, atol=1e-10)
    for shifted in (False, True):
        net = build("A", {"use_rope": True, "shifted_value": shifted})
        layer = net.layers[0]
        with torch.no_grad():
            h = layer.norm(net.embed(x))
            q, k, v = (w(h).view(1, 9, H, -1) for w in (layer.q, layer.k, layer.v))
            q, k = (mixers.rope(z, 0, TINY.rope_base) for z in (q, k))
            if shifted:
                k, v = torch.cat([torch.zeros_like(k[:, :1]), k[:, :-1]], dim=1), v.clone()
                v[:, 0] = 0
            q, k, v = (z.transpose(1, 2) for z in (q, k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            expected = net.embed(x) + layer.out(mixed.transpose(1, 2).flatten(2))
            # In two calls, and token by token, the same.
            first, state = layer(net.embed(x[:, :4]), None, 0, None)
            rest, _ = layer(net.embed(x[:, 4:]), state, 4, None)
            single, state = [], None
            for t in range(9):
                y, state = layer(net.embed(x[:, t : t + 1]), state, t, None)
                single.append(y)
        for given in (layer(net.embed(x), None, 0, None)[0], torch.cat([first, rest], 1), torch.cat(single, 1)):
            torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pattern", ["A", "L", "GASL"])
def test_an_ensemble_equals_its_members(pattern):
    nets, x = [build(pattern, dtype=torch.float32, seed=s) for s in (0, 1)], tokens(3, 21)
    params, buffers = torch.func.stack_module_state(nets)
    loss = lambda p, b: torch.func.functional_call(nets[0], (p, b), (x, x)).loss  # noqa: E731
    grads, losses = torch.func.vmap(torch.func.grad_and_value(loss))(params, buffers)
    for i, net in enumerate(nets):
        alone = net(x, x).loss
        torch.testing.assert_close(losses[i], alone, rtol=1e-5, atol=1e-6)
        for name, g in zip(params, torch.autograd.grad(alone, net.parameters()), strict=True):
            torch.testing.assert_close(grads[name][i], g, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("length", [1, 3, 20])
@pytest.mark.parametrize("pattern", ["G", "S", "A", "L", "GASL"])
def test_state_sizes_are_those_of_the_states(pattern, length):
    net = build(pattern)
    state = net(tokens(1, length)).state
    extra = {model.MemoryState: 1, mixers.LinearState: 1}  # the matrix alone; others hold keys and values
    held = sum(x.numel() for layer in state.layers for x in layer[: extra.get(type(layer), 2)])
    assert net.cfg.state_size(length) == held


def test_states_of_another_model_are_refused():
    state = build("A")(tokens(2, 5)).state
    with pytest.raises(ValueError, match="layer 0 is L, the state there is a AttentionState"):
        build("L")(tokens(2, 5), state=state)
    with pytest.raises(ValueError, match="does not fit"):
        build("A")(tokens(2, 5), state=state._replace(position=4))
    with pytest.raises(ValueError, match="does not fit"):
        build("A", {"n_heads": 4})(tokens(2, 5), state=state)


# ------------------------------------------------------------------------------------------------ gates and penalties


def test_the_straight_gate_has_hard_values_and_soft_gradients():
    logit = torch.linspace(-6, 6, 25, dtype=torch.float64, requires_grad=True)
    gate = model.straight_through(logit)
    torch.testing.assert_close(gate, model.hard_sigmoid(logit), rtol=0, atol=1e-12)
    assert gate[0] == 0 and gate[-1] == 1
    (grad,) = torch.autograd.grad(gate.sum(), logit)
    soft = torch.sigmoid(logit.detach())
    torch.testing.assert_close(grad, soft * (1 - soft), rtol=1e-12, atol=1e-15)


def test_mean_cosine():
    right = torch.eye(4)[None, :, None]  # orthonormal keys
    assert model.mean_cosine(right) == 0
    assert model.mean_cosine(right[:, :1].expand(-1, 5, -1, -1)) == pytest.approx(1)
    pair = torch.tensor([[1.0, 0.0], [0.6, -0.8]])[None, :, None]
    assert model.mean_cosine(pair) == pytest.approx(0.6)
    many = F.normalize(torch.randn(2, 1000, 3, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    chosen = many[:, ::4]  # 250 of them
    assert model.mean_cosine(many) == model.mean_cosine(chosen)
    assert model.mean_cosine(many) == pytest.approx(math.sqrt(2 / (math.pi * 16)), rel=0.05)


def test_penalties_are_means_over_memory_layers():
    net, x = build("GSG"), tokens(2, 20)
    record = net(x, diagnostics=True).diagnostics
    beta = torch.stack([r["beta"].mean() for r in record if r["layer"] == "G"]).mean()
    keys = torch.stack([model.mean_cosine(r["keys"]) for r in record if r["layer"] == "G"]).mean()
    out = net(x, x, penalties=model.Penalties(write=2.0, keys=3.0))
    torch.testing.assert_close(out.penalty, 2 * beta + 3 * keys.double(), rtol=1e-6, atol=1e-9)
    assert torch.equal(out.loss, net(x, x).loss) and net(x, x).penalty is None
    grads = torch.autograd.grad(out.penalty, [layer.write_gate.bias for layer in (net.layers[0], net.layers[2])])
    assert all((g > 0).all() for g in grads)  # less bias, less is written
    for pattern in ("S", "A", "L"):
        with pytest.raises(ValueError, match="penalties"):
            build(pattern)(x, x, penalties=model.Penalties(write=1.0))


def test_training_with_a_penalty_writes_less_and_logs_the_loss_alone():
    import data

    task = data.MultiNeedle(seq_len=32, vocab_size=32, n_needles=1, n_markers=4)
    phase = train.Phase("p", train.Part(task, batch_size=8), steps=30)
    cfg = config.TrainConfig(lr=1e-2, log_every=1, warmup_steps=0)

    def fitted(**more):
        net = model.build(dataclasses.replace(TINY, init_std=0.02), seed=0)
        run = train.fit(net, phase, dataclasses.replace(cfg, **more), progress=False)
        return run.history["loss/" + train.Part(task, batch_size=8).label], net

    (loss, net), (with_penalty, sparse) = fitted(), fitted(write_penalty=1.0)
    assert loss[0] == with_penalty[0]
    writes = [m(task.sample(8, torch.Generator().manual_seed(9)).tokens, diagnostics=True) for m in (net, sparse)]
    plain, less = (float(out.diagnostics[0]["beta"].mean()) for out in writes)
    assert less < 0.8 * plain

    def member(seed):
        return model.build(dataclasses.replace(TINY, init_std=0.02), seed=seed)

    options = dict(seeds=(0, 1), steps=30, batch_size=8, progress=False)
    both = [train.fit_ensemble(member, task, dataclasses.replace(cfg, write_penalty=w), **options) for w in (0.0, 1.0)]
    tokens_ = task.sample(8, torch.Generator().manual_seed(9)).tokens
    beta = [[float(e.member(i)(tokens_, diagnostics=True).diagnostics[0]["beta"].mean()) for i in (0, 1)] for e in both]
    assert all(b < 0.8 * a for a, b in zip(*beta, strict=True))
    assert both[0].history["loss"].iloc[0] == both[1].history["loss"].iloc[0]


def test_bad_penalties_are_refused():
    for field in ("write_penalty", "key_penalty"):
        with pytest.raises(ValueError, match=field):
            config.TrainConfig(**{field: -1.0})


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["A", "L", "GASL"])
def test_on_a_gpu(pattern):
    """Kernels for G and S, torch for the rest: fp32 as on a CPU, and a step under autocast with penalties stays finite."""
    net, x = build(pattern, {"head_dim": 16, "value_dim": 16}, dtype=torch.float32), tokens(3, 200)
    expected = net(x, x).loss
    net, x = net.cuda(), x.cuda()
    torch.testing.assert_close(net(x, x).loss.cpu(), expected, rtol=1e-4, atol=1e-5)
    halves = net(x[:, :77]).state
    torch.testing.assert_close(net(x[:, 77:], state=halves).logits, net(x).logits[:, 77:], rtol=1e-3, atol=1e-3)
    penalties = model.Penalties(write=0.1, keys=0.1) if "G" in pattern else None
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = net(x, x, penalties=penalties)
    loss = out.loss if penalties is None else out.loss + out.penalty
    assert loss.item() == pytest.approx(expected.item() + float(out.penalty or 0), rel=2e-2)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(net.parameters())))
