"""Probes: every diagnostic against a model, or a row, whose answer is known by construction or from a plain loop."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import analysis
import config
import core
import data
import interference
import model
import probes

TASK = data.MultiNeedle(seq_len=32, vocab_size=64, n_needles=3, n_markers=4)
CFG = config.HybridConfig(
    d_model=16,
    n_heads=2,
    head_dim=8,
    value_dim=8,
    vocab_size=64,
    window_size=4,
    chunk_size=16,
    g_bias=6.0,
    init_std=0.1,
)
OPTIONS = [
    {},
    {"shifted_value": False, "erase": "raw", "decay": "mamba"},
    {"layer_pattern": "GSG", "key_conv_width": 3, "query_conv_width": 2},
    {"layer_pattern": "SGAL", "key_context_conv": 4, "write_gate": "hard", "decay": "hard"},
    {"rope_keys": True, "use_rope": True, "query_proj": True, "decay": "none", "write_gate": "straight"},
    {"layer_pattern": "G", "key_bank_slots": 4, "key_bank_start": 60, "erase": "raw"},
]
named = lambda changes: "-".join(map(str, changes)) or "default"  # noqa: E731


def built(seed=0, **changes):
    return model.build(dataclasses.replace(CFG, **changes), seed=seed)


@torch.no_grad()
def gated(*, write=(0.3, -1.2), decay=(4.0, 6.0), seed=3, **changes):
    """A model whose gates are constants: sigmoid of the given logits, per head."""
    net = built(seed, **changes)
    for layer in net.layers:
        if isinstance(layer, model.MemoryLayer):
            layer.write_gate.weight.zero_()
            layer.write_gate.bias.copy_(torch.tensor(write))
            if net.cfg.decay != "none":
                layer.decay_gate.weight.zero_()
                layer.decay_gate.bias.copy_(torch.tensor(decay))
    return net


class Answers(torch.nn.Module):
    """A model that answers as `rule(tokens, positions) -> int64 [N]` says; it keeps the tokens it was shown."""

    def __init__(self, rule, vocab_size=64):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.rule, self.vocab_size, self.seen = rule, vocab_size, []

    def forward(self, tokens, targets=None, *, positions=None):
        self.seen.append(tokens)
        logits = torch.nn.functional.one_hot(self.rule(tokens, positions), self.vocab_size).float()
        return model.Output(logits, None, None, None)


def reader(task):
    """The oracle of `task` as a model."""
    return Answers(lambda tokens, at: task.oracle(data.Batch(tokens, torch.where(at, 0, -100)))[at], task.vocab_size)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ------------------------------------------------------------------------------------------------ what stands where


def by_hand(tokens, answers):
    """A batch of one row; answers: {where it is due: where it stands}."""
    tokens = torch.tensor([tokens])
    targets, distance = torch.full_like(tokens, -100), torch.full_like(tokens, -1)
    for cue, source in answers.items():
        targets[0, cue], distance[0, cue] = tokens[0, source], cue - source - 1
    return data.Batch(tokens, targets, {"distance": distance, "index": distance})


@pytest.mark.parametrize(
    ("task", "tokens", "answers", "expected"),
    [
        (
            data.MultiNeedle(seq_len=10, vocab_size=64, n_needles=2, n_markers=4, queries=1),
            [1, 60, 7, 2, 62, 9, 3, 4, 5, 62],
            {9: 5},
            "h m v h m v h h h c",
        ),
        (
            data.MultiNeedle(seq_len=13, vocab_size=64, n_needles=2, n_markers=4, value_width=2, layout="answers"),
            [60, 7, 8, 1, 62, 9, 9, 2, 62, 9, 9, 60, 7],
            {8: 5, 9: 6, 11: 1, 12: 2},
            "m v v h m v v h c a a c a",
        ),
        (
            data.SharedMarkerNeedles(seq_len=11, vocab_size=64, n_needles=2, queries=1),
            [5, 63, 7, 1, 6, 63, 8, 2, 3, 5, 63],
            {10: 2},
            "x m v h x m v h h x c",
        ),
        (
            data.SingleNeedle(seq_len=6, vocab_size=64, own_cue=True),
            [1, 63, 7, 2, 3, 62],
            {5: 2},
            "h m v h h c",
        ),
        (data.Echo(seq_len=6, vocab_size=64), [4, 5, 6, 63, 4, 5], {3: 0, 4: 1, 5: 2}, "v v v c c c"),
    ],
)
def test_roles_are_those_of_the_row(task, tokens, answers, expected):
    letters = dict(zip("hmvcxa", probes.ROLES, strict=True))
    found = probes.roles(task, by_hand(tokens, answers))
    assert [probes.ROLES[i] for i in found[0]] == [letters[c] for c in expected.split()]


def test_values_of_a_chain_are_found_and_removed_needles_are_not():
    chain = data.VariableTracking(seq_len=32, vocab_size=64, n_needles=2, hops=1, n_names=6)
    batch = chain.sample(3, analysis.fresh(0))
    assert (batch.tokens.gather(1, probes.values_at(chain, batch) - 1) == chain.assign).all()
    gone = dataclasses.replace(TASK, remove_needle=True)
    with pytest.raises(ValueError, match="remove_needle"):
        probes.values_at(gone, gone.sample(2, analysis.fresh(0)))
    text = data.Bigrams(seq_len=16, vocab_size=64)
    with pytest.raises(ValueError, match="where its answers stand"):
        probes.confusion(reader(TASK), text, trials=10)


# ------------------------------------------------------------------------------------------------ gates


@pytest.mark.parametrize("pattern", ["G", "GSG"])
def test_gates_are_those_set_by_hand(pattern):
    """The embedding says what a token is; the first layer's gates read it off."""
    task = dataclasses.replace(TASK, needle_range=(32, 60), haystack_range=(0, 32))
    net = built(layer_pattern=pattern)
    with torch.no_grad():
        net.embed.weight.zero_()
        for lo, hi, unit in ((0, 32, 0), (60, 64, 1), (32, 60, 2)):  # haystack, markers, values
            net.embed.weight[lo:hi, unit] = 3.0  # of d 16: normed to 4
        for gate in (net.layers[0].write_gate, net.layers[0].decay_gate):
            gate.weight.zero_()
            gate.bias.zero_()
        write, decay = [[-1.0, 0.5, 0.1], [-0.2, 1.0, 0.0]], [[1.0, 2.0, 0.3], [0.5, 0.2, 0.1]]
        net.layers[0].write_gate.weight[:, :3] = torch.tensor(write)
        net.layers[0].decay_gate.weight[:, :3] = torch.tensor(decay)
    table = probes.gates_by_token(net, task, rows=5)
    assert table["layer"].unique().tolist() == [i for i, letter in enumerate(pattern) if letter == "G"]
    table = table[table["layer"] == 0].set_index("token")
    assert table["tokens"].to_dict() == {"haystack": 5 * 23, "marker": 15, "value": 15, "cue": 15}
    total = 0
    for token, unit in (("haystack", 0), ("marker", 1), ("value", 2), ("cue", 1)):
        beta = [sigmoid(4 * head[unit]) for head in write]
        g = [math.log(sigmoid(4 * head[unit])) for head in decay]
        row = table.loc[token]
        found = row[["beta", "beta_least", "beta_most", "log_decay", "log_decay_least", "log_decay_most"]]
        assert list(found) == pytest.approx([sum(beta) / 2, min(beta), max(beta), sum(g) / 2, min(g), max(g)], rel=1e-5)
        total += row["tokens"] * sum(beta)
    assert table.loc["haystack", "mass"] == pytest.approx(115 * (sigmoid(-4) + sigmoid(-0.8)) / total, rel=1e-5)
    assert table["mass"].sum() == pytest.approx(1)


# ------------------------------------------------------------------------------------------------ keys


@pytest.mark.parametrize("changes", OPTIONS, ids=named)
def test_key_similarity_against_a_loop(changes):
    net, marker = built(seed=1, **changes), 63
    tokens = torch.randint(0, 60, (3, 14), generator=analysis.fresh(0))
    tokens[:, 4] = tokens[:, 2]  # the same id twice: no pair
    tokens[0, 7] = marker  # the marker's own earlier occurrence erases nothing of others
    with_marker = torch.cat([tokens[:, :-1], torch.full((3, 1), marker)], dim=1)
    table = probes.key_similarity(net, tokens, marker=marker)
    records = [r for r in analysis.records(net, with_marker) if r["layer"] == "G"]
    assert table["layer"].tolist() == [r["index"] for r in records]
    for row, r in zip(table.itertuples(), records, strict=True):
        k, beta = r["keys"].double(), r["beta"].double()
        pairs, alike, overlap, erased, weight = [[], []], [], [], 0.0, 0.0
        for h in range(2):
            for b in range(3):
                ids = with_marker[b].tolist()
                for i in range(14):
                    pairs[h] += [abs(float(k[b, i, h] @ k[b, j, h])) for j in range(14) if ids[i] != ids[j]]
                    if ids[i] != marker:
                        squared = float(k[b, i, h] @ k[b, 13, h]) ** 2
                        overlap.append(squared)
                        erased += squared * float(beta[b, i, h])
                        weight += float(beta[b, i, h])
                alike += [float(k[b, 13, h] @ k[c, 13, h]) for c in range(3) if c != b]
        heads = [np.mean(p) for p in pairs]
        expected = [np.mean(heads), min(heads), max(heads), np.mean(alike), np.mean(overlap)]
        found = [row.similarity, row.least, row.most, row.across_contexts, row.overlap]
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert row.erased == pytest.approx(erased / len(overlap), rel=1e-4)
        assert row.written_overlap == pytest.approx(erased / weight, rel=1e-4)


def test_the_marker_has_one_key_until_something_mixes_tokens():
    tokens = torch.randint(0, 60, (6, 12), generator=analysis.fresh(0))
    alike = lambda **changes: probes.key_similarity(built(**changes), tokens, marker=63)["across_contexts"]  # noqa: E731
    assert alike()[0] == pytest.approx(1, abs=1e-5)
    assert alike(key_conv_width=4)[0] < 0.7
    first, second = alike(layer_pattern="GG", write_gate="sigmoid", beta_bias=2.0)
    assert first == pytest.approx(1, abs=1e-5) and second < 0.99
    assert math.isnan(probes.key_similarity(built(), tokens[:1], marker=63)["across_contexts"][0])
    assert "erased" not in probes.key_similarity(built(), tokens)


@pytest.mark.parametrize("changes", [{}, {"key_conv_width": 4}, {"key_context_conv": 4}], ids=named)
def test_untrained_keys_are_as_similar_as_expected(changes):
    cfg = dataclasses.replace(CFG, d_model=64, head_dim=32, vocab_size=512, **changes)
    tokens = torch.randperm(512, generator=analysis.fresh(0))[:256].view(1, 256)
    tables = [probes.key_similarity(model.build(cfg, seed=s), tokens) for s in range(6)]
    measured, expected = np.mean([t["similarity"][0] for t in tables]), tables[0]["untrained"][0]
    # Neighbouring windows of a convolution share tokens at other taps, which does not align them.
    assert measured == pytest.approx(expected, rel=0.015)
    assert expected == probes.untrained_similarity(cfg) > 1.04 * tables[0]["random"][0]


def test_long_rows_are_compared_at_a_sample(monkeypatch):
    tokens = torch.randint(0, 60, (2, 40), generator=analysis.fresh(0))
    net = built()
    whole = probes.key_similarity(net, tokens, marker=61)
    monkeypatch.setattr(probes, "PAIRED", 20)
    part = probes.key_similarity(net, tokens, marker=61)
    assert part["similarity"][0] != whole["similarity"][0]
    assert part["similarity"][0] == pytest.approx(whole["similarity"][0], rel=0.2)
    assert part["across_contexts"][0] == pytest.approx(1, abs=1e-5)  # the marker itself is in the sample
    assert np.isfinite(probes.self_retrieval(net, tokens)["cosine"]).all()
    assert probes.self_retrieval(net, tokens)["expected_cosine"].isna().all()


# ------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("changes", OPTIONS, ids=named)
def test_gradient_is_the_slope_of_the_loss(changes):
    """Central differences in float64: the embedding of the value moved along every coordinate."""
    # Hard and straight gates have a gradient of their own, on purpose not the slope.
    changes = {k: v for k, v in changes.items() if v not in ("hard", "straight")}
    net = built(seed=2, **changes).train()
    rows, distance = 2, 9
    table = probes.gradient_survival(net, TASK, [distance], rows=rows)
    assert net.training and all(p.grad is None and p.requires_grad for p in net.parameters())
    batch = dataclasses.replace(TASK, distance=distance).sample(rows, analysis.fresh(10_000))
    wide = built(seed=2, **{**changes, "impl": "torch"}).double()
    shift = 1e-5 * torch.cat([torch.eye(16), -torch.eye(16)]).double().repeat(rows, 1)  # 32 moved copies of every row

    def moved(module, inputs, out):
        out = out.clone()
        out[:, TASK.seq_len - 1 - 1 - distance] += shift
        return out

    wide.embed.register_forward_hook(moved)
    with torch.no_grad():
        log_p = wide(batch.tokens.repeat_interleave(32, 0)).logits[:, -1].log_softmax(-1)
    loss = -log_p.gather(1, batch.targets[:, -1:].repeat_interleave(32, 0)).view(rows, 2, 16)
    norms = ((loss[:, 0] - loss[:, 1]) / 2e-5).norm(dim=1)
    expected = [math.log10(x) for x in (norms.mean(), norms.min(), norms.max())]
    assert table[["gradient", "least", "most"]].iloc[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_gradient_far_away_is_a_small_number_and_not_zero():
    """Next to nothing is written, so decay alone stands between value and cue: (d + 1) log10 of the best head's share."""
    net = gated(layer_pattern="G", write=(-9.0, -9.0), decay=(1.0, 2.0))
    task = data.MultiNeedle(seq_len=1100, vocab_size=64, n_needles=2, n_markers=4)
    table = probes.gradient_survival(net, task, [1000, 10, 10], rows=4).set_index("distance")
    assert table.index.tolist() == [10, 1000]
    per_token = math.log10(sigmoid(2.0))
    assert table["kept"].tolist() == pytest.approx([11 * per_token, 1001 * per_token], rel=1e-5)
    assert table.loc[1000, "decay"] == pytest.approx(990 * per_token, rel=1e-5) and table.loc[1000, "decay"] < -50
    assert table.loc[1000, "survival"] == pytest.approx(table.loc[1000, "decay"], abs=0.4)
    assert table.loc[10, "survival"] == table.loc[10, "decay"] == 0
    assert (table["least"] <= table["gradient"]).all() and (table["gradient"] <= table["most"]).all()


def test_gradient_without_memory_ends_with_the_window():
    table = probes.gradient_survival(built(layer_pattern="SS"), TASK, [2, 20], rows=2)
    assert table["gradient"][0] > -20 and table["gradient"][1] == table["survival"][1] == -math.inf
    assert table["kept"].isna().all() and table["decay"].isna().all()
    assert (probes.gradient_survival(built(decay="none"), TASK, [2, 20], rows=2)["kept"] == 0).all()
    for distances, task, name in (
        ([], TASK, "distances"),
        ([4000], TASK, "distance"),
        ([4], data.Bigrams(seq_len=16, vocab_size=64), "distance"),
    ):
        with pytest.raises(ValueError, match=name):
            probes.gradient_survival(built(), task, distances)


# ------------------------------------------------------------------------------------------------ reading what was written


@pytest.mark.parametrize("changes", OPTIONS, ids=named)
def test_coefficients_give_what_the_state_returns(changes):
    """Exact for every option, the pairing of the write included: C V = S^T k."""
    net = built(seed=4, beta_bias=0.5, **changes)
    tokens = TASK.sample(3, analysis.fresh(0)).tokens
    for r in analysis.records(net, tokens):
        if r["layer"] != "G":
            continue
        w = probes._Writes(r, net.cfg)
        for b in range(3):
            read = w.keys[b] @ w.state[b]
            assert torch.allclose(w.coefficients(b) @ w.values[b], read, atol=1e-5 * float(read.abs().max()))


@pytest.mark.parametrize("erase", ["decayed", "raw"])
def test_coefficients_are_those_of_interference(erase):
    net = gated(shifted_value=False, erase=erase)
    r = analysis.records(net, TASK.sample(1, analysis.fresh(0)).tokens)[0]
    C = probes._Writes(r, net.cfg).coefficients(0)
    for h, (write, decay) in enumerate(((0.3, 4.0), (-1.2, 6.0))):
        keys, g = r["keys"][0, :, h].double(), math.log(sigmoid(decay))
        expected = interference.coefficients(keys, beta=sigmoid(write), g=g, erase=erase)
        assert torch.allclose(C[h], expected, atol=1e-6)


@torch.no_grad()
def orthogonal(**changes):
    """One head whose 16 ids have orthonormal keys, everything written at full strength and nothing forgotten."""
    changes = {"layer_pattern": "G", "n_heads": 1, "head_dim": 16, "vocab_size": 16, "decay": "none", **changes}
    net = built(**changes)
    net.embed.weight.copy_(torch.eye(16))
    net.layers[0].key.weight.copy_(torch.eye(16))
    net.layers[0].write_gate.weight.zero_()
    net.layers[0].write_gate.bias.fill_(40.0)
    return net


@pytest.mark.parametrize("shifted", [True, False])
def test_self_retrieval_is_perfect_where_keys_are_orthogonal(shifted):
    """With the pairing of the write: the value that followed, or the token's own."""
    net = orthogonal(shifted_value=shifted)
    order = torch.stack([torch.randperm(16, generator=analysis.fresh(i)) for i in range(3)])
    table = probes.self_retrieval(net, order)
    assert table[["newest", "oldest"]].to_numpy().tolist() == [[0, 0], [1, 1], [2, 3], [4, 7], [8, 15]]
    assert table["cosine"].tolist() == pytest.approx([1] * 5) and table["error"].tolist() == pytest.approx(
        [0] * 5, abs=1e-8
    )
    assert table["expected_cosine"].tolist() == pytest.approx([1] * 5)
    assert table["random_cosine"].is_monotonic_decreasing and table["random_cosine"].iloc[-1] < 0.9
    # The other pairing returns something else.
    r = analysis.records(net, order)[0]
    read = torch.einsum("bthk,bhkv->bthv", r["keys"], r["state"])
    wrong = torch.cosine_similarity(read, r["values"] if shifted else r["values"].roll(-1, 1), dim=-1)
    assert wrong.mean() < 0.5


def test_an_older_value_of_the_same_key_is_gone_and_expected_to_be():
    table = probes.self_retrieval(orthogonal(), torch.tensor([[3, 5, 7, 1, 3, 9]]))  # 3 -> 5, later 3 -> 9
    table = table.set_index("newest")
    assert table.loc[0, ["cosine", "expected_cosine"]].tolist() == pytest.approx([1, 1])
    four = table.loc[4]  # ages 4 and 5: 3 -> 5, and the first token, which writes nothing
    assert four["expected_cosine"] == pytest.approx(0, abs=1e-9) and four["expected_error"] == pytest.approx(2)
    assert four["strength"] == pytest.approx(0.5) and abs(four["cosine"]) < 0.95


def test_self_retrieval_agrees_with_the_closed_form_of_random_keys():
    """Rows of key and value projection orthonormal, ids all different: keys uniform and values independent of them."""
    cfg = dataclasses.replace(
        CFG, layer_pattern="G", d_model=64, head_dim=16, value_dim=32, vocab_size=2048, decay="none"
    )
    net = model.build(cfg)
    with torch.no_grad():
        for linear in (net.layers[0].key, net.layers[0].value):
            linear.weight.copy_(
                torch.linalg.qr(torch.randn(64, 64, generator=analysis.fresh(1)))[0][: len(linear.weight)]
            )
        net.layers[0].write_gate.weight.zero_()
        net.layers[0].write_gate.bias.fill_(1.0)
    tokens = torch.randperm(2048, generator=analysis.fresh(0)).view(32, 64)
    table = probes.self_retrieval(net, tokens)
    assert len(table) == 7 and table["strength"].iloc[0] == pytest.approx(sigmoid(1.0))
    for name in ("cosine", "error"):
        assert table[name].tolist() == pytest.approx(table[f"random_{name}"].tolist(), rel=0.1, abs=0.02)
        assert table[f"expected_{name}"].tolist() == pytest.approx(table[f"random_{name}"].tolist(), rel=0.1, abs=0.02)
    assert table["cosine"].iloc[0] > 0.8 and table["cosine"].iloc[-1] < 0.35


def test_self_retrieval_where_nothing_is_written():
    table = probes.self_retrieval(gated(write=(-300.0, -300.0)), TASK.sample(1, analysis.fresh(0)).tokens)
    assert (table["strength"] == 0).all() and table["cosine"].isna().all()
    one = probes.self_retrieval(built(shifted_value=False), torch.tensor([[5]]))  # the check that cannot fail
    assert one["cosine"].tolist() == pytest.approx([1])


# ------------------------------------------------------------------------------------------------ answers


def origin_by_loop(said, target, row, places, which):
    ids = [row[p] for p in places]
    if said == target:
        return f"needle {which}"
    if said in ids:
        return f"needle {ids.index(said)}"
    if said in [row[p - 1] for p in places]:
        return "marker"
    return "haystack" if said in row else "elsewhere"


@pytest.mark.parametrize("wide", [1, 2])
def test_confusion_counts_planted_answers(wide):
    task = dataclasses.replace(TASK, n_needles=4, value_width=wide)

    def rule(tokens, at):
        row, cue = at.nonzero(as_tuple=True)
        out = []
        for i, (r, c) in enumerate(zip(row.tolist(), cue.tolist(), strict=True)):
            text = tokens[r].tolist()
            marked = [t for t in range(task.seq_len - task.tail) if text[t] >= 60]
            hay = [t for t in range(20) if all(abs(t - m) > wide for m in marked)][0]
            absent = next(x for x in range(60) if x not in text)
            mine = marked[[text[m] for m in marked].index(text[c])] + 1
            out.append([text[mine], text[marked[-1] + 1], text[marked[0]], text[hay], absent][i % 5])
        return torch.tensor(out)

    net = Answers(rule)
    table = probes.confusion(net, task, trials=200)
    assert table["asked"].tolist() == [0, 1, 2, 3, "all", "guess"]
    batches = list(analysis.draws(task, 200 * wide, 10_000))
    expected, i = {}, 0
    for batch in batches:
        said = rule(batch.tokens, torch.zeros_like(batch.scored).scatter(1, _due(task, batch), True))
        for n, (r, c) in enumerate((r, int(c)) for r, row in enumerate(_due(task, batch)) for c in row):
            source = c - 1 - int(batch.info["distance"][r, c])
            places = probes.values_at(task, batch)[r].tolist()
            text, which = batch.tokens[r].tolist(), places.index(source)
            found = origin_by_loop(int(said[n]), int(batch.targets[r, c]), text, places, which)
            expected[which, found] = expected.get((which, found), 0) + 1
            i += 1
    columns = [c for c in table.columns if c not in ("asked", "right", "trials")]
    for which in range(4):
        line = table.iloc[which]
        assert line[columns].to_dict() == {c: expected.get((which, c), 0) for c in columns}
        assert line["right"] == line[f"needle {which}"]
        assert line[columns].sum() == line["trials"]
    every = table.iloc[4]
    assert every["trials"] == i == 200 and every["right"] == table["right"][:4].sum()
    assert every["right"] >= 40 and every["marker"] == every["elsewhere"] == 40


def _due(task, batch):
    """int64 [n, q]: where the first token of every answer is due."""
    return batch.scored.nonzero()[:, 1].view(len(batch.tokens), -1)[:, :: task.value_width]


def test_confusion_knows_a_reader_and_a_guess():
    table = probes.confusion(reader(TASK), TASK, trials=600).set_index("asked")
    assert table.loc["all", "right"] == table.loc["all", "trials"] == 600
    assert table.loc[0, "needle 0"] == table.loc[0, "trials"]
    guess = table.loc["guess"]
    assert guess["trials"] == 600 and guess["marker"] == 0  # no value may be a marker
    # Of 60 ids a row's 23 haystack tokens hold 1 - (59 / 60)^23; less the few that are values as well.
    assert guess["haystack"] / 600 == pytest.approx(1 - (59 / 60) ** 23 - 0.015, abs=0.07)
    assert analysis.Rate(int(guess["right"]), 600, 0.999).low <= TASK.chance
    pairs = data.MQAR(seq_len=32, vocab_size=64, n_pairs=3)
    assert probes.confusion(built(), pairs, trials=30)["trials"].iloc[-1] >= 30


@pytest.mark.parametrize("pattern", ["GS", "SGSG", "GA", "L", "SS"])
@pytest.mark.parametrize("query", [0, 2])
def test_explained_parts_sum_to_the_logit(pattern, query):
    net = built(seed=5, layer_pattern=pattern)
    with torch.no_grad():
        net.norm.weight.copy_(torch.linspace(0.5, 2, 16))
    table = probes.explain(net, TASK, row=4, query=query)
    parts = table.columns[5:]
    kinds = {"input", "feed-forward"} | ({"memory"} if "G" in pattern else set())
    kinds |= ({"window"} if "S" in pattern else set()) | ({"attention"} if set(pattern) & set("AL") else set())
    assert set(parts) == kinds
    assert table[parts].sum(axis=1).tolist() == pytest.approx(table["logit"].tolist(), rel=1e-10, abs=1e-12)
    batch = TASK.sample(1, analysis.fresh(10_004))
    with torch.no_grad():
        logits = net(batch.tokens).logits[0, 29 + query].double()
    assert table["logit"].tolist() == pytest.approx(logits[table["id"].tolist()].tolist(), abs=1e-4)
    p = logits.softmax(-1)
    assert table["id"].tolist()[:5] == p.topk(5).indices.tolist() and table["rank"].tolist()[:5] == [1, 2, 3, 4, 5]
    assert table["probability"].tolist() == pytest.approx(p[table["id"].tolist()].tolist(), rel=1e-4)
    needle = table[table["is"] == "needle"]
    assert needle["id"].tolist() == [int(batch.targets[0, 29 + query])] and len(table) in (5, 6)
    assert needle["rank"].tolist() == [int((p > p[needle["id"].iloc[0]]).sum()) + 1]


@pytest.mark.parametrize(("silent", "column"), [("memory", "memory"), ("window", "window")])
def test_a_path_that_is_cut_contributes_nothing(silent, column):
    net = built(seed=5, layer_pattern="GSG")
    with torch.no_grad():
        for layer in net.layers:
            if isinstance(layer, model.MemoryLayer) and silent == "memory":
                layer.out.weight.zero_()
            elif isinstance(layer, model.WindowLayer):
                (layer.read_out if silent == "memory" else layer.out).weight.zero_()
    table = probes.explain(net, TASK)
    assert table[column].abs().max() < 1e-12
    assert (table[["memory", "window"]].abs().max() > 1e-6).sum() == 1


def test_a_planted_memory_is_seen_as_memory():
    """Orthonormal keys, values and embeddings: the cue's read is the value that followed it, and nothing else has an effect."""
    net = orthogonal(value_dim=16)
    with torch.no_grad():
        net.layers[0].value.weight.copy_(torch.eye(16))
        net.layers[0].out.weight.copy_(10 * torch.eye(16))
        net.ffns[0].down.weight.zero_()
    task = data.MultiNeedle(seq_len=12, vocab_size=16, n_needles=2, n_markers=2, queries=1)
    table = probes.explain(net, task)
    first = table.iloc[0]
    assert first["is"] == "needle" and first["rank"] == 1 and first["probability"] > 0.5
    assert first["memory"] == pytest.approx(first["logit"]) and first["feed-forward"] == 0 == first["input"]
    assert (table["memory"][1:] < 0.5 * first["memory"]).all()
    gone = probes.explain(net, dataclasses.replace(task, remove_needle=True))
    kept, lost = (t[t["is"] == "needle"].iloc[0] for t in (table, gone))
    assert kept["id"] == lost["id"] and lost["memory"] < 0.2 * kept["memory"] and lost["rank"] > 1


def test_explain_names_what_the_guesses_are():
    task = data.SingleNeedle(seq_len=8, vocab_size=8)
    batch = task.sample(1, analysis.fresh(10_000))
    table = probes.explain(built(vocab_size=8), task, top=8).set_index("id")
    text, target = batch.tokens[0].tolist(), int(batch.targets[0, -1])
    for i, kind in table["is"].items():
        assert kind == ("needle" if i == target else "marker" if i == 7 else "haystack" if i in text else "elsewhere")
    assert table["probability"].sum() == pytest.approx(1) and sorted(table["rank"]) == list(range(1, 9))
    removed = probes.explain(built(vocab_size=8), dataclasses.replace(task, remove_needle=True), top=8)
    assert "another needle" not in removed["is"].tolist()
    with pytest.raises(ValueError, match="query"):
        probes.explain(built(vocab_size=8), task, query=1)


def test_marker_replaced_tells_markers_from_known_ids():
    task = data.SingleNeedle(seq_len=32, vocab_size=64, needle_range=(40, 60), haystack_range=(0, 40))
    table = probes.marker_replaced(reader(task), task, trials=300)
    assert table[""].tolist() == ["as it is", "marker replaced", "needle removed"]
    assert table["accuracy"][0] == 1 and table["high"][1:].max() < 0.15 and (table["trials"] == 300).all()
    assert table["oracle"][0] == 1 and table["oracle"][1:].max() < 0.15 and (table["chance"] == 1 / 20).all()

    def known(tokens, at):  # the value by its id
        text = tokens[:, :-1]
        return text.gather(1, ((text >= 40) & (text < 60)).int().argmax(1, keepdim=True))[:, 0]

    table = probes.marker_replaced(Answers(known), task, trials=300)
    assert table["accuracy"][:2].tolist() == [1, 1] and table["accuracy"][2] == 0


@pytest.mark.parametrize("wide", [1, 3])
def test_only_the_marker_is_replaced(wide):
    task = dataclasses.replace(TASK, value_width=wide, queries=2)
    net = Answers(lambda tokens, at: tokens[at])
    table = probes.marker_replaced(net, task, trials=20)
    assert table["trials"].tolist() == [20] * 3 and table["unbound"][0] == pytest.approx(task.chance_unbound)
    plain, replaced, removed = net.seen
    batch = task.sample(10, analysis.fresh(10_000))
    assert torch.equal(plain, batch.tokens)
    sources = _due(task, batch) - 1 - batch.info["distance"].gather(1, _due(task, batch))
    changed = torch.zeros_like(batch.scored).scatter(1, sources - 1, True)
    assert torch.equal(replaced != plain, changed) and (replaced[changed] < 60).all()
    assert (removed.gather(1, sources - 1) < 60).all()


def test_marker_replaced_refuses():
    with pytest.raises(ValueError, match="remove_needle"):
        probes.marker_replaced(built(), data.Bigrams(seq_len=8, vocab_size=64))
    with pytest.raises(ValueError, match="no marker"):
        probes.marker_replaced(built(), data.Echo(seq_len=8, vocab_size=64), trials=8)


# ------------------------------------------------------------------------------------------------ activity


@pytest.mark.parametrize("changes", OPTIONS, ids=named)
def test_update_is_that_of_the_recurrence(changes):
    """Against the states themselves, one step of the reference at a time."""
    net = built(seed=6, beta_bias=0.5, **changes)
    tokens = TASK.sample(2, analysis.fresh(0)).tokens
    table = probes.activity(net, tokens).set_index(["layer", "measure"])["model"]
    for r in analysis.records(net, tokens):
        if r["layer"] != "G":
            continue
        w, ratios = probes._Writes(r, net.cfg), []
        state = torch.zeros_like(w.state)
        for t in range(32):
            k, v, beta, g = w.keys[:, :, t], w.values[:, :, t], w.beta[:, :, t], w.log_decay[:, :, t]
            after = core.delta_step(k, k, v, beta, g, state, erase=net.cfg.erase)[1].double()
            before = state.norm(dim=(-2, -1))
            write = (after - g.exp()[..., None, None] * state).norm(dim=(-2, -1))
            ratios += (write / before)[before > 0].tolist()
            state = after
        assert torch.allclose(state, w.state, atol=1e-5)
        assert table[f"{r['index']} G", "update"] == pytest.approx(np.mean(ratios), rel=1e-4)


def test_heads_are_told_apart():
    tokens = TASK.sample(2, analysis.fresh(0)).tokens
    net = gated(write=(0.3, -1.2), decay=(0.0, 30.0), shifted_value=False, erase="decayed", layer_pattern="GS")
    table = probes.by_head(net, tokens)
    assert table["head"].tolist() == [0, 1]
    assert table["strength"].tolist() == pytest.approx([sigmoid(0.3), sigmoid(-1.2)])
    assert table["half_life"][0] == pytest.approx(1)  # sigmoid(0) = 1 / 2
    T = tokens.shape[1]
    assert table["left"].tolist() == pytest.approx([sigmoid(0.3) * (2 - 0.5 ** (T - 1)), sigmoid(-1.2) * T])
    assert table["rank"].mean() == pytest.approx(analysis.diagnose(net, tokens)["state_rank"][0], rel=1e-4)
    s = torch.linalg.svdvals(analysis.records(net, tokens)[0]["state"])
    assert table["largest"].tolist() == pytest.approx(s[:, :, 0].mean(0).tolist(), rel=1e-4)
    one = probes.by_head(built(shifted_value=True), tokens[:, :2])  # a single write
    assert one["rank"].tolist() == pytest.approx([1] * len(one), rel=1e-4)
    with pytest.raises(ValueError, match="no G layer"):
        probes.by_head(built(layer_pattern="SA"), tokens)


def test_activity_beside_an_untrained_model():
    tokens = TASK.sample(2, analysis.fresh(0)).tokens
    net = built(seed=0)
    table = probes.activity(net, tokens).set_index(["layer", "measure"])
    assert table["ratio"].dropna().tolist() == pytest.approx([1] * len(table["ratio"].dropna()))
    measures = {"beta", "state_norm", "state_rank", "read_norm", "update"}
    assert measures <= set(table.loc["0 G"].index)
    assert {"window_norm", "recalled_norm", "query_zeros", "read_share"} <= set(table.loc["1 S"].index)
    assert table.loc[("1 S", "query_zeros"), "model"] == pytest.approx(0.5, abs=0.1)
    record = analysis.records(net, tokens)[1]
    read, window = (record[n].norm(dim=-1).mean() for n in ("recalled", "window"))
    assert table.loc[("1 S", "read_share"), "model"] == pytest.approx(float(read / (read + window)), rel=1e-5)
    with torch.no_grad():
        net.layers[1].read_query.weight.zero_()
        net.layers[0].value.weight.mul_(3)
    table = probes.activity(net, tokens).set_index(["layer", "measure"])
    assert table.loc[("1 S", "query_zeros"), "model"] == 1 and table.loc[("1 S", "recalled_norm"), "model"] == 0
    assert table.loc[("0 G", "state_norm"), "ratio"] == pytest.approx(3, rel=1e-5)
    assert table.loc[("0 G", "update"), "ratio"] == pytest.approx(1, rel=1e-5)  # state and write grow alike
    assert (probes.activity(net, tokens, untrained=net)["ratio"].dropna() == 1).all()
    with pytest.raises(ValueError, match="untrained"):
        probes.activity(net, tokens, built(g_bias=2.0))


# ------------------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("changes", OPTIONS, ids=named)
def test_full_runs_every_probe_and_leaves_the_model_alone(changes):
    net = built(**changes).train()
    before = {name: p.clone() for name, p in net.state_dict().items()}
    tables = probes.full(net, TASK, trials=15, rows=2)
    functions = (
        "gates_by_token key_similarity gradient_survival self_retrieval confusion explain marker_replaced activity"
    )
    assert list(tables) == functions.split() and all(len(t) for t in tables.values())
    assert tables["gradient_survival"]["distance"].tolist() == [0, 1, 2, 4, 8, 16, 29]
    assert net.training and all(torch.equal(p, before[name]) for name, p in net.state_dict().items())
    assert not net.embed._forward_hooks and all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("probe", ["gates_by_token", "key_similarity", "self_retrieval", "full"])
def test_a_model_without_memory_is_refused(probe):
    net = built(layer_pattern="SA")
    about = torch.zeros(2, 8, dtype=torch.long) if probe in ("key_similarity", "self_retrieval") else TASK
    with pytest.raises(ValueError, match="no G layer"):
        getattr(probes, probe)(net, about)


def test_bad_input_is_named():
    for call, name in (
        (lambda: probes.key_similarity(built(), torch.zeros(2, 1, dtype=torch.long)), "tokens"),
        (lambda: probes.key_similarity(built(), torch.zeros(2, 4, dtype=torch.long), marker=64), "marker"),
        (lambda: probes.full(built(), data.Echo(seq_len=8, vocab_size=64)), "queries"),
    ):
        with pytest.raises(ValueError, match=name):
            call()


@pytest.mark.gpu
def test_the_full_diagnostic_on_a_gpu():
    """The same tables as on a CPU, up to the rounding of kernels."""
    here, there = (probes.full(built().to(device), TASK, trials=30, rows=2) for device in ("cpu", "cuda"))
    assert here.keys() == there.keys()
    for name in ("gates_by_token", "activity"):
        numbers = [table[name].select_dtypes("number").to_numpy(dtype=float) for table in (here, there)]
        np.testing.assert_allclose(numbers[0], numbers[1], rtol=2e-2, atol=1e-3)
