"""The hybrid: gated delta memory (G layers) and sliding-window attention that also reads that memory (S layers).

    cfg = config.preset("smoke")
    net = model.TransparentHybrid(cfg)
    out = net(tokens, targets)        # Output(logits, loss, diagnostics, state)
    logits, state = net.step(token)   # one token at a time: the memory, a window of keys and values, nothing that grows

Letters: B sequences, T tokens, d = d_model, H heads, K key width, V value width of the memory, W window.
Every path is causal: position t sees tokens up to t, whatever the layer pattern and options.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import chunked
import config
import core
import kernel_ops
import lean
import mixers

# What a shut hard decay keeps: 2^-24 is below the rounding of the fp32 state, and unlike log 0 it has a gradient.
SHUT = 2.0**-24
# Largest logits tensor (elements) that the loss builds whole; above it the loss works through the rows in parts.
WHOLE_LOGITS = 2**24
# Keys of a sequence that the penalty on similar ones compares, evenly spread: it is quadratic in them.
PENALISED_KEYS = 256
# Rows per attention call: the CUDA kernels take a batch of at most 65,535.
SDPA_ROWS = 2**15


class Output(NamedTuple):
    """What a forward pass returns.

    logits: [B, T, vocab], or [N, vocab] for the N chosen `positions`, or None when `targets` were given without them.
    loss: mean cross-entropy in nats over scored tokens (targets != -100), a scalar; None without targets.
    diagnostics: one dictionary per layer, detached, when asked for; otherwise None.
    state: `HybridState` after the last token; pass it back to go on.
    penalty: what `penalties` asked for, a scalar to add to the loss; None without.
    """

    logits: Tensor | None
    loss: Tensor | None
    diagnostics: list[dict] | None
    state: HybridState
    penalty: Tensor | None = None


class MemoryState(NamedTuple):
    """What a G layer carries from token to token."""

    memory: Tensor  # [B, H, K, V], the delta rule's state
    last_key: Tensor  # [B, H, K], for the shifted write
    last_beta: Tensor  # [B, H]; zero before the first token, so that nothing is written at t = 0
    convs: tuple[Tensor | None, ...]  # last w - 1 inputs of the context, key and query convolutions, [B, d, w - 1]
    count: Tensor  # [B], write markers seen so far (key bank)


class WindowState(NamedTuple):
    """What an S layer carries: keys and values of the last min(t, W - 1) tokens, [B, H, c, d / H]."""

    keys: Tensor
    values: Tensor


class Penalties(NamedTuple):
    """Weights of what training may add to the loss, each a mean over G layers, heads, tokens and sequences."""

    write: float = 0.0  # of the write strength beta
    keys: float = 0.0  # of |cosine| between keys of different tokens, on at most `PENALISED_KEYS` of them


class HybridState(NamedTuple):
    layers: tuple[MemoryState | WindowState | mixers.AttentionState | mixers.LinearState, ...]
    position: int  # tokens seen so far


# ------------------------------------------------------------------------------------------------ small parts


@chunked.applied
class _clamp01(torch.autograd.Function):
    """clamp(x, 0, 1) whose gradient is kept wherever it would move x back inside: a shut gate can open again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clamp(0.0, 1.0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        # Descent moves x by -grad: below 0 only a negative gradient leads back, above 1 only a positive one.
        stuck = ((x < 0) & (grad > 0)) | ((x > 1) & (grad < 0))
        return torch.where(stuck, torch.zeros_like(grad), grad)


def hard_sigmoid(logit: Tensor) -> Tensor:
    """clamp(1.2 sigmoid(logit) - 0.1, 0, 1): exactly 0 below logit -2.4, exactly 1 above 2.4, and able to come back."""
    return _clamp01(1.2 * torch.sigmoid(logit) - 0.1)


def straight_through(logit: Tensor) -> Tensor:
    """The values of `hard_sigmoid` with the gradient of the sigmoid (Bengio, Leonard, Courville 2013, arXiv:1308.3432)."""
    soft = torch.sigmoid(logit)
    return soft + ((1.2 * soft - 0.1).clamp(0.0, 1.0) - soft).detach()


def mean_cosine(k: Tensor) -> Tensor:
    """Mean |cosine| between unit keys of different tokens of a head and sequence; k [B, T, H, K], T >= 2. A scalar."""
    k = k[:, :: -(-k.shape[1] // PENALISED_KEYS)].transpose(1, 2).float()
    n = k.shape[2]
    # Of a unit key with itself it is 1: taken off as the diagonal itself, which rounding leaves a little beside 1.
    off = (k @ k.mT).abs() * (1 - torch.eye(n, device=k.device))
    return off.sum((-2, -1)).mean() / (n * (n - 1))


class CausalConv(nn.Module):
    """y_t = sum_j W_j x_{t-w+1+j} (+ bias): a dense causal convolution over w tokens, [B, T, d_in] -> [B, T, d_out]."""

    def __init__(self, d_in: int, d_out: int, width: int, *, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in, width))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """`past` [B, d_in, w - 1] holds the inputs before x (None: zeros). Returns (y, the new past)."""
        width = self.weight.shape[-1]
        x = x.transpose(1, 2)
        x = F.pad(x, (width - 1, 0)) if past is None else torch.cat([past.to(x.dtype), x], dim=-1)
        y = F.conv1d(x, self.weight, self.bias)
        # Cloned: a slice would keep the whole sequence alive as long as the state.
        return y.transpose(1, 2), x[..., x.shape[-1] - (width - 1) :].clone()


class SwiGLU(nn.Module):
    """W_2 (silu(W_1 x) * W_3 x), without biases (Shazeer 2020)."""

    def __init__(self, d: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(d, hidden, bias=False)
        self.up = nn.Linear(d, hidden, bias=False)
        self.down = nn.Linear(hidden, d, bias=False)

    def forward(self, x: Tensor, norm: nn.RMSNorm) -> Tensor:
        """x [B, T, d] -> x + SwiGLU(norm(x))."""
        gate, up = lean.normed_linears(x, norm, [self.gate, self.up])
        return x + lean.product_linear(gate, up, self.down, silu=True)


def _has_a_kernel(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether kernels_window.py runs for these queries, keys and values, [B, H, T, D]."""
    dtype = lean.matmul_dtype(q)
    return (
        q.is_cuda
        and dtype in kernel_ops.WINDOW_DTYPES
        and q.dtype != torch.float64  # which autocast leaves alone
        and q.dtype == k.dtype == v.dtype
        and q.shape == k.shape == v.shape
        and 0 < q.shape[-1] <= kernel_ops.WINDOW_WIDTH
        and not lean.under_transform(q, k, v)
        and core.triton_problem(q.device, dtype) is None
    )


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, past: WindowState | None) -> Tensor:
    """Causal softmax attention over the last `window` tokens, the current one included.

    q, k, v [B, H, T, D]; `past` holds the keys and values of up to window - 1 earlier tokens. Returns [B, H, T, D].
    On a GPU where Triton runs, a kernel, without a second derivative. Else the sequence is cut into blocks of `window` tokens,
    each attending to itself and the block before: one SDPA call, linear in T, with a backward on every device.
    """
    B, H, T, D = q.shape
    if past is None and _has_a_kernel(q, k, v):
        # Under autocast in the dtype that SDPA would take.
        heads_last = (x.to(lean.matmul_dtype(x)).transpose(1, 2) for x in (q, k, v))
        return kernel_ops.attend(*heads_last, window).transpose(1, 2)
    c = 0 if past is None else past.keys.shape[2]
    if past is not None and T == 1:
        k, v = (torch.cat([p.to(x.dtype), x], dim=2) for p, x in ((past.keys, k), (past.values, v)))
        return F.scaled_dot_product_attention(q, k, v)
    lead = 0 if past is None else window  # one more block in front of each sequence, for what `past` holds
    n = -(-(lead + T) // window)
    tail = n * window - lead - T
    transformed = lean.under_transform(q)

    def rows(x, before):  # [B, H, T, D] -> [B n window, H, D]: all sequences on end, each in n whole blocks
        x = x.transpose(1, 2)
        if past is not None:
            x = torch.cat([x.new_zeros(B, window - c, H, D), before.transpose(1, 2).to(x.dtype), x], dim=1)
        return (F.pad(x, (0, 0, 0, 0, 0, tail)) if tail else x).flatten(0, 1)

    def pairs(x):  # -> [B n, H, 2 window, D]: row b holds blocks b - 1 and b. Views that overlap: nothing is held twice
        x = F.pad(x, (0, 0, 0, 0, window, 0))
        if (
            lean.keeps_all(x) and not torch.compiler.is_compiling()
        ):  # the gradient of unfold is slow on a CPU, not batched
            x = x.unflatten(0, (-1, window))
            return torch.cat([x[:-1], x[1:]], dim=1).transpose(1, 2)
        return x.unfold(0, 2 * window, window).mT

    i = torch.arange(window, device=q.device)[:, None]
    j = torch.arange(2 * window, device=q.device)[None, :]
    block = torch.arange(n, device=q.device)[:, None, None]
    mask = (j > i) & (j <= i + window)  # key j of the pair lies at token j - window of the block
    mask = mask & ((block > 0) | (j >= window))  # before a first block lies the sequence before this one
    if past is not None:
        mask = mask & ((block != 1) | (j >= window - c))  # before the second lie padding and `past`
    mask = mask.repeat(B, 1, 1)[:, None]  # [B n, 1, window, 2 window]
    unread = q.new_zeros(B, H, c, D)  # queries where `past` stands
    q = rows(q, unread).unflatten(0, (B * n, window)).transpose(1, 2)
    k, v = pairs(rows(k, None if past is None else past.keys)), pairs(rows(v, None if past is None else past.values))
    if transformed:  # SDPA has no batching rule for vmap and would run member by member
        scores = (q @ k.mT / math.sqrt(D)).masked_fill(~mask, -math.inf)
        out = torch.softmax(scores, dim=-1) @ v
    elif len(q) <= SDPA_ROWS:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    else:
        parts = zip(*(y.split(SDPA_ROWS) for y in (q, k, v, mask)), strict=True)
        out = torch.cat([F.scaled_dot_product_attention(q, k, v, attn_mask=m) for q, k, v, m in parts])
    out = out.transpose(1, 2).reshape(B, n * window, H, D)  # a view where SDPA lays its result out like q
    return out[:, lead : lead + T].transpose(1, 2)


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the logits x W^T over the targets that are not -100.

    x [B, T, d], weight [vocab, d], targets [B, T] int64. Small logits are built whole; large ones row block by row
    block, so that the vocabulary never meets the sequence in memory, and at scored rows only, unless a CUDA graph is being
    captured, which cannot wait to see how many there are. Without a scored target the loss is 0.
    """
    scored = targets != -100
    count = scored.sum().clamp_min(1)
    if lean.under_transform(x, weight) or targets.numel() * weight.shape[0] <= WHOLE_LOGITS:
        logits = F.linear(x, weight)
        logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum") / count
    x, targets = x.flatten(0, 1), targets.flatten()
    if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        chosen = scored.flatten().nonzero()[:, 0]
        if len(chosen) < len(x):
            x, targets = x.index_select(0, chosen), targets[chosen]
    # Rows that the matrix products fill a GPU with; elsewhere fewer, because the gradient of a part has copies in fp32.
    rows = WHOLE_LOGITS * 3 // weight.shape[0]
    rows = max(1, rows // 128 * 128 if x.is_cuda and rows >= 128 else rows)
    # Known here only: inside an autograd function gradients are always off, and asked for if the inputs could have them.
    need = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    dtype = lean.matmul_dtype(x)
    with lean.full_precision(x):
        return lean.summed_cross_entropy(x, weight, targets, rows, dtype, need) / count


# ------------------------------------------------------------------------------------------------ layers


class TokenMemory(NamedTuple):
    """The memory after one token, read like `core.Memory`: generation needs no chunks."""

    state: Tensor  # [B, H, K, V]

    def read(self, q: Tensor) -> Tensor:
        """q [B, 1, H, K] -> S^T q [B, 1, H, V], in the dtype of q."""
        with torch.autocast(q.device.type, enabled=False):
            return torch.einsum("bthk,bhkv->bthv", q.to(self.state.dtype), self.state).to(q.dtype)


class MemoryLayer(nn.Module):
    """G: a gated delta rule. Writes value v under key k with strength beta, lets the memory decay by e^g, reads it.

    The write at t pairs, with `shifted_value`, the key and beta of t - 1 with the value of t: what follows a marker is
    stored under it, so seeing the marker again recalls what followed. The read at t uses the key of t (or a query of
    its own).
    """

    def __init__(self, cfg: config.HybridConfig):
        super().__init__()
        self.cfg = cfg
        d, H, K, V = cfg.d_model, cfg.n_heads, cfg.head_dim, cfg.value_dim
        self.norm = nn.RMSNorm(d, eps=1e-6)
        self.context_conv = CausalConv(d, d, cfg.key_context_conv, bias=True) if cfg.key_context_conv else None
        self.key = (
            CausalConv(d, H * K, cfg.key_conv_width, bias=False)
            if cfg.key_conv_width
            else nn.Linear(d, H * K, bias=False)
        )
        self.query = None
        if cfg.query_conv_width:
            self.query = CausalConv(d, H * K, cfg.query_conv_width, bias=False)
        elif cfg.query_proj:
            self.query = nn.Linear(d, H * K, bias=False)
        self.value = nn.Linear(d, H * V, bias=False)
        self.out = nn.Linear(H * V, d, bias=False)
        self.write_gate = nn.Linear(d, H)
        if cfg.decay != "none":
            self.decay_gate = nn.Linear(d, H)
        if cfg.decay == "mamba":
            self.log_rate = nn.Parameter(torch.zeros(H))
        if cfg.key_bank_slots:
            # Orthonormal rows per head, fixed: QR of a seeded Gaussian.
            gaussian = torch.randn(H, K, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            bank = torch.linalg.qr(gaussian).Q[:, : cfg.key_bank_slots].float()
            self.register_buffer("key_bank", bank, persistent=False)

    @torch.no_grad()
    def set_gate_biases(self):
        self.write_gate.bias.fill_(self.cfg.beta_bias)
        if self.cfg.decay == "mamba":
            # -exp(log_rate) softplus(-g_bias) = logsigmoid(g_bias): the same half-life at the start.
            self.decay_gate.bias.fill_(-self.cfg.g_bias)
        elif self.cfg.decay != "none":
            self.decay_gate.bias.fill_(self.cfg.g_bias)

    def gates(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Write strength beta in [0, 1] and log-decay g <= 0, both [B, T, H], from the normed input h [B, T, d].

        In fp32 whatever the autocast: a bf16 sigmoid rounds to 1, and the memory of long sequences is lost.
        """
        with lean.full_precision(h):
            h = h.to(torch.promote_types(h.dtype, torch.float32))
            return self._gates(*(gate(h) for gate in self._gate_linears()))

    def _gate_linears(self) -> list[nn.Linear]:
        return [self.write_gate] if self.cfg.decay == "none" else [self.write_gate, self.decay_gate]

    def _gates(self, write: Tensor, decay: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`gates` from their logits [B, T, H]."""
        with lean.full_precision(write):
            gate = dict(sigmoid=torch.sigmoid, hard=hard_sigmoid, straight=straight_through)[self.cfg.write_gate]
            beta = gate(write)
            if decay is None:
                return beta, torch.zeros_like(beta)
            if self.cfg.decay == "sigmoid":
                return beta, F.logsigmoid(decay)
            if self.cfg.decay == "mamba":
                return beta, -self.log_rate.exp() * F.softplus(decay)
            keep = hard_sigmoid(decay)
            return beta, (keep + SHUT * (1 - keep)).log()

    def bank_keys(self, keys: Tensor, tokens: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Put the bank's keys where slot markers and write markers stand. keys [B, T, H, K], tokens [B, T], count [B]."""
        cfg = self.cfg
        slot = tokens - cfg.key_bank_start
        hit = (slot >= 0) & (slot < cfg.key_bank_slots)
        if cfg.key_bank_marker is not None:
            marked = tokens == cfg.key_bank_marker
            seen = count[:, None] + marked.cumsum(1)
            slot = torch.where(marked, (seen - 1) % cfg.key_bank_slots, slot)
            hit, count = hit | marked, seen[:, -1]
        rows = self.key_bank.to(keys.dtype).transpose(0, 1)[torch.where(hit, slot, 0)]  # [B, T, H, K]
        return torch.where(hit[..., None, None], rows, keys), count

    def forward(
        self,
        x: Tensor,
        tokens: Tensor,
        state: MemoryState | None,
        position: int,
        record: dict | None,
        penalties: Penalties | None = None,
    ):
        """x [B, T, d] -> (x + read, Memory, MemoryState, penalty: a scalar, or None without `penalties`)."""
        cfg = self.cfg
        B, T, _ = x.shape
        heads = (B, T, cfg.n_heads, -1)
        context_past = key_past = query_past = q = None
        if cfg.key_context_conv or cfg.key_conv_width or cfg.query_conv_width:
            pasts = (None, None, None) if state is None else state.convs
            h = context = self.norm(x)
            if self.context_conv is not None:
                context, context_past = self.context_conv(h, pasts[0])
            if cfg.key_conv_width:
                k, key_past = self.key(context, pasts[1])
            else:
                k = self.key(context)
            if cfg.query_conv_width:
                q, query_past = self.query(h, pasts[2])
            elif self.query is not None:
                q = self.query(h)
            v, (beta, g) = self.value(h), self.gates(h)
        else:
            linears = [self.key, self.value] + ([] if self.query is None else [self.query])
            k, v, *rest = lean.normed_linears(x, self.norm, linears, wide=self._gate_linears())
            q = None if self.query is None else rest.pop(0)
            beta, g = self._gates(*rest)
        v = v.view(heads)

        count = torch.zeros(B, dtype=torch.long, device=x.device) if state is None else state.count
        counted = count

        def finish(y):  # unit length, bank, rotation; in fp32, then back to the dtype of v
            nonlocal counted
            y = F.normalize(y.view(heads).to(torch.promote_types(y.dtype, torch.float32)), dim=-1)
            if cfg.key_bank_slots:
                y, counted = self.bank_keys(y, tokens, count)
            if cfg.rope_keys:
                y = mixers.rope(y, position, cfg.rope_base)
            return y.to(v.dtype)

        k = finish(k)
        q = k if q is None else finish(q)
        gate = beta  # of each token's own key, wherever the write happens
        last_key, last_beta = k[:, -1].clone(), beta[:, -1].clone()  # slices would keep the whole sequence alive
        if cfg.shifted_value:
            before_k = torch.zeros_like(k[:, :1]) if state is None else state.last_key[:, None].to(k.dtype)
            before_beta = torch.zeros_like(beta[:, :1]) if state is None else state.last_beta[:, None]
            write_k = torch.cat([before_k, k[:, :-1]], dim=1)
            beta = torch.cat([before_beta, beta[:, :-1]], dim=1)
        else:
            write_k = k
        initial = None if state is None else state.memory
        if T == 1 and state is not None:
            now = (x[:, 0] for x in (q, write_k, v, beta, g))
            out, after = core.delta_step(*now, initial, erase=cfg.erase)
            memory, read = TokenMemory(after), out[:, None]
        else:
            options = dict(initial_state=initial, erase=cfg.erase, chunk_size=cfg.chunk_size, impl=cfg.impl)
            memory = core.delta_write(write_k, v, beta, g, q=q, **options)
            read = memory.out
        if record is not None:
            record.update(keys=k.detach(), beta=gate.detach(), log_decay=g.detach(), state=memory.state.detach())
            record.update(read=read.detach(), values=v.detach())
        state = MemoryState(memory.state, last_key, last_beta, (context_past, key_past, query_past), counted)
        penalty = None
        if penalties is not None:
            penalty = penalties.write * gate.mean()
            if penalties.keys:
                penalty = penalty + penalties.keys * mean_cosine(k)
        return x + self.out(read.flatten(2)), memory, state, penalty


class WindowLayer(nn.Module):
    """S: softmax attention over the last W tokens, plus a gated read of the nearest preceding G layer's memory.

    The read uses the query relu(W_q h) and is scaled per head by sigmoid(W_g h + b). Without a G layer before it the
    layer is attention only and holds no read parameters.
    """

    def __init__(self, cfg: config.HybridConfig, *, reads_memory: bool):
        super().__init__()
        self.cfg = cfg
        d, H, K, V = cfg.d_model, cfg.n_heads, cfg.head_dim, cfg.value_dim
        self.norm = nn.RMSNorm(d, eps=1e-6)
        self.q, self.k, self.v, self.out = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.reads_memory = reads_memory
        if reads_memory:
            self.read_query = nn.Linear(d, H * K, bias=False)
            self.read_gate = nn.Linear(d, H)
            self.read_out = nn.Linear(H * V, d, bias=False)

    def forward(self, x: Tensor, memory, state: WindowState | None, position: int, record: dict | None):
        """x [B, T, d] -> (x + attention + gated read, WindowState)."""
        cfg = self.cfg
        B, T, d = x.shape
        linears = [self.q, self.k, self.v] + ([self.read_query, self.read_gate] if self.reads_memory else [])
        q, k, v, *rest = lean.normed_linears(x, self.norm, linears)
        q, k, v = (y.view(B, T, cfg.n_heads, -1) for y in (q, k, v))
        if cfg.use_rope:
            q, k = (mixers.rope(y, position, cfg.rope_base) for y in (q, k))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # [B, H, T, d / H]
        attended = self.out(window_attention(q, k, v, cfg.window_size, state).transpose(1, 2).reshape(B, T, d))
        if record is not None:
            record.update(window=attended.detach(), q=q.detach(), k=k.detach())
        keep = cfg.window_size - 1
        if state is not None:
            k, v = (torch.cat([p.to(y.dtype), y], dim=2) for p, y in ((state.keys, k), (state.values, v)))
        start = max(k.shape[2] - keep, 0)
        state = WindowState(k[:, :, start:].clone(), v[:, :, start:].clone())
        y = x + attended
        if self.reads_memory:
            query = F.relu(rest[0]).view(B, T, cfg.n_heads, -1)
            gate = torch.sigmoid(rest[1])
            recalled = lean.product_linear(memory.read(query), gate[..., None], self.read_out)
            if record is not None:
                record.update(read_query=query.detach(), read_gate=gate.detach(), recalled=recalled.detach())
            y = y + recalled
        return y, state


class TransparentHybrid(nn.Module):
    """A language model over tokens [B, T]: embedding, then per letter of `layer_pattern` a layer and a SwiGLU, a final RMSNorm,
    and a head tied to the embedding. Letters: G and S, and to compare them with, A and L of mixers.py.
    """

    def __init__(self, cfg: config.HybridConfig, *, generator: torch.Generator | None = None):
        """Weights are drawn from `generator` (None: a generator seeded with 0), so equal seeds give equal models."""
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.layers, self.norms, self.ffns = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        others = dict(G=MemoryLayer, A=mixers.AttentionLayer, L=mixers.LinearAttentionLayer)
        for i, letter in enumerate(cfg.layer_pattern):
            reads = "G" in cfg.layer_pattern[:i]
            self.layers.append(WindowLayer(cfg, reads_memory=reads) if letter == "S" else others[letter](cfg))
            self.norms.append(nn.RMSNorm(cfg.d_model, eps=1e-6))
            self.ffns.append(SwiGLU(cfg.d_model, cfg.ffn_dim))
        self.norm = nn.RMSNorm(cfg.d_model, eps=1e-6)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None):
        """Matrices N(0, init_std), norms 1, biases 0 but for the gates' (`beta_bias`, `g_bias`)."""
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        for name, p in self.named_parameters():
            if p.ndim >= 2:
                p.copy_(torch.randn(p.shape, generator=generator) * self.cfg.init_std)
            elif name.endswith("bias") or name.endswith("log_rate"):
                p.zero_()
            else:
                p.fill_(1.0)
        for layer in self.layers:
            if isinstance(layer, MemoryLayer):
                layer.set_gate_biases()

    def compile_layers(self, *, backend: str = "inductor") -> TransparentHybrid:
        """Have torch.compile fuse what lies between the matrix products, layer by layer and in place. Returns the model.

        The loss stays as it is: it works row block by row block, on as many rows as are scored. Compiling takes seconds at
        the first step and again at the second sequence length.
        """
        for part in (*self.layers, *self.ffns):
            part.compile(backend=backend)
        return self

    def count_params(self) -> int:
        """Number of trainable parameters; the tied embedding counts once."""
        return sum(p.numel() for p in self.parameters())

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        state: HybridState | None = None,
        diagnostics: bool = False,
        penalties: Penalties | None = None,
    ) -> Output:
        """tokens [B, T] int64, T >= 1; targets [B, T] int64 with -100 where nothing is scored.

        positions: boolean [B, T]; logits are built for these N positions only, as [N, vocab].
        state: go on from an earlier call; the sequence is then the continuation of what that call saw.
        diagnostics: record keys, gates, states and reads of every layer (costs memory; nothing when False).
        penalties: also return their weighted sum, for training; ValueError for a model without a G layer.
        Raises ValueError for tokens of another rank, dtype or outside the vocabulary (values are checked on the CPU; on
        a GPU the check would wait for the device, and the embedding raises there).
        """
        self._check(tokens, targets, positions, state)
        if penalties is not None and "G" not in self.cfg.layer_pattern:
            raise ValueError(f"penalties: are of G layers, of which {self.cfg} has none")
        x = self.embed(tokens)
        position = 0 if state is None else state.position
        memory, states, records, added = None, [], [] if diagnostics else None, []
        for i, (letter, layer) in enumerate(zip(self.cfg.layer_pattern, self.layers, strict=True)):
            before = None if state is None else state.layers[i]
            record = {"layer": letter, "index": i} if diagnostics else None
            if letter == "G":
                x, memory, after, penalty = layer(x, tokens, before, position, record, penalties)
                added.append(penalty)
            elif letter == "S":
                x, after = layer(x, memory, before, position, record)
            else:
                x, after = layer(x, before, position, record)
            x = self.ffns[i](x, self.norms[i])
            states.append(after)
            if diagnostics:
                records.append(record)
        x = self.norm(x)
        loss = None if targets is None else cross_entropy(x, self.embed.weight, targets)
        logits = None
        if positions is not None:
            logits = F.linear(x[positions], self.embed.weight)
        elif targets is None:
            logits = F.linear(x, self.embed.weight)
        penalty = None if penalties is None else sum(added) / len(added)
        return Output(logits, loss, records, HybridState(tuple(states), position + tokens.shape[1]), penalty)

    @torch.no_grad()
    def step(self, token: Tensor, state: HybridState | None = None) -> tuple[Tensor, HybridState]:
        """One token [B] -> (logits [B, vocab] for the next one, state), without gradients.

        The state's size does not grow with time. The memory moves by `core.delta_step`, whatever `cfg.impl` names.
        """
        if not isinstance(token, Tensor) or token.ndim != 1:
            raise ValueError(f"token: needs int64 [B], was given {_shown(token)}")
        out = self(token[:, None], state=state)
        return out.logits[:, 0], out.state

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        n_tokens: int,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue the prompt tokens [B, T] by n_tokens: greedily at temperature 0, else by sampling. Returns [B, n]."""
        if not isinstance(n_tokens, int) or isinstance(n_tokens, bool) or n_tokens < 1:
            raise ValueError(f"n_tokens = {n_tokens!r}: needs an integer of at least 1")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature = {temperature!r}: needs a finite number of at least 0")
        self._check(tokens, None, None, None)
        last = torch.zeros_like(tokens, dtype=torch.bool)
        last[:, -1] = True
        out = self(tokens, positions=last)
        logits, state, produced = out.logits, out.state, []
        while True:
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                probs = torch.softmax(logits.float() / temperature, dim=-1)
                token = torch.multinomial(probs, 1, generator=generator)[:, 0]
            produced.append(token)
            if len(produced) == n_tokens:
                return torch.stack(produced, dim=1)
            logits, state = self.step(token, state)

    def _check(self, tokens, targets, positions, state):
        check_tokens(self, tokens, targets, positions)
        if state is not None:
            self._check_state(state, len(tokens))

    def _check_state(self, state, B):
        cfg = self.cfg
        if not isinstance(state, HybridState) or len(state.layers) != len(self.layers):
            raise ValueError(f"state: needs the HybridState of a model with {len(self.layers)} layers")
        H, K, V, width = cfg.n_heads, cfg.head_dim, cfg.value_dim, cfg.d_model // cfg.n_heads
        kinds = dict(G=MemoryState, S=WindowState, A=mixers.AttentionState, L=mixers.LinearState)
        shapes = dict(G=(K, V), L=(K, V + 1), A=(state.position, width))
        shapes |= dict(S=(min(state.position, cfg.window_size - 1), width))
        for i, (letter, part) in enumerate(zip(cfg.layer_pattern, state.layers, strict=True)):
            if not isinstance(part, kinds[letter]):
                raise ValueError(f"state: layer {i} is {letter}, the state there is a {type(part).__name__}")
            given = part[0]
            if given.shape != (B, H, *shapes[letter]):
                raise ValueError(
                    f"state: layer {i} ({letter}) holds {list(given.shape)}, which does not fit {B} sequences of {cfg}"
                )


def check_tokens(net: nn.Module, tokens: Tensor, targets: Tensor | None, positions: Tensor | None):
    """ValueError naming the argument, what a model with `embed` and `cfg` needs and what was given.

    Ids are looked at on a CPU alone (elsewhere it would wait for the device), and neither compiled nor inside a transform.
    """
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or 0 in tokens.shape or tokens.dtype != torch.long:
        raise ValueError(f"tokens: needs int64 [B, T] with B and T at least 1, was given {_shown(tokens)}")
    home = net.embed.weight.device
    if tokens.device != home:
        raise ValueError(f"tokens: on {tokens.device}, the model on {home}; move one to the other")
    for name, value, dtype in (("targets", targets, torch.long), ("positions", positions, torch.bool)):
        fits = isinstance(value, Tensor) and (value.shape, value.dtype) == (tokens.shape, dtype)
        if value is not None and not (fits and value.device == home):
            needs = f"{dtype} {list(tokens.shape)} on {home}, as tokens"
            raise ValueError(f"{name}: needs {needs}, was given {_shown(value)}")
    if home.type != "cpu" or torch.compiler.is_compiling() or lean.under_transform(tokens):
        return
    vocab, values = net.cfg.vocab_size, {"tokens": tokens}
    if targets is not None and (targets != -100).any():
        values["targets"] = targets[targets != -100]
    for name, ids in values.items():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab:
            why = f"raise {type(net.cfg).__name__}.vocab_size or use the tokenizer or task that the model was built for"
            raise ValueError(f"{name}: ids run from {low} to {high}, but the vocabulary has {vocab}; {why}")


def _shown(value) -> str:
    """How an argument is named in an error."""
    return f"{value.dtype} {list(value.shape)} on {value.device}" if isinstance(value, Tensor) else type(value).__name__


def build(cfg: config.Settings, *, seed: int = 0) -> nn.Module:
    """The model that a configuration describes, its weights drawn from `seed`.

    Raises ValueError for a configuration that no model takes.
    """
    if isinstance(cfg, config.HybridConfig):
        return TransparentHybrid(cfg, generator=torch.Generator().manual_seed(seed))
    if isinstance(cfg, config.TinyConfig):
        import tiny  # which imports this module

        return tiny.TinyTransformer(cfg, generator=torch.Generator().manual_seed(seed))
    raise ValueError(f"cfg: no model is built from {type(cfg).__name__}; HybridConfig and TinyConfig are")
