"""Diagnostics of one model: what its memory writes, keeps, loses and gives back, as small tables.

    tables = probes.full(net, task)                 # all of them at sizes that take seconds
    probes.confusion(net, task)                     # where wrong answers come from
    probes.explain(net, task, row=3)                # one prediction taken apart

A task here is one whose answers are copies of earlier tokens (`data.RecallTask`); a model is a `model.TransparentHybrid`.

Letters: B sequences, T tokens, H heads, K key width, V value width, N values of a row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

import analysis
import data
import interference
import model as models

PAIRED = 1024  # tokens of a row, at most, every two of which are compared

# ------------------------------------------------------------------------------------------------ what stands where

ROLES = ("haystack", "marker", "value", "cue", "context", "answer")


def values_at(task: data.Task, batch: data.Batch) -> Tensor:
    """int64 [n, N]: where the first token of every value stands, in order; values that are not asked for included.

    A needle task marks its values; of another task those that are asked for are known. ValueError for a task whose answers
    have no place, or that has overwritten them.
    """
    name = type(task).__name__
    if getattr(task, "remove_needle", False):
        raise ValueError(f"task: {name} has remove_needle set, so its rows hold no needle to look at")
    if hasattr(task, "first_marker"):
        marked = batch.tokens[:, : task.seq_len - task.tail] >= task.first_marker
        return marked.nonzero()[:, 1].view(len(batch.tokens), -1) + 1
    return asked_at(task, batch)[2].view(len(batch.tokens), -1).sort(dim=1).values


def asked_at(task: data.Task, batch: data.Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, cues, sources) int64 [q] each: where the first token of every asked value is due, and where it stands.

    ValueError for a task that does not say where its answers stand, or scores nothing.
    """
    row, cue = batch.scored.nonzero(as_tuple=True)
    distance = batch.info["distance"][row, cue] if "distance" in batch.info else torch.full_like(row, -1)
    if not len(row) or (distance < 0).any():
        raise ValueError(f"task: {type(task).__name__} does not say where its answers stand (distance)")
    first = slice(None, None, getattr(task, "value_width", 1))
    return row[first], cue[first], (cue - 1 - distance)[first]


def roles(task: data.Task, batch: data.Batch) -> Tensor:
    """int64 [n, T]: what every token is, as an index into `ROLES`.

    marker: the token before a value. cue: where a value's first token is due. context: what stands before the marker of a prefix
    of several tokens, and before the last token of a cue. answer: the rest of the tail, values given there.
    """
    found, width = torch.zeros_like(batch.tokens), getattr(task, "value_width", 1)
    places, (row, cue, _) = values_at(task, batch), asked_at(task, batch)
    every = torch.arange(len(found))[:, None]

    def put(role, rows, at):
        inside = at >= 0
        found[rows.expand_as(at)[inside], at[inside]] = ROLES.index(role)

    if hasattr(task, "tail"):
        put("answer", every, torch.arange(task.seq_len - task.tail, task.seq_len).expand(len(found), -1))
    for back in range(1, getattr(task, "cue_width", 1)):
        put("context", every, places - 1 - back)
        put("context", row, cue - back)
    put("marker", every, places - 1)
    for i in range(width):
        put("value", every, places + i)
    put("cue", row, cue)
    return found


# ------------------------------------------------------------------------------------------------ foundations


def _memories(model: models.TransparentHybrid, tokens: Tensor) -> list[dict]:
    """Diagnostics of every G layer on tokens [B, T]. ValueError for a model without one."""
    _require_memory(model)
    return [r for r in analysis.records(model, tokens) if r["layer"] == "G"]


def _require_memory(model) -> None:
    if "G" not in model.cfg.layer_pattern:
        raise ValueError(f"model: {model.cfg} has no G layer to look at")


def _require_field(task: data.Task, name: str, why: str) -> None:
    if name not in {f.name for f in dataclasses.fields(task)}:
        raise ValueError(f"task: {type(task).__name__} has no field {name!r}, {why}")


def _double(model: models.TransparentHybrid) -> models.TransparentHybrid:
    """A copy of the model in float64, without gradients of its own; on the CPU where the device has no float64."""
    device = analysis.device_of(model)
    copy = models.build(dataclasses.replace(model.cfg, impl="torch"))
    copy.load_state_dict({name: tensor.cpu() for name, tensor in model.state_dict().items()})
    return copy.double().to("cpu" if device.type == "mps" else device).eval().requires_grad_(False)


@contextlib.contextmanager
def _watching(*hooks):
    """Forward hooks (module, hook) for as long as the block lasts."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Writes:
    """What a G layer wrote and when, from its diagnostics; in float64 on the CPU, heads before tokens.

    keys [B, H, T, K], beta [B, H, T], values [B, H, T, V]: of the write at t, so with `shifted_value` the key and strength of
    t - 1, and nothing at t = 0. total [B, H, T]: log-decays up to t. state [B, H, K, V]: after the last token.
    """

    def __init__(self, record: dict, cfg):
        k, beta, v, g = (record[n].cpu().double().transpose(1, 2) for n in ("keys", "beta", "values", "log_decay"))
        if cfg.shifted_value:
            k = torch.cat([torch.zeros_like(k[:, :, :1]), k[:, :, :-1]], dim=2)
            beta = torch.cat([torch.zeros_like(beta[:, :, :1]), beta[:, :, :-1]], dim=2)
        self.keys, self.beta, self.values, self.log_decay, self.total = k, beta, v, g, g.cumsum(2)
        self.state, self.raw = record["state"].cpu().double(), cfg.erase == "raw"

    def system(self, b: int) -> tuple[Tensor, Tensor]:
        """(products, L), [H, T, T] each, of sequence b: k_i . k_j, and what value j, once written, adds to a recall by key i.

        The memory stores u_i = v_i - sum_{j<i} L_ij u_j, with L_ij = (k_i . k_j) beta_j e^(decays after j up to i), up to i - 1
        where the erase recalls from the raw state.
        """
        k, beta, total = self.keys[b], self.beta[b], self.total[b]
        products = k @ k.mT
        until = total - self.log_decay[b] if self.raw else total
        # Clamped before the exponential: above the diagonal, which is not used, it would overflow.
        L = (products * beta[:, None] * torch.exp((until[:, :, None] - total[:, None]).clamp(max=0))).tril(-1)
        return products, L

    def coefficients(self, b: int) -> Tensor:
        """C [H, T, T] of sequence b: reading the final state with key i returns sum_j C_ij v_j (see `interference`)."""
        products, L = self.system(b)
        eye = torch.eye(L.shape[-1], dtype=L.dtype)
        left = torch.exp(self.total[b, :, -1:] - self.total[b]) * self.beta[b]
        return products * left[:, None] @ torch.linalg.solve_triangular(eye + L, eye.expand_as(L), upper=False)


# ------------------------------------------------------------------------------------------------ gates


def gates_by_token(
    model: models.TransparentHybrid, task: data.Task, *, rows: int = 32, seed: int = 10_000
) -> pd.DataFrame:
    """Gates of every G layer at markers, values, cues and haystack (`ROLES`), on `rows` fresh rows of `task`.

    One row per layer and role that occurs. tokens: how many there were. beta: mean write strength; log_decay: mean log share
    kept, in nats per token; `_least` and `_most` are the means of the heads at either end. mass: share of all write strength that
    falls on the role; the haystack's is what overwrites needles.
    beta is that of the token's own key: with `shifted_value` the one at the marker writes the value behind it, without it the
    value's own does. ValueError without a G layer.
    """
    _require_memory(model)
    beta, decay, count = {}, {}, 0
    for batch in analysis.batches(task, rows, seed=seed):
        which = F.one_hot(roles(task, batch), len(ROLES)).double()  # [n, T, R]
        count = count + which.sum((0, 1))
        for r in _memories(model, batch.tokens):
            for sums, name in ((beta, "beta"), (decay, "log_decay")):
                gate = torch.einsum("btr,bth->rh", which, r[name].cpu().double())
                sums[r["index"]] = sums.get(r["index"], 0) + gate
    found = []
    for layer in beta:
        share = beta[layer].sum(1) / beta[layer].sum().clamp_min(1e-300)
        for i, role in enumerate(ROLES):
            if not count[i]:
                continue
            row = {"layer": layer, "token": role, "tokens": int(count[i])}
            for name, sums in (("beta", beta), ("log_decay", decay)):
                heads = sums[layer][i] / count[i]
                row |= {name: float(heads.mean())}
                row |= {f"{name}_least": float(heads.min()), f"{name}_most": float(heads.max())}
            found.append(row | {"mass": float(share[i])})
    return pd.DataFrame(found)


# ------------------------------------------------------------------------------------------------ keys


def untrained_similarity(cfg) -> float:
    """Expected |cosine| of the keys of two different tokens in an untrained first layer: sqrt(2 (1 + K / D) / (pi K)).

    K x D random projections of random embeddings crowd more than random directions, since no such projection is isotropic:
    E cos^2 = (1 + K / D) / K. D = d, times the width of a convolution in place of the projection; one before it adds K / d of its
    own. Agrees with simulation to half a per cent from K = 8, d = 16 on.
    """
    K, d = cfg.head_dim, cfg.d_model
    crowding = 1 + K / (d * max(1, cfg.key_conv_width))
    if cfg.key_context_conv:
        crowding += K / (d * cfg.key_context_conv)
    return math.sqrt(2 * crowding / (math.pi * K))


def key_similarity(model: models.TransparentHybrid, tokens: Tensor, *, marker: int | None = None) -> pd.DataFrame:
    """How alike keys are, per G layer, on tokens [B, T], and what that costs a needle.

    At most `PAIRED` tokens a row are compared, evenly spread.
    similarity: mean |cosine| between keys of different ids of a row (in a first layer equal ids have equal keys, and should);
    least, most: of single heads. untrained: what to expect of an untrained first layer (`untrained_similarity`; layers further
    on see inputs that share parts). random: of random directions.
    marker: an id to put in place of the last token of every row, so that the rows are its contexts. across_contexts: mean
    cosine of its keys between rows (nan for one row). overlap: mean squared cosine of the other tokens' keys with the marker's,
    1 / K for random directions. written_overlap: the same, weighed by write strength. erased: mean of beta cos^2, the share of
    a value under the marker's key that one later token erases.
    ValueError without a G layer, for rows of one token, or for an id outside the vocabulary.
    """
    cfg = model.cfg
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(f"tokens: needs [B, T] with at least 2 tokens a row, was given {list(tokens.shape)}")
    if marker is not None:
        if not 0 <= marker < cfg.vocab_size:
            raise ValueError(f"marker = {marker}: outside the vocabulary of {cfg.vocab_size}")
        tokens = torch.cat([tokens[:, :-1], torch.full_like(tokens[:, :1], marker)], dim=1)
    T, K = tokens.shape[1], cfg.head_dim
    chosen = torch.arange(T - 1, -1, -T // PAIRED)  # from the last token back, every T / PAIRED, rounded up
    found = []
    for r in _memories(model, tokens):
        keys = r["keys"][:, chosen].float().transpose(1, 2)  # [B, H, n, K]
        ids = tokens.to(keys.device)[:, chosen]
        sums, pairs = 0, 0
        for k, i in zip(keys, ids, strict=True):  # a sequence at a time: n x n products of every head
            different = (i[:, None] != i).float()
            sums = sums + ((k @ k.mT).abs() * different).sum((-2, -1))
            pairs += float(different.sum())
        heads = sums / pairs if pairs else torch.full((cfg.n_heads,), math.nan)
        row = {"layer": r["index"], "similarity": float(heads.mean())}
        row |= {"least": float(heads.min()), "most": float(heads.max()), "untrained": untrained_similarity(cfg)}
        row["random"] = analysis.random_similarity(K)
        if marker is not None:
            own, B = keys[:, :, 0], len(keys)  # [B, H, K]: the last token came first
            alike = (
                (own.sum(0).square().sum() - own.square().sum()) / (B * (B - 1) * cfg.n_heads) if B > 1 else math.nan
            )
            others = (ids != marker).float()[:, None]  # [B, 1, n]
            squared = (keys @ own[..., None])[..., 0].square() * others
            beta = r["beta"][:, chosen].float().transpose(1, 2) * others
            erased, weight = float((squared * beta).sum()), float(beta.sum())
            count = max(float(others.sum()) * cfg.n_heads, 1.0)
            row |= {"across_contexts": float(alike), "overlap": float(squared.sum()) / count}
            row |= {"written_overlap": erased / weight if weight else math.nan, "erased": erased / count}
        found.append(row)
    return pd.DataFrame(found)


# ------------------------------------------------------------------------------------------------ gradients


def gradient_survival(
    model: models.TransparentHybrid, task: data.Task, distances, *, rows: int = 8, seed: int = 10_000
) -> pd.DataFrame:
    """How much of the gradient of the loss at the cue reaches the embedding of the value `distance` tokens before it.

    The norm of d loss / d embedding, in nats per unit of the embedding's length, as log10 and computed in float64: 1e-55 is
    -55 and not 0.00 (below 1e-308 it is -inf). One row per distance (tokens strictly between, as in `task.distance`).
    gradient: of the mean norm over `rows` fresh rows; least, most: of single rows. survival: gradient less that at the
    shortest distance. kept: log10 of the share that decay leaves between value and cue in the best head of all G layers;
    decay: kept less that at the shortest distance, which is what `survival` would be if nothing but decay stood between (nan
    without a G layer).
    It can be more: the window of an S layer behind the memory reads what G read so many tokens earlier.
    It is the gradient that training follows: hard and straight gates let through what their slope would not. That of a
    fitted model holds one less the probability of the answer, so a worse answer has more of it: how far gradients reach
    shows before training. One needle is asked per row. ValueError for a task without `distance`, or distances that it
    cannot take.
    """
    distances = sorted(set(distances))
    if not distances:
        raise ValueError("distances: needs at least one number of tokens")
    _require_field(task, "distance", "which says how far the value stands from its cue")
    single = {"queries": 1} if hasattr(task, "queries") else {}
    net, found = _double(model), []
    device = analysis.device_of(net)
    for distance in distances:
        batch = dataclasses.replace(task, distance=distance, **single).sample(rows, analysis.fresh(seed))
        _, cue, source = asked_at(task, batch)
        at, leaf = torch.zeros_like(batch.scored), []
        at[torch.arange(rows), cue] = True

        def keep(module, inputs, out, leaf=leaf):
            leaf.append(out.detach().requires_grad_())
            return leaf[0]

        with _watching((net.embed, keep)), torch.enable_grad():
            out = net(batch.tokens.to(device), positions=at.to(device), diagnostics=True)
            targets = batch.targets[at].to(device)
            F.cross_entropy(out.logits, targets, reduction="sum").backward()
        each = leaf[0].grad[torch.arange(rows), source].norm(dim=-1).cpu()  # [rows]
        row = {"distance": distance, "rows": rows, "gradient": _log10(each.mean())}
        row |= {"least": _log10(each.min()), "most": _log10(each.max())}
        best = [math.nan]
        for r in out.diagnostics:
            if r["layer"] == "G":
                g = r["log_decay"].cpu()
                since = torch.arange(g.shape[1])
                between = (since > source[:, None]) & (since <= cue[:, None])
                logs = (g * between[..., None]).sum(1)  # [rows, H]
                best.append(float((logs.logsumexp(0) - math.log(rows)).max()) / math.log(10))
        found.append(row | {"kept": np.nanmax(best) if len(best) > 1 else math.nan})
    table = pd.DataFrame(found)
    table.insert(5, "survival", table["gradient"] - table["gradient"][0])
    table["decay"] = table["kept"] - table["kept"][0]
    return table


def _log10(x: Tensor) -> float:
    return math.log10(x) if x > 0 else -math.inf


# ------------------------------------------------------------------------------------------------ reading what was written


def self_retrieval(model: models.TransparentHybrid, tokens: Tensor) -> pd.DataFrame:
    """The final state of every G layer read with each key that was written: what is left of the values of tokens [B, T].

    The pairing is that of the write (key of t - 1 and value of t with `shifted_value`). One row per layer and group of ages, the
    writes after it: newest to oldest. cosine: between read and value. error: |read - value|^2 / |value|^2, which also sees the
    scale. Beside both, what interference expects of values that are independent and equally long:
      expected_*: exactly, from this model's keys and gates (nan beyond `PAIRED` tokens). A key that is written again is in it:
        its older value is meant to go. Reads that are better have values that are alike, or that their keys tell of, as
        those of one and the same token do without `shifted_value`.
      random_*: of independent random keys at each head's mean gates (`interference.expected_read`).
    Means over sequences and heads weigh each write by its strength, since what was not written cannot be read: a group without
    any is nan. One write alone is read back with cosine 1 whatever the model is: look at ages above 0. ValueError without a G
    layer.
    """
    cfg, found = model.cfg, []
    T = tokens.shape[1]
    age = torch.arange(T - 1, -1, -1)
    group = torch.where(age == 0, 0, 1 + age.clamp(min=1).log2().floor().long())  # 0, 1, 2-3, 4-7, ...
    for r in _memories(model, tokens):
        w = _Writes(r, cfg)
        read = w.keys @ w.state
        size = w.values.norm(dim=-1).clamp_min(1e-30)
        expected = torch.full((2, *w.beta.shape), math.nan, dtype=torch.float64)
        if T <= PAIRED:
            for b in range(len(tokens)):
                C = w.coefficients(b)
                own, all_ = C.diagonal(dim1=-2, dim2=-1), C.square().sum(-1)
                expected[:, b] = torch.stack([own / all_.sqrt().clamp_min(1e-30), all_ - 2 * own + 1])
        measured = {
            "cosine": F.cosine_similarity(read, w.values, dim=-1, eps=1e-30),
            "error": ((read - w.values).norm(dim=-1) / size).square(),
            "expected_cosine": expected[0],
            "expected_error": expected[1],
        }
        ideal = _random_reads(w, age, cfg)  # [2, H, T]
        measured |= {f"random_{name}": x.expand_as(w.beta) for name, x in zip(("cosine", "error"), ideal, strict=True)}
        for i in range(int(group.max()) + 1):
            part = group == i
            weight = w.beta[:, :, part]
            row = {"layer": r["index"], "newest": int(age[part].min()), "oldest": int(age[part].max())}
            row["strength"] = float(weight.mean())
            total = float(weight.sum())
            for name, x in measured.items():
                row[name] = float((x[:, :, part] * weight).sum()) / total if total else math.nan
            found.append(row)
    return pd.DataFrame(found)


def _random_reads(w: _Writes, age: Tensor, cfg) -> Tensor:
    """Cosine and error [2, H, T] that independent random keys would give at the mean gates of each head."""
    first = int(cfg.shifted_value)  # the first token writes nothing
    found = []
    for h in range(w.beta.shape[1]):
        beta, g = float(w.beta[:, h, first:].mean()) if len(age) > first else 0.0, float(w.log_decay[:, h].mean())
        earlier = (len(age) - 1 - age.numpy() - first).clip(min=0)
        ideal = interference.expected_read(
            age.numpy(), earlier=earlier, K=cfg.head_dim, beta=beta, g=g, erase=cfg.erase
        )
        length = np.sqrt(ideal.signal**2 + ideal.noise)
        cosine = np.divide(ideal.signal, length, out=np.zeros_like(length), where=length > 0)
        found.append(np.stack([cosine, ideal.error]))
    return torch.from_numpy(np.stack(found, axis=1))


# ------------------------------------------------------------------------------------------------ answers


def confusion(
    model: models.TransparentHybrid, task: data.Task, *, trials: int = 1000, seed: int = 10_000
) -> pd.DataFrame:
    """Where answers come from: one row per asked value in order of position, and one for all, as counts that sum to `trials`.

    Needle i is answered where the model says the (first) token of the i-th value of the row; its own column is the right
    answers, also counted in `right`. An id that is several things counts as the first of: the right answer, another value
    (the earliest), a marker of the row, another token of the row (haystack), elsewhere.
    The row "guess" puts ids drawn uniformly from those that a value may take in place of all the answers: a haystack holds
    much of a small vocabulary, and so many answers come from it by chance. Columns: asked, right, needle 0 to N - 1, marker,
    haystack, elsewhere, trials. ValueError for a task whose answers have no place (see `values_at`).
    """
    draw = analysis.fresh(seed + 1)
    lo, hi = getattr(task, "values", (0, task.vocab_size))
    answered, guessed = [], []
    with analysis.evaluating(model):
        for batch in analysis.draws(task, trials * getattr(task, "value_width", 1), seed):
            places, (row, cue, source) = values_at(task, batch), asked_at(task, batch)
            at = torch.zeros_like(batch.scored)
            at[row, cue] = True
            device = analysis.device_of(model)
            said = model(batch.tokens.to(device), positions=at.to(device)).logits.argmax(-1).cpu()
            which = (places[row] == source[:, None]).int().argmax(1)
            known = batch.tokens[row], places[row], batch.targets[row, cue], which
            answered.append(torch.stack([which, _origin(said, *known)]))
            anything = torch.randint(lo, hi, said.shape, generator=draw)
            guessed.append(_origin(anything, *known))
            N = places.shape[1]
    asked, origin = torch.cat(answered, dim=1)
    names = ["marker", "haystack", "elsewhere"]
    counts = [torch.bincount(origin[asked == i], minlength=N + 3) for i in range(N)]
    lines = {i: (c, c[i]) for i, c in enumerate(counts)} | {
        "all": (sum(counts), sum(c[i] for i, c in enumerate(counts)))
    }
    guess = torch.cat(guessed)
    lines["guess"] = torch.bincount(guess, minlength=N + 3), (guess == asked).sum()
    rows = []
    for name, (line, right) in lines.items():
        columns = dict(zip([*(f"needle {i}" for i in range(N)), *names], line.tolist(), strict=True))
        rows.append({"asked": name, "right": int(right), **columns, "trials": int(line.sum())})
    return pd.DataFrame([row for row in rows if row["trials"]])


def _origin(said: Tensor, tokens: Tensor, places: Tensor, right: Tensor, which: Tensor) -> Tensor:
    """int64 [q]: which value each id `said` [q] is (0 to N - 1), or N: a marker, N + 1: another token of the row, N + 2: neither.

    tokens [q, T] is the row of each answer, places [q, N] its values, `which` [q] the one asked for and right [q] its id.
    """
    N = places.shape[1]
    held = tokens.gather(1, places) == said[:, None]
    is_marker = (tokens.gather(1, (places - 1).clamp_min(0)) == said[:, None]).any(1)
    in_row = (tokens == said[:, None]).any(1)
    other = torch.where(is_marker, N, torch.where(in_row, N + 1, N + 2))
    # A last column for none of them: a row may have no value left.
    value = torch.cat([held, ~held.any(1, keepdim=True)], dim=1).int().argmax(1)
    origin = torch.where(value < N, value, other)
    return torch.where(said == right, which, origin)


def explain(
    model: models.TransparentHybrid, task: data.Task, row: int = 0, *, query: int = 0, top: int = 5, seed: int = 10_000
) -> pd.DataFrame:
    """One prediction taken apart: the `top` likeliest ids and the needle, and what each path adds to their logits.

    row: which fresh row of `task`; query: which of its answers, in order of position. is: needle, another needle, marker,
    haystack (another token of the row) or elsewhere. rank: 1 for the likeliest. logit: the sum of the columns after it, each
    a part of the residual stream at the cue, times the final norm's weight and its scale, held at what it is there, times
    the id's embedding:
      input: the cue's own embedding; memory: reads of G layers and of S layers from them; window: attention of S layers;
      attention: A and L layers; feed-forward: the SwiGLUs, which turn what the others brought.
    Exact to rounding, in float64. What a path brings to a later layer's input is in that layer's column. With
    `remove_needle` the row is the same but for the needle.
    """
    whole = dataclasses.replace(task, remove_needle=False) if getattr(task, "remove_needle", False) else task
    batch = task.sample(1, analysis.fresh(seed + row))
    source_batch = whole.sample(1, analysis.fresh(seed + row))
    places, (_, cues, sources) = values_at(whole, source_batch)[0], asked_at(whole, source_batch)
    if not 0 <= query < len(cues):
        raise ValueError(f"query = {query}: a row of this task has {len(cues)} answers, counted from 0")
    cue, source, net = int(cues[query]), int(sources[query]), _double(model)
    device, parts = analysis.device_of(net), {}
    order = ["input", "memory", "window", "attention", "feed-forward"]

    def add(name, vector):
        parts[name] = parts.get(name, 0) + vector[0, cue]

    hooks = [(net.embed, lambda m, inputs, out: add("input", out))]
    for letter, layer, ffn in zip(net.cfg.layer_pattern, net.layers, net.ffns, strict=True):
        name = {"G": "memory", "S": None}.get(letter, "attention")
        if name:
            hooks.append((layer, lambda m, inputs, out, name=name: add(name, out[0] - inputs[0])))
        hooks.append((ffn, lambda m, inputs, out: add("feed-forward", out - inputs[0])))
    at = torch.zeros_like(batch.scored, device=device)
    at[0, cue] = True
    with _watching(*hooks), torch.no_grad():
        out = net(batch.tokens.to(device), positions=at, diagnostics=True)
    for r in out.diagnostics:
        if r["layer"] == "S":
            add("window", r["window"])
            if "recalled" in r:
                add("memory", r["recalled"])
    x = sum(parts.values())
    scale = torch.rsqrt(x.square().mean() + net.norm.eps) * net.norm.weight
    logits = out.logits[0]
    target = int(batch.targets[0, cue])
    ranked = logits.argsort(descending=True, stable=True)
    ids = list(dict.fromkeys([*ranked[:top].tolist(), target]))
    places = places if whole is task else places[places != source]
    said, tokens = torch.tensor(ids), batch.tokens.expand(len(ids), -1)
    N = len(places)
    origin = _origin(said, tokens, places.expand(len(ids), -1), said.new_full((len(ids),), -1), torch.zeros_like(said))
    names = ["another needle"] * N + ["marker", "haystack", "elsewhere"]
    probability, rank = logits.softmax(-1), ranked.argsort() + 1
    rows = []
    for i, kind in zip(ids, origin.tolist(), strict=True):
        line = {"id": i, "is": "needle" if i == target else names[kind], "rank": int(rank[i])}
        line |= {"probability": float(probability[i]), "logit": float(logits[i])}
        line |= {n: float((parts[n] * scale) @ net.embed.weight[i]) for n in order if n in parts}
        rows.append(line)
    return pd.DataFrame(rows)


def marker_replaced(
    model: models.TransparentHybrid, task: data.Task, *, trials: int = 1000, seed: int = 10_000
) -> pd.DataFrame:
    """Accuracy with the row as it is; with the asked values' markers overwritten by haystack, values kept; with both gone.

    A memory that is addressed by markers falls in both to what can be guessed: `chance`, or where only the marker is gone at most
    `unbound`, the accuracy of knowing the row's values without their markers. One that stays higher knows needles by something
    else, such as their id. oracle: the best possible answer. Answers are the first tokens of values.
    ValueError for a task that cannot remove its needle, or whose values stand on end, so that one is the marker of the next.
    """
    _require_field(task, "remove_needle", "so nothing can be taken from its rows")
    arms = {"as it is": task, "marker replaced": task, "needle removed": dataclasses.replace(task, remove_needle=True)}
    rows = []
    for name, t in arms.items():
        correct, best, answer_rows, drawn, hay = [], [], [], 0, analysis.fresh(seed + 1)
        with analysis.evaluating(model):
            for batch in analysis.draws(t, trials * getattr(task, "value_width", 1), seed):
                row, cue, source = asked_at(task, batch)
                if name == "marker replaced":
                    tokens = batch.tokens.clone()
                    held = values_at(task, batch)
                    if (held[:, 1:] - held[:, :-1] == 1).any() or (source == 0).any():
                        raise ValueError(
                            f"task: values of {type(task).__name__} have no marker of their own to replace"
                        )
                    tokens[row, source - 1] = task.background(len(tokens), hay)[row, source - 1]
                    batch = data.Batch(tokens, batch.targets, batch.info)
                first = torch.full_like(batch.targets, data.IGNORE)
                first[row, cue] = batch.targets[row, cue]
                asked = data.Batch(batch.tokens, first, batch.info)
                correct.append(analysis.score(model, asked)[0])
                best.append((t.oracle(batch) == first)[row, cue])
                answer_rows.append(row + drawn)
                drawn += len(batch.tokens)
        rate = analysis.Rate.of(torch.cat(correct), torch.cat(answer_rows))
        line = {"": name, **rate.row(), "oracle": float(torch.cat(best).float().mean()), "chance": task.chance}
        line["unbound"] = getattr(task, "chance_unbound", math.nan)
        rows.append(line)
    return pd.DataFrame(rows)


# ------------------------------------------------------------------------------------------------ activity


def by_head(model: models.TransparentHybrid, tokens: Tensor) -> pd.DataFrame:
    """What each head of every G layer holds after tokens [B, T]; means over sequences.

    strength: mean beta. half_life: tokens after which the mean log-decay has halved the memory. left: writes that decay leaves,
    the sum of beta times the share kept until the end; later writes erase besides. rank: exp of the entropy of the state's
    normalised singular values (`analysis.diagnose`); at most K and the number of writes. largest: the first singular value.
    A low rank beside a low `left` says that little is there, not that little would fit. ValueError without a G layer.
    """
    found = []
    for r in _memories(model, tokens):
        w = _Writes(r, model.cfg)
        s = torch.linalg.svdvals(w.state)  # [B, H, min(K, V)]
        p = s / s.sum(-1, keepdim=True).clamp_min(1e-30)
        rank = torch.exp(-(p * p.clamp_min(1e-30).log()).sum(-1)) * (s.sum(-1) > 0)
        left = (w.beta * torch.exp(w.total[..., -1:] - w.total)).sum(-1)
        g = w.log_decay.mean((0, 2))
        for h in range(model.cfg.n_heads):
            row = {"layer": r["index"], "head": h, "strength": float(w.beta[:, h].mean())}
            row |= {"half_life": math.log(0.5) / float(g[h]) if g[h] < 0 else math.inf}
            row |= {"left": float(left[:, h].mean()), "rank": float(rank[:, h].mean())}
            found.append(row | {"largest": float(s[:, h, 0].mean())})
    return pd.DataFrame(found)


def activity(
    model: models.TransparentHybrid, tokens: Tensor, untrained: models.TransparentHybrid | None = None
) -> pd.DataFrame:
    """How much every layer does on tokens [B, T], beside an untrained model of the same configuration, and the ratio of the two.

    untrained: None builds one from seed 0. At most the first `PAIRED` tokens of a row count. Measures are those of
    `analysis.diagnose`, and
      update (G): mean |beta k u^T| / |S_{t-1}|, the size of a write beside that of the state it meets (Frobenius norms; u is
        the value less what was recalled), over tokens that find one; by decay alone the state shrinks besides.
      query_zeros (S that reads): share of exact zeros among the relu queries. One half is what a random projection gives.
      read_share (S that reads): norm of the gated read over that norm and the window's.
    Trained against untrained shows what training moved, not that it is of use: a larger beta alone raises the state's norm.
    ValueError where the two are of different configurations.
    """
    if untrained is None:
        untrained = models.build(model.cfg).to(analysis.device_of(model))
    if untrained.cfg != model.cfg:
        raise ValueError(f"untrained: is {untrained.cfg} with other settings; needs those of the model")
    tokens = tokens[:, :PAIRED]
    mine, other = (_activity(m, tokens) for m in (model, untrained))
    table = mine.merge(other, on=["layer", "measure"], suffixes=("", "_untrained"), validate="one_to_one")
    table = table.rename(columns={"value": "model", "value_untrained": "untrained"})
    table["ratio"] = table["model"] / table["untrained"].where(table["untrained"] != 0)
    return table


def _activity(model, tokens: Tensor) -> pd.DataFrame:
    """Columns layer, measure, value."""
    table = analysis.diagnose(model, tokens).set_index("layer")
    rows = {(layer, name): value for (layer, name), value in table.stack().items() if not math.isnan(value)}
    for r in analysis.records(model, tokens):
        layer = f"{r['index']} {r['layer']}"
        if r["layer"] == "G":
            rows[layer, "update"] = _update(_Writes(r, model.cfg))
        elif "recalled" in r:
            rows[layer, "query_zeros"] = float((r["read_query"] == 0).float().mean())
            read, window = (r[name].float().norm(dim=-1).mean() for name in ("recalled", "window"))
            rows[layer, "read_share"] = float(read / (read + window))
    lines = [{"layer": layer, "measure": name, "value": x} for (layer, name), x in rows.items()]
    return pd.DataFrame(lines).sort_values("layer", key=lambda name: name.str.split().str[0].astype(int), kind="stable")


def _update(w: _Writes) -> float:
    """Mean of |beta k u^T| / |S_{t-1}| over heads, sequences and tokens that find a state; nan where none does."""
    u = []
    for b in range(len(w.beta)):
        _, L = w.system(b)
        eye = torch.eye(L.shape[-1], dtype=L.dtype)
        u.append(torch.linalg.solve_triangular(eye + L, w.values[b], upper=False))
    u, keep = torch.stack(u), w.log_decay.exp()  # [B, H, T, V], [B, H, T]
    own = (w.beta * u.norm(dim=-1) * w.keys.norm(dim=-1)).square()
    # The value less u is what was recalled: S^T k, times e^g unless the erase reads the raw state.
    cross = 2 * w.beta * ((w.values - u) * u).sum(-1) * (keep if w.raw else 1)
    squared, before = torch.zeros_like(own[:, :, 0]), []
    for t in range(own.shape[2]):  # |e^g S + beta k u^T|^2: one number per head and sequence
        before.append(squared)
        squared = (keep[:, :, t].square() * squared + cross[:, :, t] + own[:, :, t]).clamp_min(0)
    before = torch.stack(before, dim=2).sqrt()
    held = before > 1e-7 * before.max()  # below, rounding of what cancelled
    return float((own.sqrt() / before)[held].mean()) if held.any() else math.nan


# ------------------------------------------------------------------------------------------------ all of them


def full(
    model: models.TransparentHybrid,
    task: data.Task,
    *,
    untrained: models.TransparentHybrid | None = None,
    trials: int = 1000,
    rows: int = 8,
    seed: int = 10_000,
) -> dict[str, pd.DataFrame]:
    """Every diagnostic of this module at sizes that take seconds, under the name of its function.

    task: a needle task, of whose fields `distance` is set by `gradient_survival`, at powers of two as far as the row goes.
    rows: of those that look inside; trials: answers of those that count. ValueError where one of them raises it.
    """
    tokens = task.sample(rows, analysis.fresh(seed)).tokens[:, :PAIRED]
    _require_field(task, "queries", "as needle tasks have")
    one = dataclasses.replace(task, queries=1, distance=None)
    least, most = one.tail - 1, task.seq_len - 1 - task.needle_width
    distances = sorted({least, most, *(2**i for i in range(most.bit_length()) if least < 2**i < most)})
    return {
        "gates_by_token": gates_by_token(model, task, rows=rows, seed=seed),
        "key_similarity": key_similarity(model, tokens, marker=task.first_special),
        "gradient_survival": gradient_survival(model, task, distances, rows=rows, seed=seed),
        "self_retrieval": self_retrieval(model, tokens),
        "confusion": confusion(model, task, trials=trials, seed=seed),
        "explain": explain(model, task, seed=seed),
        "marker_replaced": marker_replaced(model, task, trials=trials, seed=seed),
        "activity": activity(model, tokens, untrained),
    }
