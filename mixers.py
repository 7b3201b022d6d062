"""Attention to everything before: the token mixers that the memory is measured against.

A: softmax attention, whose state grows with every token. L: linear attention, whose state does not. Layers as those of
model.py: x [B, T, d] in, x + mixed [B, T, d] and a state to go on from out.

Letters: B sequences, T tokens, d = d_model, H heads, K key width and V value width of linear attention.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import config
import lean

EPS = 1e-6  # added to the sum of weights of linear attention, which is 0 before anything was written


class AttentionState(NamedTuple):
    """What an A layer carries: keys and values of every token so far, [B, H, t, d / H]."""

    keys: Tensor  # with `shifted_value`, at each token's place the key of the token before
    values: Tensor
    last_key: Tensor  # [B, H, d / H], of the last token itself


class LinearState(NamedTuple):
    """What an L layer carries."""

    memory: Tensor  # [B, H, K, V + 1]: sum of phi(k) v^T, and of phi(k) in the last column
    last_key: Tensor  # [B, H, K], phi(k) of the last token, for the shifted write


def rope(x: Tensor, position: int, base: float) -> Tensor:
    """Rotary position embedding (Su et al. 2021). x [B, T, H, D], D even; token t is rotated by position + t.

    Pairs are (x_i, x_{i + D/2}) with frequency base^(-2i/D); angles are computed in fp32.
    """
    T, D = x.shape[1], x.shape[-1]
    freq = base ** (-torch.arange(0, D, 2, device=x.device, dtype=torch.float32) / D)
    angle = torch.arange(position, position + T, device=x.device, dtype=torch.float32)[:, None] * freq
    cos, sin = angle.cos()[:, None, :], angle.sin()[:, None, :]
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over each query's own position and all before it.

    q [B, H, T, D] are the last T of the S >= T positions of k and v [B, H, S, D]. Returns [B, H, T, D]. Memory O(T S) under
    vmap, for which SDPA has no batching rule.
    """
    T, S = q.shape[2], k.shape[2]
    if T == S and not lean.under_transform(q):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    at = torch.arange(S, device=q.device)
    mask = at <= at[S - T :, None]
    if not lean.under_transform(q):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
    return torch.softmax(scores, dim=-1) @ v


def linear_attention(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None, *, chunk: int = 64):
    """out_t = S_t^T q_t / (z_t^T q_t + 1e-6) with S_t = sum_{i <= t} k_i v_i^T and z_t = sum_{i <= t} k_i.

    q, k [B, T, H, K], of no negative entries; v [B, T, H, V]; state [B, H, K, V + 1] of earlier tokens: S, and z as its last
    column. Returns (out [B, T, H, V] in the dtype of v, state), computed chunk by chunk in fp32 (fp64 for fp64 inputs).
    Source: Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are RNNs" (2020), arXiv:2006.16236.
    """
    B, T, H, K = q.shape
    dtype = torch.promote_types(v.dtype, torch.float32)
    n = -(-T // chunk)

    def cut(x):  # [B, T, H, D] -> [B, H, n, chunk, D], zeros behind the last token
        x = F.pad(x.to(dtype), (0, 0, 0, 0, 0, n * chunk - T))
        return x.unflatten(1, (n, chunk)).permute(0, 3, 1, 2, 4)

    with lean.full_precision(v):
        q_, k_ = cut(q), cut(k)
        v_ = cut(torch.cat([v, torch.ones_like(v[..., :1])], dim=-1))
        sums = (k_.mT @ v_).cumsum(2)  # [B, H, n, K, V + 1], what each chunk leaves
        first = torch.zeros_like(sums[:, :, :1]) if state is None else state[:, :, None].to(dtype)
        sums = torch.cat([first, sums + first], dim=2)
        near = torch.tril(q_ @ k_.mT) @ v_
        read = (q_ @ sums[:, :, :-1] + near).permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :T]
        out = read[..., :-1] / (read[..., -1:] + EPS)
    return out.to(v.dtype), sums[:, :, -1]


class AttentionLayer(nn.Module):
    """A: causal softmax attention over everything before, with RoPE where `use_rope` says so.

    `shifted_value` pairs the key of t - 1 with the value of t, as in a G layer: what followed is found in one layer, where two
    would have to learn to look at the token before. The first token, which has no key before it, is a slot of zeros.
    """

    def __init__(self, cfg: config.HybridConfig):
        super().__init__()
        self.cfg = cfg
        d = cfg.d_model
        self.norm = nn.RMSNorm(d, eps=1e-6)
        self.q, self.k, self.v, self.out = (nn.Linear(d, d, bias=False) for _ in range(4))

    def forward(self, x: Tensor, state: AttentionState | None, position: int, record: dict | None):
        """x [B, T, d] -> (x + attention, AttentionState)."""
        B, T, d = x.shape
        q, k, v = lean.normed_linears(x, self.norm, [self.q, self.k, self.v])
        q, k, v = (y.view(B, T, self.cfg.n_heads, -1) for y in (q, k, v))
        if self.cfg.use_rope:
            q, k = rope(q, position, self.cfg.rope_base), rope(k, position, self.cfg.rope_base)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        last_key = k[:, :, -1].clone()  # a slice would keep the whole sequence alive
        if self.cfg.shifted_value:
            before = torch.zeros_like(k[:, :, :1]) if state is None else state.last_key[:, :, None].to(k.dtype)
            k = torch.cat([before, k[:, :, :-1]], dim=2)
            if state is None:
                v = torch.cat([torch.zeros_like(v[:, :, :1]), v[:, :, 1:]], dim=2)
        if state is not None:
            k, v = (torch.cat([p.to(y.dtype), y], dim=2) for p, y in ((state.keys, k), (state.values, v)))
        attended = self.out(causal_attention(q, k, v).transpose(1, 2).reshape(B, T, d))
        if record is not None:
            record.update(attended=attended.detach(), q=q.detach(), k=k.detach())
        return x + attended, AttentionState(k, v, last_key)


class LinearAttentionLayer(nn.Module):
    """L: linear attention with phi(x) = elu(x) + 1, queries and keys of their own.

    `shifted_value` pairs the key of t - 1 with the value of t, as in a G layer: a write that no convolution has to learn.
    """

    def __init__(self, cfg: config.HybridConfig):
        super().__init__()
        self.cfg = cfg
        d, H, K, V = cfg.d_model, cfg.n_heads, cfg.head_dim, cfg.value_dim
        self.norm = nn.RMSNorm(d, eps=1e-6)
        self.query, self.key = nn.Linear(d, H * K, bias=False), nn.Linear(d, H * K, bias=False)
        self.value = nn.Linear(d, H * V, bias=False)
        self.out = nn.Linear(H * V, d, bias=False)

    def forward(self, x: Tensor, state: LinearState | None, position: int, record: dict | None):
        """x [B, T, d] -> (x + read, LinearState)."""
        cfg = self.cfg
        B, T, _ = x.shape
        q, k, v = lean.normed_linears(x, self.norm, [self.query, self.key, self.value])
        q, k, v = (y.view(B, T, cfg.n_heads, -1) for y in (q, k, v))
        with lean.full_precision(q):
            q, k = (F.elu(y.to(torch.promote_types(y.dtype, torch.float32))) + 1 for y in (q, k))
        last_key = k[:, -1].clone()  # a slice would keep the whole sequence alive
        if cfg.shifted_value:
            before = torch.zeros_like(k[:, :1]) if state is None else state.last_key[:, None].to(k.dtype)
            k = torch.cat([before, k[:, :-1]], dim=1)
        read, memory = linear_attention(q, k, v, None if state is None else state.memory, chunk=cfg.chunk_size)
        if record is not None:
            record.update(read=read.detach(), keys=k.detach(), values=v.detach(), state=memory.detach())
        return x + self.out(read.flatten(2)), LinearState(memory, last_key)
