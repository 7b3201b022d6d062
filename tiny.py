"""A small causal transformer of which every part is an option: addition, cyclic words, position encodings.

    net = tiny.TinyTransformer(config.TinyConfig(qkv_rank=3, out_rank=3, ffn_rank=3, pos_rank=3, fixed_residual=True))
    net.count_params(), net.count_fixed()           # 512 numbers trained, 392 drawn once and left
    out = net(tokens, targets)                      # model.Output(logits, loss, diagnostics, state)
    net(tokens, diagnostics=True).diagnostics       # attention maps, queries, keys and values of every block

How a model knows where a token stands is an `Encoding`, a small object with four places to act: on the token vectors, on q, k
and v, on the scores, and on what was attended to. Another one is a subclass and a line in `ENCODINGS`.

Nothing here depends on the values of its inputs or keeps a state, so models of other seeds train side by side under
torch.func (`train.fit_ensemble`), and a GPU can record a step.

Letters: B sequences, T tokens, d = d_model, H heads, D = d / H.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import config
import lean
import mixers
import model

# Which of the parts of one projection are q, k and v.
TIES = {"none": (0, 1, 2), "kv": (0, 1, 1), "qk": (0, 0, 1), "qv": (0, 1, 0), "qkv": (0, 0, 0)}
# Up to so many tokens torch.compile gets attention in plain operations, which it fuses, under vmap as well; beyond them SDPA.
COMPILED_TOKENS = 64


# ------------------------------------------------------------------------------------------------ positions


def rotate(x: Tensor, base: float, share: float = 1.0) -> Tensor:
    """Rotary position embedding by a share of its angles: x [B, H, T, D], D even, token t turned by share * t * frequency.

    Pairs are (x_i, x_{i + D/2}) with frequency base^(-2i/D), in fp32 or wider. share -1 undoes 1; the length of every
    pair is kept. Source: Su et al., "RoFormer" (2021), arXiv:2104.09864.
    """
    T, D = x.shape[-2:]
    like = dict(device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
    freq = base ** (-torch.arange(0, D, 2, **like) / D)
    angle = share * torch.arange(T, **like)[:, None] * freq
    cos, sin = angle.cos(), angle.sin()
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Encoding(nn.Module):
    """No positions (NoPE: the causal mask alone), and the places where another encoding may act.

    Every encoding turns V where `rope_v` says so: v_j by rope_v times RoPE's angle at j, and with `rope_v_inverse` what
    was attended to back by that at t, so that out_t = sum_j a_tj R(rope_v (j - t)) v_j. Without it the rotation tells where
    a token stands, not how far away.
    """

    def __init__(self, cfg: config.TinyConfig):
        super().__init__()
        self.cfg = cfg

    def embed(self, x: Tensor) -> Tensor:
        """Token vectors [B, T, d] before the first block."""
        return x

    def turn(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, T, D] of a block."""
        return q, k, rotate(v, self.cfg.rope_base, self.cfg.rope_v) if self.cfg.rope_v else v

    def bias(self, x: Tensor) -> Tensor | None:
        """What is added to the scores q k^T / sqrt(D) of every block: [H, T, T] (or [T, T]) for x [B, T, d]; None: nothing."""
        return None

    def turn_back(self, out: Tensor) -> Tensor:
        """What was attended to, [B, H, T, D], before the output projection."""
        return rotate(out, self.cfg.rope_base, -self.cfg.rope_v) if self.cfg.rope_v_inverse else out


class Learned(Encoding):
    """A learned vector per position, added to the token: a table [max_len, d], or A B with A [max_len, r] and B [r, d]."""

    def __init__(self, cfg: config.TinyConfig):
        super().__init__(cfg)
        d, r = cfg.d_model, cfg.pos_rank
        self.table = nn.Parameter(torch.empty(cfg.max_len, r or d))
        self.factor = nn.Parameter(torch.empty(r, d)) if r else None

    def embed(self, x):
        T, longest = x.shape[1], self.cfg.max_len
        if T > longest:
            raise ValueError(f"tokens: {T} of them, but positions were made for {longest}; raise TinyConfig.max_len")
        rows = self.table[:T]
        return x + (rows if self.factor is None else rows @ self.factor)


class Rope(Encoding):
    """RoPE: q and k turned by their position, so that a score depends on what they hold and how far apart they are."""

    def turn(self, q, k, v):
        q, k = rotate(q, self.cfg.rope_base), rotate(k, self.cfg.rope_base)
        return super().turn(q, k, v)


def alibi_slopes(n_heads: int) -> list[float]:
    """Slopes of ALiBi, one per head: 2^(-8 i / H) for i = 1 .. H where H is a power of two.

    Else those of n, the power of two below, then every other slope of 2 n: 2^(-4 i / n) for i = 1, 3, 5, ...
    Source: Press, Smith, Lewis, "Train Short, Test Long" (2021), arXiv:2108.12409, and the authors' code.
    """
    n = 1 << (n_heads.bit_length() - 1)
    return [2 ** (-8 * i / n) for i in range(1, n + 1)] + [2 ** (-4 * i / n) for i in range(1, 2 * (n_heads - n), 2)]


class Alibi(Encoding):
    """ALiBi: from the score of a query at i for a key at j is taken slope * (i - j), with a slope of its own per head."""

    def __init__(self, cfg: config.TinyConfig):
        super().__init__(cfg)
        # No part of a saved model: the number of heads gives them.
        self.register_buffer("slopes", torch.tensor(alibi_slopes(cfg.n_heads)), persistent=False)

    def bias(self, x):
        at = torch.arange(x.shape[1], device=x.device)
        return -self.slopes[:, None, None] * (at[:, None] - at)


# By the names of TinyConfig.position.
ENCODINGS = {"learned": Learned, "rope": Rope, "alibi": Alibi, "none": Encoding}


# ------------------------------------------------------------------------------------------------ blocks


class LowRankLinear(nn.Module):
    """y = x A B (+ x W_fixed) (+ b), with A [d_in, r] and B [r, d_out] trained, and W_fixed [d_in, d_out] drawn once.

    W_fixed is a buffer: it is saved with the model and moves with it, but no optimizer sees it.
    """

    def __init__(self, d_in: int, d_out: int, rank: int, *, fixed: bool, bias: bool):
        super().__init__()
        self.A, self.B = nn.Parameter(torch.empty(d_in, rank)), nn.Parameter(torch.empty(rank, d_out))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self.register_buffer("fixed", torch.empty(d_in, d_out) if fixed else None)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> [..., d_out]."""
        # The matrix is small beside the tokens: made first, they meet one product and not three.
        weight = self.A @ self.B
        weight = weight if self.fixed is None else weight + self.fixed
        return F.linear(x, weight.mT, self.bias)


def linear(d_in: int, d_out: int, rank: int, cfg: config.TinyConfig) -> nn.Module:
    """Full rank where `rank` is 0."""
    if rank:
        return LowRankLinear(d_in, d_out, rank, fixed=cfg.fixed_residual, bias=cfg.bias)
    return nn.Linear(d_in, d_out, bias=cfg.bias)


def norm(cfg: config.TinyConfig) -> nn.Module:
    """LayerNorm with scale and bias, RMSNorm with scale alone, or nothing."""
    if cfg.norm == "layer":
        return nn.LayerNorm(cfg.d_model)
    return nn.RMSNorm(cfg.d_model, eps=1e-6) if cfg.norm == "rms" else nn.Identity()


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, record: dict | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v over each query's own position and all before it; q, k, v [B, H, T, D].

    bias [H, T, T] or [T, T]. With a record the weights [B, H, T, T] are kept in it as "attention".
    """
    T = q.shape[2]
    # SDPA has no batching rule for vmap, and shows no weights. The compiler cannot tell whether it is inside vmap.
    plain = record is not None or (torch.compiler.is_compiling() and T <= COMPILED_TOKENS)
    if bias is None and not plain:
        return mixers.causal_attention(q, k, v)
    at = torch.arange(T, device=q.device)
    future = at > at[:, None]
    if not plain and not lean.under_transform(q, bias):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.masked_fill(future, -math.inf).to(q.dtype))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias
    weights = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1)
    if record is not None:
        record["attention"] = weights.detach()
    return weights.to(v.dtype) @ v


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then + feed-forward(norm(.)) with GELU in between.

    `parallel`: both read one norm of x, and are added at once (Wang and Komatsuzaki, GPT-J, 2021; Pythia).
    """

    def __init__(self, cfg: config.TinyConfig):
        super().__init__()
        self.cfg = cfg
        d, parts = cfg.d_model, 1 + max(TIES[cfg.tie_qkv])
        self.norm = norm(cfg)
        self.qkv = linear(d, parts * d, cfg.qkv_rank, cfg)
        self.out = linear(d, d, cfg.out_rank, cfg)
        self.ffn_norm = None if cfg.parallel else norm(cfg)
        self.up, self.down = linear(d, cfg.ffn_dim, cfg.ffn_rank, cfg), linear(cfg.ffn_dim, d, cfg.ffn_rank, cfg)

    def forward(self, x: Tensor, position: Encoding, bias: Tensor | None, record: dict | None) -> Tensor:
        """x [B, T, d] -> [B, T, d]; bias: what `position` adds to the scores, with which every block begins."""
        h = self.norm(x)
        mixed = self.attend(h, position, bias, record)
        if self.ffn_norm is None:
            return x + mixed + self.feed(h)
        x = x + mixed
        return x + self.feed(self.ffn_norm(x))

    def attend(self, h: Tensor, position: Encoding, bias: Tensor | None, record: dict | None) -> Tensor:
        parts = self.qkv(h).unflatten(-1, (-1, self.cfg.n_heads, self.cfg.d_model // self.cfg.n_heads))
        parts = parts.permute(2, 0, 3, 1, 4)  # [B, T, parts, H, D] -> [parts, B, H, T, D]
        q, k, v = position.turn(*(parts[i] for i in TIES[self.cfg.tie_qkv]))
        out = position.turn_back(attention(q, k, v, bias, record))
        mixed = self.out(out.transpose(1, 2).flatten(2))
        if record is not None:
            record.update(q=q.detach(), k=k.detach(), v=v.detach(), attended=mixed.detach())
        return mixed

    def feed(self, h: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(h)))


# ------------------------------------------------------------------------------------------------ model


class TinyTransformer(nn.Module):
    """A language model over tokens [B, T]: embedding and positions, blocks, a final norm, and a head without bias that is
    the embedding (`tie_head`) or a matrix of its own.

    `depth_shared` applies the blocks so often one after another, a, b, a, b, ... (Dehghani et al., "Universal Transformers",
    2018, arXiv:1807.03819): more computation from the same parameters.
    """

    def __init__(self, cfg: config.TinyConfig, *, generator: torch.Generator | None = None):
        """Weights and fixed numbers are drawn from `generator` (None: one seeded with 0): equal seeds, equal models."""
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.position = ENCODINGS[cfg.position](cfg)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))
        self.norm = norm(cfg)
        self.head = None if cfg.tie_head else nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None):
        """Matrices and fixed residuals N(0, init_std); norms 1; biases 0; factors A and B of low-rank linears as the source
        of the addition log draws them, N(0, 2 / (rows + columns)) (Glorot and Bengio 2010): init_std squared would leave
        next to nothing of a product."""
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        for name, p in self.named_parameters():
            if p.ndim >= 2:
                p.copy_(torch.randn(p.shape, generator=generator) * self.cfg.init_std)
            elif name.endswith("bias"):
                p.zero_()
            else:
                p.fill_(1.0)
        # Last, so that a model with residuals starts from the weights of the model without.
        for part in self._low_rank():
            for p in (part.A, part.B):
                p.mul_(math.sqrt(2 / sum(p.shape)) / self.cfg.init_std)
            if part.fixed is not None:
                part.fixed.copy_(torch.randn(part.fixed.shape, generator=generator) * self.cfg.init_std)

    def _low_rank(self) -> list[LowRankLinear]:
        return [part for part in self.modules() if isinstance(part, LowRankLinear)]

    def count_params(self) -> int:
        """Number of trained parameters; a tied head and blocks that are applied again count once."""
        return sum(p.numel() for p in self.parameters())

    def count_fixed(self) -> int:
        """Number of fixed residuals' entries: drawn from the seed, never trained. Standard encodings are not counted."""
        return sum(part.fixed.numel() for part in self._low_rank() if part.fixed is not None)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        diagnostics: bool = False,
    ) -> model.Output:
        """tokens [B, T] int64, T >= 1; targets [B, T] int64 with -100 where nothing is scored. Returns `model.Output`.

        positions: boolean [B, T]; logits are built for these N positions only, as [N, vocab].
        diagnostics: one dictionary per applied block, detached: attention [B, H, T, T]; q, k, v [B, H, T, D] as they meet,
        after any rotation; attended [B, T, d], what attention adds. Costs memory that grows with T^2.
        The state is None: there is nothing to go on from. Raises ValueError for tokens of another rank, dtype or outside the
        vocabulary (values are checked on the CPU alone), and for more of them than learned positions.
        """
        model.check_tokens(self, tokens, targets, positions)
        x = self.position.embed(self.embed(tokens))
        bias = self.position.bias(x)
        records = [] if diagnostics else None
        for _ in range(self.cfg.depth_shared):
            for block in self.blocks:
                record = {"layer": "A", "index": len(records)} if diagnostics else None
                x = block(x, self.position, bias, record)
                if diagnostics:
                    records.append(record)
        x = self.norm(x)
        head = self.embed.weight if self.head is None else self.head.weight
        loss = None if targets is None else model.cross_entropy(x, head, targets)
        logits = None
        if positions is not None:
            logits = F.linear(x[positions], head)
        elif targets is None:
            logits = F.linear(x, head)
        return model.Output(logits, loss, records, None)
