"""The tiny transformer against loops written here: sizes, every option, causality, ensembles, fixed residuals, bad input."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import analysis
import audit
import config
import data
import mixers
import model
import tiny
import train

# Everything visible at once: more than one head, layer and pass, and weights large enough for attention to matter.
BASE = config.TinyConfig(d_model=12, n_layers=2, n_heads=3, ffn_dim=10, vocab_size=17, max_len=20, init_std=0.3)
RANKS = {"qkv_rank": 3, "out_rank": 2, "ffn_rank": 4}
PYTHIA = {"position": "rope", "parallel": True, "bias": True, "tie_head": False}
OPTIONS = (
    {},
    {"position": "rope"},
    {"position": "rope", "rope_base": 3.0},
    {"position": "alibi"},
    {"position": "none"},
    {"norm": "rms"},
    {"norm": "none"},
    {"pos_rank": 3},
    RANKS,
    {**RANKS, "fixed_residual": True, "bias": True},
    {"ffn_rank": 3, "fixed_residual": True},
    {"depth_shared": 2},
    {"tie_qkv": "kv"},
    {"tie_qkv": "qk", "position": "rope"},
    {"tie_qkv": "qv", "bias": True},
    {"tie_qkv": "qkv", "position": "alibi"},
    {"tie_qkv": "kv", "pos_rank": 3, "norm": "rms", **RANKS},
    {"tie_head": False},
    {"bias": True},
    {"parallel": True},
    PYTHIA,
    {"position": "rope", "rope_v": 1.0},
    {"position": "rope", "rope_v": 0.3},
    {"position": "rope", "rope_v": 1.0, "rope_v_inverse": True},
    {"rope_v": 0.5, "rope_v_inverse": True},
    {"position": "alibi", "rope_v": 0.5, "rope_v_inverse": True, "depth_shared": 2},
)


def ident(options):
    return "-".join(f"{k}={v}" for k, v in options.items()) or "default"


def build(options=None, dtype=torch.float64, seed=0):
    """A model whose every parameter is drawn, biases and norms too, which the initialisation leaves at 0 and 1."""
    net = tiny.TinyTransformer(dataclasses.replace(BASE, **(options or {}))).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in (*net.parameters(), *(b for n, b in net.named_buffers() if n.endswith("fixed"))):
            x.copy_(0.4 * torch.randn(x.shape, generator=generator) + (x.ndim == 1))
    return net


def tokens(B=2, T=11, seed=0, vocab=17):
    return torch.randint(vocab, (B, T), generator=torch.Generator().manual_seed(seed))


def without_drawing(**options):
    """A model whose weights have shapes only."""
    with torch.device("meta"):
        net = tiny.TinyTransformer.__new__(tiny.TinyTransformer)
        net.reset_parameters = lambda generator=None: None
        tiny.TinyTransformer.__init__(net, config.TinyConfig(**options))
    return net


# ------------------------------------------------------------------------------------------------ sizes

D8 = {"d_model": 8, "ffn_dim": 28}
LOW = {"pos_rank": 3, "qkv_rank": 3, "out_rank": 3, "ffn_rank": 3}
M70 = dict(d_model=512, n_layers=6, n_heads=8, ffn_dim=2048, vocab_size=50304, max_len=128, **PYTHIA)


# Trained and fixed numbers, from the design's table and the addition log.
@pytest.mark.parametrize(
    "options, count, fixed",
    [
        ({}, 763, 0),
        ({"ffn_dim": 28}, 959, 0),
        (D8, 1128, 0),
        ({**D8, "depth_shared": 2}, 1128, 0),
        ({**D8, "depth_shared": 3}, 1128, 0),
        (LOW, 512, 0),
        ({**LOW, "fixed_residual": True}, 512, 392),
        ({**LOW, "out_rank": 2}, 498, 0),
        ({**D8, "ffn_rank": 3}, 896, 0),
        ({**D8, "ffn_rank": 3, "fixed_residual": True}, 896, 448),
        ({**D8, "ffn_rank": 3, "norm": "rms"}, 872, 0),
        ({**D8, "ffn_rank": 3, "norm": "none"}, 848, 0),
        ({**D8, "ffn_rank": 3, "pos_rank": 6, "fixed_residual": True}, 878, 448),
        ({**LOW, "out_rank": 2, "norm": "rms", "tie_qkv": "kv"}, 456, 0),
        (M70, 70_420_480, 0),
    ],
    ids=lambda x: ident(x) if isinstance(x, dict) else None,
)
def test_parameter_counts(options, count, fixed):
    net = without_drawing(**options)
    assert (net.count_params(), net.count_fixed()) == (count, fixed)


def test_sizes_of_the_ties():
    """One d-by-d matrix less for two that are one, two less for three; of a factor B the same."""
    full, low = {}, {}
    for tie in ("none", "kv", "qk", "qv", "qkv"):
        full[tie] = without_drawing(tie_qkv=tie).count_params()
        low[tie] = without_drawing(tie_qkv=tie, qkv_rank=3).count_params()
    assert [full["none"] - full[t] for t in ("kv", "qk", "qv", "qkv")] == [49, 49, 49, 98]
    assert [low["none"] - low[t] for t in ("kv", "qk", "qv", "qkv")] == [21, 21, 21, 42]


def test_initial_weights():
    cfg = config.TinyConfig(d_model=64, n_heads=2, ffn_dim=256, vocab_size=500, qkv_rank=16, ffn_rank=8, pos_rank=32,
                            max_len=400, fixed_residual=True, bias=True)  # fmt: skip
    net = tiny.TinyTransformer(cfg)
    block = net.blocks[0]
    for weight in (net.embed.weight, net.position.table, net.position.factor, block.out.weight, block.qkv.fixed):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.05)
        assert abs(float(weight.detach().mean())) < 0.002
    for part, rows, columns, rank in ((block.qkv, 64, 192, 16), (block.up, 64, 256, 8), (block.down, 256, 64, 8)):
        assert float(part.A.detach().std()) == pytest.approx(math.sqrt(2 / (rows + rank)), rel=0.15)
        assert float(part.B.detach().std()) == pytest.approx(math.sqrt(2 / (rank + columns)), rel=0.15)
    for bias in (block.qkv.bias, block.out.bias, block.up.bias, block.norm.bias, net.norm.bias):
        assert not bias.any()
    for scale in (block.norm.weight, block.ffn_norm.weight, net.norm.weight):
        assert (scale == 1).all()


def test_equal_seeds_equal_models_and_the_residual_changes_no_weight():
    cfg = dataclasses.replace(BASE, **RANKS)
    with_residual = dataclasses.replace(cfg, fixed_residual=True)
    one, again, other = (model.build(with_residual, seed=s).state_dict() for s in (1, 1, 2))
    assert type(model.build(cfg)) is tiny.TinyTransformer
    for name in one:
        assert torch.equal(one[name], again[name])
        assert torch.equal(one[name], other[name]) == ("norm" in name)
    plain = model.build(cfg, seed=1).state_dict()
    assert set(one) - set(plain) == {name for name in one if name.endswith("fixed")} != set()
    assert all(torch.equal(plain[name], one[name]) for name in plain)


def test_every_encoding_of_the_settings_is_there():
    assert {type(build({"position": p}).position) for p in tiny.ENCODINGS} == set(tiny.ENCODINGS.values())
    with pytest.raises(ValueError, match="HybridConfig and TinyConfig are"):
        model.build(config.LSTMConfig())


# ------------------------------------------------------------------------------------------------ by hand


def turned(x, angle_scale, base):
    """x [D] at position angle_scale, by complex numbers: (x_i + i x_{i + D/2}) e^{i position base^(-2i/D)}."""
    half = len(x) // 2
    freq = torch.tensor([base ** (-2 * i / len(x)) for i in range(half)], dtype=torch.float64)
    y = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(freq), angle_scale * freq)
    return torch.cat([y.real, y.imag])


def normed(x, cfg, part):
    if cfg.norm == "layer":
        x = (x - x.mean()) / (((x - x.mean()) ** 2).mean() + 1e-5).sqrt()
        return x * part.weight + part.bias
    return x / ((x**2).mean() + 1e-6).sqrt() * part.weight if cfg.norm == "rms" else x


def mapped(x, part):
    if isinstance(part, tiny.LowRankLinear):
        y = (x @ part.A) @ part.B
        y = y if part.fixed is None else y + x @ part.fixed
    else:
        y = part.weight @ x
    return y if part.bias is None else y + part.bias


def attended(h, cfg, block, slopes):
    """h: T vectors [d]. Attention one query and one head at a time; a V that turns back is turned by its distance."""
    d, D = cfg.d_model, cfg.d_model // cfg.n_heads
    names = ["q", "k", "v"] if cfg.tie_qkv == "none" else [cfg.tie_qkv] + [c for c in "qkv" if c not in cfg.tie_qkv]
    names.sort(key=lambda group: min("qkv".index(c) for c in group))  # parts stand in order of their first letter
    parts = [mapped(x, block.qkv).split(d) for x in h]
    find = {c: next(i for i, group in enumerate(names) if c in group) for c in "qkv"}
    out = []
    for t in range(len(h)):
        heads = []
        for head in range(cfg.n_heads):
            lanes = slice(head * D, (head + 1) * D)
            q = parts[t][find["q"]][lanes]
            scores, values = [], []
            for j in range(t + 1):
                k, v = parts[j][find["k"]][lanes], parts[j][find["v"]][lanes]
                if cfg.position == "rope":
                    score = turned(q, t, cfg.rope_base) @ turned(k, j, cfg.rope_base)
                else:
                    score = q @ k
                score = score / math.sqrt(D)
                scores.append(score - slopes[head] * (t - j) if cfg.position == "alibi" else score)
                values.append(turned(v, cfg.rope_v * (j - t if cfg.rope_v_inverse else j), cfg.rope_base))
            weights = torch.stack(scores).exp()
            heads.append(sum(w * v for w, v in zip(weights / weights.sum(), values, strict=True)))
        out.append(mapped(torch.cat(heads), block.out))
    return out


def by_hand(net, row):
    """Logits [T, vocab] of one row of tokens."""
    cfg, slopes = net.cfg, [0.0625, 0.00390625, 0.25]  # of three heads: 2^-4, 2^-8, and the first slope of four heads
    x = [net.embed.weight[i] for i in row]
    if cfg.position == "learned":
        table = net.position.table if not cfg.pos_rank else net.position.table @ net.position.factor
        x = [x[t] + table[t] for t in range(len(x))]

    def feed(h, block):
        up = mapped(h, block.up)
        return mapped(up * (1 + torch.erf(up / math.sqrt(2))) / 2, block.down)

    for _, block in itertools.product(range(cfg.depth_shared), net.blocks):
        h = [normed(y, cfg, block.norm) for y in x]
        mixed = attended(h, cfg, block, slopes)
        middle = [y + m for y, m in zip(x, mixed, strict=True)]
        if cfg.parallel:
            x = [y + feed(z, block) for y, z in zip(middle, h, strict=True)]
        else:
            x = [y + feed(normed(y, cfg, block.ffn_norm), block) for y in middle]
    head = net.embed.weight if cfg.tie_head else net.head.weight
    return torch.stack([head @ normed(y, cfg, net.norm) for y in x])


@pytest.mark.parametrize("options", OPTIONS, ids=ident)
def test_the_model_equals_loops(options):
    net, x = build(options), tokens()
    with torch.no_grad():
        expected = torch.stack([by_hand(net, row) for row in x])
        given = net(x).logits
        watched = net(x, diagnostics=True)
    torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(watched.logits, expected, rtol=1e-10, atol=1e-10)


def test_no_option_is_without_effect():
    """Options that bring no weights, on the same weights: every two of them give different answers."""
    plain, x = build({"position": "none"}), tokens()
    arms = [
        {},
        {"position": "rope"},
        {"position": "rope", "rope_base": 3.0},
        {"position": "alibi"},
        {"rope_v": 0.3},
        {"rope_v": 1.0},
        {"rope_v": 1.0, "rope_v_inverse": True},
        {"depth_shared": 2},
    ]
    logits = []
    for options in arms:
        net = build({"position": "none", **options})
        net.load_state_dict(plain.state_dict())
        logits.append(net(x).logits.detach().flatten())
    assert torch.pdist(torch.stack(logits)).min() > 1e-2


# ------------------------------------------------------------------------------------------------ positions


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_rotation():
    x = drawn(2, 3, 9, 8)
    for share in (1.0, 0.3, -1.0):
        expected = [turned(x[1, 2, t], share * t, 50.0) for t in range(9)]
        torch.testing.assert_close(tiny.rotate(x, 50.0, share)[1, 2], torch.stack(expected), rtol=1e-12, atol=1e-12)
    same = mixers.rope(x.transpose(1, 2).float(), 0, 50.0).transpose(1, 2)  # the workbook's other rotation
    torch.testing.assert_close(tiny.rotate(x.float(), 50.0), same, rtol=1e-5, atol=1e-5)
    assert torch.equal(tiny.rotate(x, 50.0, 0.0), x)
    assert tiny.rotate(x.bfloat16(), 50.0).dtype == torch.bfloat16


def test_rope_scores_depend_on_distance_only():
    encoding = tiny.Rope(dataclasses.replace(BASE, position="rope"))
    q, k = (drawn(1, 1, 1, 4, seed=s).expand(1, 1, 12, 4) for s in (0, 1))  # the same vector at every position
    q, k, _ = encoding.turn(q, k, q)
    scores = (q @ k.mT)[0, 0]
    by_distance = [scores.diagonal(-n) for n in range(12)]
    assert max(float(line.max() - line.min()) for line in by_distance) < 1e-12
    means = torch.stack([line.mean() for line in by_distance])
    assert (means[:, None] - means).abs().fill_diagonal_(1).min() > 1e-3  # and every distance has a score of its own


@pytest.mark.parametrize("inverse", [False, True])
def test_what_a_rotated_value_depends_on(inverse):
    """Turned back, what arrives depends on how far away it stood; not turned back, on where."""
    encoding = tiny.Encoding(dataclasses.replace(BASE, position="none", rope_v=0.7, rope_v_inverse=inverse))
    v = drawn(1, 1, 1, 4).expand(1, 1, 12, 4)
    arrived = {}
    for t, j in itertools.product(range(12), range(12)):
        _, _, turned_v = encoding.turn(v, v, v)
        arrived[t, j] = encoding.turn_back(turned_v[:, :, j : j + 1].expand(1, 1, 12, 4))[0, 0, t]
    same = {}
    for (t, j), y in arrived.items():
        same.setdefault(j - t if inverse else j, []).append(y)
    groups = [torch.stack(ys) for ys in same.values()]
    assert max(float((g - g[0]).abs().max()) for g in groups) < 1e-12
    assert len(groups) == (23 if inverse else 12)
    assert torch.pdist(torch.stack([g[0] for g in groups])).min() > 1e-3


def test_alibi_slopes_as_published():
    """Eight heads and sixteen as in the paper; twelve as the authors' code extends it."""
    assert tiny.alibi_slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    ratio = 1 / math.sqrt(2)
    assert tiny.alibi_slopes(16) == pytest.approx([ratio ** (i + 1) for i in range(16)])
    assert tiny.alibi_slopes(12) == pytest.approx(tiny.alibi_slopes(8) + [ratio, ratio / 2, ratio / 4, ratio / 8])
    assert tiny.alibi_slopes(1) == [1 / 256]
    assert tiny.alibi_slopes(3) == [1 / 16, 1 / 256, 1 / 4]


def test_attention_with_a_bias_equals_a_mask_in_a_loop():
    q, k, v, bias = drawn(2, 3, 7, 4), drawn(2, 3, 7, 4, seed=1), drawn(2, 3, 7, 5, seed=2), drawn(3, 7, 7, seed=3)
    expected, weights = torch.zeros(2, 3, 7, 5, dtype=torch.float64), torch.zeros(2, 3, 7, 7, dtype=torch.float64)
    for b, h, t in itertools.product(range(2), range(3), range(7)):
        score = torch.stack([q[b, h, t] @ k[b, h, j] / 2 + bias[h, t, j] for j in range(t + 1)])
        weights[b, h, t, : t + 1] = score.exp() / score.exp().sum()
        expected[b, h, t] = sum(weights[b, h, t, j] * v[b, h, j] for j in range(t + 1))
    record = {}
    mapped_ = torch.func.vmap(tiny.attention)(*(x[None] for x in (q, k, v, bias)))[0]
    for given in (tiny.attention(q, k, v, bias), tiny.attention(q, k, v, bias, record), mapped_):
        torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(record["attention"], weights, rtol=1e-10, atol=1e-12)


def test_an_encoding_is_added_in_a_few_lines():
    class Sinusoidal(tiny.Encoding):
        def embed(self, x):
            at = torch.arange(x.shape[1], dtype=x.dtype)[:, None] / 100 ** (torch.arange(0, 12, 2) / 12)
            return x + torch.cat([at.sin(), at.cos()], dim=-1)

    net, x = build({"position": "none"}), tokens()
    learned = build()
    learned.load_state_dict({**net.state_dict(), "position.table": torch.zeros(20, 12)})
    learned.position.table.data += Sinusoidal(BASE).embed(torch.zeros(1, 20, 12, dtype=torch.float64))[0]
    net.position = Sinusoidal(net.cfg)
    torch.testing.assert_close(net(x).logits, learned(x).logits, rtol=1e-11, atol=1e-11)


# ------------------------------------------------------------------------------------------------ sharing and ties


@pytest.mark.parametrize("layers, times", [(1, 3), (2, 2)])
def test_shared_depth_is_the_same_blocks_again(layers, times):
    net = build({"n_layers": layers, "depth_shared": times})
    deep = build({"n_layers": layers * times})
    copies = {n: w for n, w in net.state_dict().items() if not n.startswith("blocks")}
    for i in range(layers * times):
        own = net.blocks[i % layers].state_dict()
        copies |= {f"blocks.{i}.{name}": w for name, w in own.items()}
    deep.load_state_dict(copies)
    out = net(tokens(), diagnostics=True)
    torch.testing.assert_close(out.logits, deep(tokens()).logits, rtol=1e-11, atol=1e-11)
    assert [r["index"] for r in out.diagnostics] == list(range(layers * times))


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("tie, order", [("kv", "qkk"), ("qk", "qqv"), ("qv", "qkq"), ("qkv", "qqq")])
def test_a_tie_is_equal_projections(tie, order, rank):
    """An untied model whose q, k and v matrices (or factors B) are copies gives the same, whatever is turned."""
    options = {"position": "rope", "rope_v": 0.5, "qkv_rank": rank}
    net, untied = build({**options, "tie_qkv": tie}), build(options)
    letters = sorted(set(order), key="qkv".index)
    state = net.state_dict()
    for name in [n for n in state if ".qkv." in n]:
        if name.endswith((".weight", ".B")):
            axis = 1 if name.endswith(".B") else 0
            parts = dict(zip(letters, state[name].chunk(len(letters), dim=axis), strict=True))
            state[name] = torch.cat([parts[c] for c in order], dim=axis)
    untied.load_state_dict(state)
    torch.testing.assert_close(net(tokens()).logits, untied(tokens()).logits, rtol=1e-11, atol=1e-11)


# ------------------------------------------------------------------------------------------------ as a model


@pytest.mark.parametrize("options", OPTIONS, ids=ident)
def test_future_tokens_change_nothing_before(options):
    table = audit.causality(build(options, dtype=torch.float32), tokens(2, 20), positions=(0, 1, 7, 18))
    assert table["ok"].all(), table.to_string()


def test_loss_and_chosen_positions():
    for options in ({}, PYTHIA):
        net, x = build(options), tokens()
        targets = tokens(seed=1)
        targets[:, :6] = -100
        whole = net(x)
        assert whole.loss is None and whole.diagnostics is None and whole.state is None
        out = net(x, targets)
        expected = F.cross_entropy(whole.logits[:, 6:].flatten(0, 1), targets[:, 6:].flatten())
        torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=1e-6)
        assert out.logits is None
        scored = targets != -100
        torch.testing.assert_close(net(x, targets, positions=scored).logits, whole.logits[scored], rtol=1e-12, atol=0)


def test_diagnostics_are_what_happened():
    net, x = build({"position": "rope", "rope_v": 0.5, "depth_shared": 2}), tokens()
    records = net(x, diagnostics=True).diagnostics
    assert len(records) == 4 and all(r["layer"] == "A" for r in records)
    for i, r in enumerate(records):
        D = r["q"].shape[-1]
        assert r["attention"].shape == (2, 3, 11, 11) and not any(
            v.requires_grad for v in r.values() if hasattr(v, "grad")
        )
        scores = (r["q"] @ r["k"].mT / math.sqrt(D)).masked_fill(torch.ones(11, 11).triu(1).bool(), -math.inf)
        torch.testing.assert_close(r["attention"], scores.softmax(-1), rtol=1e-10, atol=1e-12)
        mixed = (r["attention"] @ r["v"]).transpose(1, 2).flatten(2) @ net.blocks[i % 2].out.weight.T
        torch.testing.assert_close(r["attended"], mixed, rtol=1e-10, atol=1e-12)
    assert list(analysis.diagnose(net.float(), x)["layer"]) == ["0 A", "1 A", "2 A", "3 A"]


@pytest.mark.parametrize("options", OPTIONS, ids=ident)
def test_an_ensemble_equals_its_members(options):
    nets, x = [build(options, dtype=torch.float32, seed=s) for s in (0, 1)], tokens(3, 13)
    params, buffers = torch.func.stack_module_state(nets)
    loss = lambda p, b: torch.func.functional_call(nets[0], (p, b), (x, x)).loss  # noqa: E731
    grads, losses = torch.func.vmap(torch.func.grad_and_value(loss))(params, buffers)
    assert (losses[0] - losses[1]).abs() > 1e-3
    for i, net in enumerate(nets):
        alone = net(x, x).loss
        torch.testing.assert_close(losses[i], alone, rtol=1e-5, atol=1e-6)
        for name, g in zip(params, torch.autograd.grad(alone, net.parameters()), strict=True):
            torch.testing.assert_close(grads[name][i], g, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", [{"position": "alibi"}, {**RANKS, "fixed_residual": True, **PYTHIA}], ids=ident)
def test_an_ensemble_compiles(options):
    """In one graph, with the gradients of the plain operations: SDPA under vmap cannot be traced backwards."""
    nets, x = [build(options, dtype=torch.float32, seed=s) for s in (0, 1)], tokens(3, 13)
    params, buffers = torch.func.stack_module_state(nets)
    loss = lambda p, b, x: torch.func.functional_call(nets[0], (p, b), (x, x)).loss  # noqa: E731
    gradient = torch.func.vmap(torch.func.grad(loss), in_dims=(0, 0, None))
    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True)(params, buffers, x)
    expected = gradient(params, buffers, x)
    for name in expected:
        torch.testing.assert_close(compiled[name], expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"position": "alibi"}, {"position": "rope", "rope_v": 0.5}, {**RANKS, "fixed_residual": True}, PYTHIA],
    ids=ident,
)
def test_under_autocast(options):
    net, x = build(options, dtype=torch.float32), tokens(4, 20)
    expected = float(net(x, x).loss.detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = net(x, x).loss
    assert loss.dtype == torch.float32
    assert 0 < abs(float(loss.detach()) / expected - 1) < 2e-2  # of another precision, and the same
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(net.parameters())))


TASK = data.MultiNeedle(seq_len=20, vocab_size=17, n_needles=1, n_markers=4)
FIXED = config.TinyConfig(**LOW, fixed_residual=True, vocab_size=17)


def test_a_fixed_residual_does_not_train_and_is_kept(tmp_path):
    net = model.build(FIXED, seed=3)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    fixed = {name for name in before if name.endswith("fixed")}
    assert len(fixed) == 4 and not fixed & {name for name, _ in net.named_parameters()}
    phase = train.Phase("p", train.Part(TASK, batch_size=16), steps=20)
    cfg = config.TrainConfig(lr=1e-2, weight_decay=0.1, warmup_steps=0)
    run = train.fit(net, phase, cfg, run_dir=tmp_path / "run", progress=False)
    assert len(run.history) > 0
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name in fixed), name
    analysis.accuracy(net, TASK, trials=100)
    # It counts in what the model does, and so it has to come back with the weights.
    x = TASK.sample(4, torch.Generator().manual_seed(0)).tokens
    again = model.build(FIXED, seed=4)
    assert not torch.allclose(again(x).logits, net(x).logits, atol=1e-3)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(x).logits, net(x).logits)


@pytest.mark.parametrize("options", [{}, {"position": "alibi", "pos_rank": 0}], ids=ident)
def test_members_trained_together_equal_each_alone(options):
    cfg = dataclasses.replace(FIXED, **options)
    options = dict(steps=12, batch_size=8, progress=False)
    settings = config.TrainConfig(lr=1e-2, warmup_steps=0, log_every=1)
    build_ = lambda seed: model.build(cfg, seed=seed)  # noqa: E731
    together = train.fit_ensemble(build_, TASK, settings, seeds=(0, 1), **options)
    for i in (0, 1):
        alone = train.fit_ensemble(build_, TASK, settings, seeds=(i,), **options)
        curve = together.history.query("member == @i")["loss"].to_numpy()
        assert curve == pytest.approx(alone.history["loss"].to_numpy(), rel=1e-4)
        first, last = build_(i).state_dict(), together.member(i).state_dict()
        for name in first:
            assert torch.equal(first[name], last[name]) == name.endswith("fixed"), name
    assert len(together.accuracies(TASK, trials=50)) == 2


def test_bad_input_is_refused():
    net, x = build(), tokens()
    for wrong in (x.float(), x[0], x[:, :0], x.tolist()):
        with pytest.raises(ValueError, match=r"^tokens: needs int64 \[B, T\]"):
            net(wrong)
    for name, low, high in (("tokens", 0, 17), ("tokens", -1, 16), ("targets", 0, 17), ("targets", -1, 16)):
        ids = torch.cat([torch.full((2, 1), low), torch.full((2, 1), high)], dim=1)
        with pytest.raises(ValueError, match=rf"^{name}: ids run from {low} to {high}, .*raise TinyConfig.vocab_size"):
            net(**{"tokens": ids % 17, name: ids})
    with pytest.raises(ValueError, match=r"^targets: needs torch.int64 \[2, 11\]"):
        net(x, x[:, :5])
    with pytest.raises(ValueError, match=r"^positions: needs torch.bool \[2, 11\]"):
        net(x, positions=x)
    with pytest.raises(ValueError, match="21 of them, but positions were made for 20; raise TinyConfig.max_len"):
        net(tokens(1, 21))
    for position in ("rope", "alibi", "none"):
        assert net(tokens(1, 20)).logits.shape == (1, 20, 17)
        assert build({"position": position})(tokens(1, 30)).logits.shape == (1, 30, 17)
    with pytest.raises(ValueError, match="vocab_size"):
        train.fit(
            build({"vocab_size": 16}), train.Phase("p", train.Part(TASK, batch_size=2), steps=1), config.TrainConfig()
        )
