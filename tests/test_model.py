"""The hybrid: exact sizes, causality of every option, step by step = parallel, segments = whole, loss, generation."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

import analysis
import audit
import config
import lean
import mixers
import model

TINY = config.HybridConfig(
    d_model=16, n_heads=2, head_dim=8, value_dim=4, vocab_size=32, window_size=4, chunk_size=8, beta_bias=0.0, g_bias=3.0,
    init_std=0.3,
)  # fmt: skip

PATTERNS = ("G", "S", "GS", "SG", "GSS", "SGSG", "GGSS", "A", "L", "AA", "LL", "GASL")
OPTIONS = (
    {},
    {"shifted_value": False},
    {"write_gate": "hard"},
    {"decay": "mamba"},
    {"decay": "none"},
    {"decay": "hard"},
    {"erase": "raw"},
    {"query_proj": True},
    {"key_conv_width": 4},
    {"key_conv_width": 3, "shifted_value": False, "query_conv_width": 5},
    {"query_conv_width": 3},
    {"key_context_conv": 5},
    {"use_rope": True},
    {"rope_keys": True},
    {"rope_keys": True, "query_proj": True, "use_rope": True},
    {"key_bank_slots": 5, "key_bank_start": 3},
    {"key_bank_slots": 3, "key_bank_start": 3, "key_bank_marker": 1},
    {"window_size": 1},
    {"window_size": 64},
    {"impl": "reference"},
)
CASES = [(p, o) for p, o in itertools.product(PATTERNS, OPTIONS) if p in ("GS", "SGSG") or o == {}]
CASES += [("LA", {"shifted_value": False}), ("LA", {"use_rope": True}), ("GS", {"write_gate": "straight"})]


def ident(case):
    pattern, options = case
    return pattern + "-" + ("-".join(f"{k}={v}" for k, v in options.items()) or "default")


def build(pattern="GS", options=None, dtype=torch.float64, seed=0):
    cfg = dataclasses.replace(TINY, layer_pattern=pattern, **(options or {}))
    return model.build(cfg, seed=seed).to(dtype).eval()


def tokens(B=2, T=21, seed=0, vocab=32):
    return torch.randint(vocab, (B, T), generator=torch.Generator().manual_seed(seed))


# Counts from the design's table; they follow from the layer definitions alone.
@pytest.mark.parametrize(
    "options, count",
    [({}, 33_217_560), ({"vocab_size": 256, "key_conv_width": 4}, 8_403_480), ({"key_context_conv": 8}, 35_315_224)],
    ids=["seed", "bytes-key-conv", "context-conv"],
)
def test_parameter_counts(options, count):
    with torch.device("meta"):
        cfg = config.HybridConfig(**options)
        net = model.TransparentHybrid.__new__(model.TransparentHybrid)
        # Weights on the meta device cannot be drawn: the count needs the shapes only.
        net.reset_parameters = lambda generator=None: None
        model.TransparentHybrid.__init__(net, cfg)
    assert net.count_params() == count


@pytest.mark.parametrize("case", CASES, ids=ident)
def test_future_tokens_change_nothing_before(case):
    net = build(*case, dtype=torch.float32)
    table = audit.causality(net, tokens(2, 30), positions=(0, 3, 7, 8, 15, 28))
    assert table["ok"].all(), table.to_string()


class FinalStateReader(model.TransparentHybrid):
    """The source notes' leak: every position reads the memory as it is after the last token."""

    def forward(self, tokens, targets=None, **options):
        out = super().forward(tokens, targets, diagnostics=True)
        final = out.state.layers[0].memory.mean((1, 2))  # [B, V]
        return out._replace(logits=out.logits + final.sum(-1)[:, None, None] * self.embed.weight.sum(-1))


def test_causality_control_catches_a_final_state_read():
    net = FinalStateReader(TINY, generator=torch.Generator().manual_seed(0)).eval()
    table = audit.causality(net, tokens(2, 30))
    assert not table["ok"].any()


@pytest.mark.parametrize("case", CASES, ids=ident)
def test_one_token_at_a_time_equals_parallel(case):
    net, x = build(*case), tokens(2, 19)
    with torch.no_grad():
        whole = net(x).logits
        state, steps = None, []
        for t in range(x.shape[1]):
            logits, state = net.step(x[:, t], state)
            steps.append(logits)
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", [c for c in CASES if c[0] in ("SGSG", "GASL", "LA")], ids=ident)
def test_segments_equal_whole(case):
    net, x = build(*case), tokens(2, 40)
    with torch.no_grad():
        whole = net(x)
        state, parts = None, []
        for part in x.split([1, 2, 13, 17, 7], dim=1):
            out = net(part, state=state)
            parts.append(out.logits)
            state = out.state
    torch.testing.assert_close(torch.cat(parts, 1), whole.logits, rtol=1e-9, atol=1e-10)
    assert state.position == whole.state.position == 40
    torch.testing.assert_close(state.layers[1][0], whole.state.layers[1][0], rtol=1e-9, atol=1e-10)


def test_state_does_not_grow():
    net, state, sizes = build("SGSG", {"key_conv_width": 4}), None, []
    size = lambda s: sum(t.numel() for layer in s.layers for t in flat(layer))  # noqa: E731
    flat = lambda x: [x] if isinstance(x, torch.Tensor) else [t for y in x if y is not None for t in flat(y)]  # noqa: E731
    for t in range(12):
        _, state = net.step(tokens(1, 12)[:, t], state)
        sizes.append(size(state))
    assert len(set(sizes[TINY.window_size - 1 :])) == 1


def test_batch_invariance():
    net, x = build("GS", dtype=torch.float32), tokens(5, 33)
    with torch.no_grad():
        torch.testing.assert_close(net(x).logits[2:3], net(x[2:3]).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [1, 3, 4, 50])
@pytest.mark.parametrize("T", [1, 3, 4, 9, 16])
def test_window_attention_equals_masked_attention(window, T):
    g = torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(2, 2, T, 4, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(3))
    i, j = torch.arange(T)[:, None], torch.arange(T)[None]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=(j <= i) & (j > i - window))
    out = model.window_attention(q, k, v, window, None)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    w = torch.randn(out.shape, generator=g, dtype=torch.float64)
    ours, plain = (torch.autograd.grad((y * w).sum(), (q, k, v)) for y in (out, expected))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_memory_layer_equals_the_recurrence_written_out():
    """One G layer by hand: shifted write, own key as query, sigmoid gates."""
    net, x = build("G"), tokens(1, 9)
    layer, H, K = net.layers[0], TINY.n_heads, TINY.head_dim
    with torch.no_grad():
        h = layer.norm(net.embed(x))
        k = F.normalize(layer.key(h).view(1, 9, H, K), dim=-1)
        v = layer.value(h).view(1, 9, H, -1)
        beta, a = torch.sigmoid(layer.write_gate(h)), torch.sigmoid(layer.decay_gate(h))
        S, reads = torch.zeros(1, H, K, TINY.value_dim, dtype=torch.float64), []
        for t in range(9):
            S = S * a[:, t, :, None, None]
            if t:
                wrong = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t - 1], S)
                S = S + torch.einsum("bhk,bhv->bhkv", k[:, t - 1], beta[:, t - 1, :, None] * wrong)
            reads.append(torch.einsum("bhk,bhkv->bhv", k[:, t], S))
        expected = net.embed(x) + layer.out(torch.stack(reads, 1).flatten(2))
        got, _, state, _ = layer(net.embed(x), x, None, 0, None)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state.memory, S, rtol=1e-10, atol=1e-10)


def by_hand(net, x):
    """Logits of a model of G and S layers with default options, token by token, from the definitions."""
    cfg, embed = net.cfg, net.embed.weight
    H, K = cfg.n_heads, cfg.head_dim
    rms = lambda y, w: y / (y.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w  # noqa: E731
    y, T, states = embed[x], x.shape[1], None
    for i, layer in enumerate(net.layers):
        h = rms(y, layer.norm.weight)
        if cfg.layer_pattern[i] == "G":
            k = (h @ layer.key.weight.T).view(-1, T, H, K)
            k = k / k.norm(dim=-1, keepdim=True)
            v = (h @ layer.value.weight.T).view(-1, T, H, cfg.value_dim)
            beta = torch.sigmoid(h @ layer.write_gate.weight.T + layer.write_gate.bias)
            a = torch.sigmoid(h @ layer.decay_gate.weight.T + layer.decay_gate.bias)
            S, states, reads = torch.zeros(len(x), H, K, cfg.value_dim, dtype=y.dtype), [], []
            for t in range(T):
                S = S * a[:, t, :, None, None]
                if t:
                    wrong = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t - 1], S)
                    S = S + torch.einsum("bhk,bhv->bhkv", k[:, t - 1], beta[:, t - 1, :, None] * wrong)
                states.append(S)
                reads.append(torch.einsum("bhk,bhkv->bhv", k[:, t], S))
            y = y + torch.stack(reads, 1).flatten(2) @ layer.out.weight.T
        else:
            q, k, v = ((h @ f.weight.T).view(-1, T, H, cfg.d_model // H) for f in (layer.q, layer.k, layer.v))
            rows, s = torch.arange(T)[:, None], torch.arange(T)[None]
            mask = (s <= rows) & (s > rows - cfg.window_size)
            scores = torch.einsum("bthd,bshd->bhts", q, k) / (cfg.d_model // H) ** 0.5
            weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
            add = torch.einsum("bhts,bshd->bthd", weights, v).flatten(2) @ layer.out.weight.T
            if states is not None:
                query = (h @ layer.read_query.weight.T).clamp_min(0).view(-1, T, H, K)
                gate = torch.sigmoid(h @ layer.read_gate.weight.T + layer.read_gate.bias)
                read = torch.einsum("bthk,bthkv->bthv", query, torch.stack(states, 1)) * gate[..., None]
                add = add + read.flatten(2) @ layer.read_out.weight.T
            y = y + add
        h, ffn = rms(y, net.norms[i].weight), net.ffns[i]
        g = h @ ffn.gate.weight.T
        y = y + (g * torch.sigmoid(g) * (h @ ffn.up.weight.T)) @ ffn.down.weight.T
    return rms(y, net.norm.weight) @ embed.T


@pytest.mark.parametrize("pattern", ["GS", "SGS", "GSGS", "GGS"])
def test_model_equals_its_definition(pattern):
    """Every layer from the equations; with two G layers, S reads the nearest one before it."""
    net, x = build(pattern), tokens(2, 11)
    with torch.no_grad():
        for p in net.parameters():  # biases and norms away from where they start, so that each one counts
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype))
        torch.testing.assert_close(net(x).logits, by_hand(net, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern, option", [("S", "use_rope"), ("G", "rope_keys")])
def test_rope_turns_keys_by_their_position(pattern, option):
    """The same token everywhere gives the same key everywhere, but for its rotation."""
    x = torch.full((1, 6), 7)

    def keys(options):
        record = build(pattern, options)(x, diagnostics=True).diagnostics[0]
        return record["k"].transpose(1, 2) if pattern == "S" else record["keys"]  # [B, T, H, D]

    torch.testing.assert_close(keys({option: True}), mixers.rope(keys({}), 0, TINY.rope_base), rtol=1e-9, atol=1e-12)
    assert (keys({option: True})[0, 5] - keys({})[0, 5]).abs().max() > 0.05


def test_key_bank_gives_slots_their_rows():
    net = build("G", {"key_bank_slots": 3, "key_bank_start": 10, "key_bank_marker": 1})
    x = torch.tensor([[1, 5, 1, 12, 11, 1, 1]])
    keys = net(x, diagnostics=True).diagnostics[0]["keys"][0]  # [T, H, K]
    bank = net.layers[0].key_bank
    for t, row in ((0, 0), (2, 1), (3, 2), (4, 1), (5, 2), (6, 0)):
        torch.testing.assert_close(keys[t], bank[:, row].double())
    assert (bank @ bank.mT - torch.eye(3)).abs().max() < 1e-6
    assert (keys[1] - bank[:, 0]).abs().max() > 1e-3


def test_hard_gate_shuts_exactly_and_comes_back():
    x = torch.tensor([-5.0, -2.0, 0.0, 5.0], requires_grad=True)
    y = model.hard_sigmoid(x)
    assert y[0] == 0 and y[3] == 1 and 0 < y[1] < y[2] < 1
    for sign, moves in ((1.0, [False, True, True, True]), (-1.0, [True, True, True, False])):
        (grad,) = torch.autograd.grad((sign * y).sum(), x, retain_graph=True)
        assert [bool(g != 0) for g in grad] == moves


def test_hard_decay_reaches_one_and_closes_below_fp32():
    net = build("G", {"decay": "hard"}, dtype=torch.float32)
    with torch.no_grad():
        net.layers[0].decay_gate.bias[0], net.layers[0].decay_gate.bias[1] = 40.0, -40.0
    _, g = net.layers[0].gates(torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0)))
    assert (g[..., 0] == 0).all() and (g[..., 1] <= -16).all() and torch.isfinite(g).all()


def test_shut_hard_decay_opens_again():
    net = build("G", {"decay": "hard"}, dtype=torch.float32)
    with torch.no_grad():
        net.layers[0].decay_gate.bias.fill_(-4.0)
        net.layers[0].decay_gate.weight.zero_()
    x = tokens(2, 12)
    net(x, x.roll(-1, 1)).loss.backward()
    up = net.layers[0].decay_gate.bias.grad
    g = net.layers[0].gates(torch.zeros(1, 1, 16))[1]
    loss = -(g.exp()).sum()  # wants a larger decay factor
    (grad,) = torch.autograd.grad(loss, net.layers[0].decay_gate.bias)
    assert torch.isfinite(up).all() and (grad < 0).all()


def test_gates_keep_fp32_under_autocast():
    """In bf16 a decay of 1 - 2^-12 would round to 1 and the memory would never forget."""
    net = build("GS", dtype=torch.float32)
    with torch.no_grad():
        net.layers[0].decay_gate.bias.fill_(8.3)
    h = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    exact = net.layers[0].gates(h)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = net.layers[0].gates(h)
    assert all(torch.equal(a, b) for a, b in zip(exact, mixed, strict=True))


@pytest.mark.parametrize("pattern", ["GS", "SGSG"])
def test_segments_and_steps_under_bf16_autocast(pattern):
    net, x = build(pattern, dtype=torch.float32), tokens(2, 24)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        whole, state, parts = net(x).logits, None, []
        for part in x.split([9, 1, 1, 13], dim=1):
            out = net(part, state=state)
            parts.append(out.logits)
            state = out.state
    assert whole.dtype == torch.bfloat16 and state.layers[pattern.index("G")].memory.dtype == torch.float32
    error = (torch.cat(parts, 1).float() - whole.float()).norm() / whole.float().norm()
    assert error < 2e-2


def test_mamba_decay_starts_at_the_same_half_life():
    a, b = build("G"), build("G", {"decay": "mamba"})
    h = torch.zeros(1, 1, 16, dtype=torch.float64)
    torch.testing.assert_close(a.layers[0].gates(h)[1], b.layers[0].gates(h)[1])


@pytest.mark.parametrize("position", [0, 1000])
def test_rope_scores_depend_on_distance_only(position):
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=g, dtype=torch.float64).unbind(0)
    at = lambda x, p: mixers.rope(x, p, 100.0)[0, 0, 0]  # noqa: E731
    torch.testing.assert_close(at(q, position + 7) @ at(k, position + 3), at(q, 4) @ at(k, 0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(at(q, 5).norm(), q.norm(), rtol=1e-6, atol=0)


def test_lean_loss_equals_plain(monkeypatch):
    net, x = build("GS"), tokens(3, 11)
    y = tokens(3, 11, seed=1)
    y[:, ::2] = -100
    plain = net(x, y).loss
    expected = F.cross_entropy(net(x).logits.flatten(0, 1), y.flatten(), ignore_index=-100)
    torch.testing.assert_close(plain, expected)
    monkeypatch.setattr(model, "WHOLE_LOGITS", 64)  # 6 rows at a time
    lean = net(x, y).loss
    torch.testing.assert_close(lean, plain, rtol=1e-10, atol=0)
    for a, b in zip(
        torch.autograd.grad(lean, net.parameters()), torch.autograd.grad(plain, net.parameters()), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("margin", [2.0, 8.0, 14.0])
def test_lean_gradient_is_right_when_the_model_is_sure(monkeypatch, margin):
    """fp32 with 1 - p far below the rounding of the log-sum-exp: the gradient must keep its direction."""
    monkeypatch.setattr(model, "WHOLE_LOGITS", 1)
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 16, generator=g, dtype=torch.float64)
    y = torch.randint(50, (4, 6), generator=g)
    x = weight[y] * (margin + 14) / 16 + 0.05 * torch.randn(4, 6, 16, generator=g, dtype=torch.float64)
    grads = []
    for dtype in (torch.float64, torch.float32):
        a, w = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        if dtype == torch.float64:
            loss = F.cross_entropy((a @ w.T).flatten(0, 1), y.flatten())
        else:
            loss = model.cross_entropy(a, w, y)
        grads.append([t.double().flatten() for t in torch.autograd.grad(loss, (a, w))])
    for exact, rows_only in zip(*grads, strict=True):
        assert torch.nn.functional.cosine_similarity(exact, rows_only, dim=0) > 0.9999
        assert abs(rows_only.norm() / exact.norm() - 1) < 1e-3


def test_lean_loss_keeps_nothing_without_gradients(monkeypatch):
    monkeypatch.setattr(model, "WHOLE_LOGITS", 1)
    seen = []
    original = lean.summed_cross_entropy
    monkeypatch.setattr(lean, "summed_cross_entropy", lambda *a: seen.append(a[-1]) or original(*a))
    net, x = build(), tokens()
    net(x, x)
    with torch.no_grad():
        net(x, x)
    assert seen == [True, False]


def test_large_batches_of_an_ensemble_take_the_whole_loss(monkeypatch):
    """The row-by-row loss picks rows by value, which vmap cannot."""
    monkeypatch.setattr(model, "WHOLE_LOGITS", 1)
    net, x = build(dtype=torch.float32), tokens(2, 6)
    params = {n: p.detach()[None] for n, p in net.named_parameters()}
    f = lambda p, x: torch.func.functional_call(net, p, (x, x)).loss  # noqa: E731
    assert torch.func.vmap(f)(params, x[None]).shape == (1,)


def test_attention_split_over_rows_changes_nothing(monkeypatch):
    net, x = build("GS", dtype=torch.float32), tokens(3, 30)
    whole = net(x).logits
    monkeypatch.setattr(model, "SDPA_ROWS", 5)
    torch.testing.assert_close(net(x).logits, whole, rtol=1e-6, atol=1e-6)


def test_state_holds_no_more_than_it_says():
    """Slices would keep the keys of the whole sequence alive."""
    state = build("GS", {"key_conv_width": 4})(tokens(2, 64)).state
    for part in (state.layers[0].last_key, state.layers[0].last_beta, state.layers[0].convs[1], *state.layers[1]):
        assert part.untyped_storage().nbytes() == part.numel() * part.element_size()


def test_lean_loss_with_nothing_scored_is_zero(monkeypatch):
    monkeypatch.setattr(model, "WHOLE_LOGITS", 1)
    net, x = build("GS"), tokens()
    loss = net(x, torch.full_like(x, -100)).loss
    loss.backward()
    assert loss == 0 and all(p.grad is None or (p.grad == 0).all() for p in net.parameters())


def test_positions_choose_logits():
    net, x = build(), tokens()
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    torch.testing.assert_close(net(x, positions=mask).logits, net(x).logits[mask])


def test_diagnostics_only_when_asked_and_change_nothing():
    net, x = build(), tokens()
    a, b = net(x), net(x, diagnostics=True)
    assert a.diagnostics is None and [r["layer"] for r in b.diagnostics] == ["G", "S"]
    assert torch.equal(a.logits, b.logits)
    weights = analysis.attention_map(b.diagnostics[1], TINY.window_size)
    assert weights.shape == (2, 2, 21, 21)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))


def test_generation_equals_repeated_argmax():
    net, x = build(), tokens(2, 7)
    got = net.generate(x, 6)
    y = x
    with torch.no_grad():
        for _ in range(6):
            y = torch.cat([y, net(y).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(got, y[:, 7:])
    sampled = [net.generate(x, 6, temperature=1.0, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[0], sampled[2])


def test_same_seed_same_weights():
    a, b, c = (model.build(TINY, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(a[n], b[n]) for n in a) and not torch.equal(a["embed.weight"], c["embed.weight"])


def test_every_parameter_gets_a_gradient():
    for pattern, options in CASES:
        net, x = build(pattern, options), tokens(2, 12)
        net(x, tokens(2, 12, seed=1)).loss.backward()
        still = {n for n, p in net.named_parameters() if p.grad is None or not (p.grad != 0).any()}
        # Window 1 attends to the token itself whatever q and k are.
        allowed = {"q.weight", "k.weight"} if options.get("window_size") == 1 else set()
        assert not [n for n in still if not n.endswith(tuple(allowed) or "none")], (pattern, options, still)
        assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_memory_is_used_beyond_the_window():
    """A token outside the window reaches the logits through the memory, and only with a G layer."""
    x = tokens(1, 20)
    y = x.clone()
    y[0, 2] = (y[0, 2] + 1) % 32
    for pattern, changes in (("GS", True), ("S", False)):
        net = build(pattern)
        assert bool((net(x).logits[0, -1] != net(y).logits[0, -1]).any()) is changes


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda n: n(torch.zeros(2, 0, dtype=torch.long)), "tokens"),
        (lambda n: n(torch.zeros(3, dtype=torch.long)), "tokens"),
        (lambda n: n(torch.zeros(2, 3)), "tokens"),
        (lambda n: n(torch.full((1, 3), 32)), "vocabulary has 32"),
        (lambda n: n(torch.full((1, 3), -1)), "vocabulary has 32"),
        (lambda n: n(tokens(2, 3), tokens(2, 4)), "targets"),
        (lambda n: n(tokens(2, 3), positions=torch.ones(2, 3)), "positions"),
        (lambda n: n.generate(tokens(), 0), "n_tokens"),
        (lambda n: n.generate(tokens(), 1, temperature=-1.0), "temperature"),
        (lambda n: n(tokens(), state=build("GSS").forward(tokens()).state), "state"),
        (lambda n: n(tokens(), state=build("SG").forward(tokens()).state), "state: layer 0 is G"),
        (lambda n: n(tokens(), state=n(tokens(3)).state), r"state: layer 0 \(G\)"),
        (lambda n: n(tokens(), state=build("GS", {"window_size": 9})(tokens()).state), r"state: layer 1 \(S\)"),
        (lambda n: n(tokens(), state={}), "state"),
        (lambda n: n([[1, 2]]), "tokens: .*list"),
        (lambda n: n(torch.zeros(0, 3, dtype=torch.long)), "tokens"),
        (lambda n: n(tokens().to("meta")), "tokens: on meta"),
        (lambda n: n(tokens(2, 3), torch.full((2, 3), 32)), "targets: ids run"),
        (lambda n: n(tokens(2, 3), torch.full((2, 3), -1)), "targets: ids run"),
        (lambda n: n.step(tokens(2, 3)), "token: "),
        (lambda n: n.generate(tokens(), 2.5), "n_tokens"),
        (lambda n: n.generate(torch.zeros(2, 0, dtype=torch.long), 2), "tokens"),
    ],
)
def test_bad_input_names_the_argument(call, word):
    with pytest.raises(ValueError, match=word):
        call(build())


def test_build_refuses_other_configurations():
    with pytest.raises(ValueError, match="TrainConfig"):
        model.build(config.TrainConfig())


def test_trains_under_vmap():
    members = [model.build(TINY, seed=s) for s in range(3)]
    params, buffers = torch.func.stack_module_state(members)

    def loss(p, b, x, y):
        return torch.func.functional_call(members[0], (p, b), (x, y)).loss

    x, y = tokens(6, 12).view(3, 2, 12), tokens(6, 12, seed=1).view(3, 2, 12)
    grads = torch.func.vmap(torch.func.grad(loss))(params, buffers, x, y)
    members[1](x[1], y[1]).loss.backward()
    for name, p in members[1].named_parameters():
        torch.testing.assert_close(grads[name][1], p.grad, rtol=1e-4, atol=1e-5)
