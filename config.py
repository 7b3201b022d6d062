"""Every knob of the workbook: frozen dataclasses that validate themselves, named presets, and the run profile.

Nothing here imports torch or another module of the workbook, so reading a configuration costs nothing.

    cfg = config.preset("smoke")                    # a named starting point
    cfg = dataclasses.replace(cfg, window_size=32)  # every change is validated again
    config.HybridConfig.from_dict(cfg.to_dict())    # the round trip; unknown keys are errors
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass

PROFILES = ("smoke", "full")


# ------------------------------------------------------------------------------------------------ foundations


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# Annotations that `Settings` checks; others (tasks, tensors) are a class's own to validate.
PLAIN = {
    "int": _is_int,
    "float": _is_number,
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "None": lambda value: value is None,
    "tuple[int, ...]": lambda value: isinstance(value, tuple) and all(map(_is_int, value)),
    "tuple[int, int]": lambda value: isinstance(value, tuple) and len(value) == 2 and all(map(_is_int, value)),
    "tuple[float, float]": lambda value: isinstance(value, tuple) and len(value) == 2 and all(map(_is_number, value)),
}
MEANING = {"int": "an integer", "float": "a finite number", "bool": "True or False", "str": "a string"}


@dataclass(frozen=True)
class Settings:
    """Base of every configuration and every task: frozen, validated on construction, with strict dictionaries.

    A subclass overrides `validate`, calling `require` once per rule.
    """

    def __post_init__(self):
        self._check_types()
        self.validate()

    def _check_types(self) -> None:
        """Fields annotated with a plain type hold a value of it; numbers are finite."""
        for field in dataclasses.fields(self):
            options = [part.strip() for part in str(field.type).split("|")]
            if all(option in PLAIN for option in options):
                ok = any(PLAIN[option](getattr(self, field.name)) for option in options)
                self.require(ok, field.name, f"needs {' or '.join(MEANING.get(o, o) for o in options)}")

    def validate(self) -> None:
        """Raise ValueError where the values contradict each other. Runs on every construction."""

    def require(self, ok: bool, field: str, why: str) -> None:
        """Raise ValueError naming `field`, the value it was given and `why` (what would do) unless `ok`."""
        if not ok:
            raise ValueError(f"{type(self).__name__}.{field} = {getattr(self, field)!r}: {why}")

    def require_choice(self, field: str, choices: tuple[str, ...]) -> None:
        self.require(getattr(self, field) in choices, field, f"choose one of {', '.join(map(repr, choices))}")

    def require_whole(self, *fields: str, least: int = 1) -> None:
        """Every named field is an integer of at least `least`."""
        for field in fields:
            value = getattr(self, field)
            self.require(_is_int(value) and value >= least, field, f"needs an integer of at least {least}")

    def require_positive(self, *fields: str) -> None:
        """Every named field is an integer of at least 1."""
        self.require_whole(*fields, least=1)

    def to_dict(self) -> dict:
        """Plain dictionary of every field, ready for JSON (tuples become lists there and come back as tuples)."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict):
        """Build from a dictionary. Unknown keys raise ValueError; missing ones take the default where there is one."""
        fields = {f.name for f in dataclasses.fields(cls) if f.init}
        unknown = sorted(set(values) - fields)
        if unknown:
            raise ValueError(f"{cls.__name__}: unknown keys {unknown}; known ones are {sorted(fields)}")
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        except TypeError as error:
            raise ValueError(f"{cls.__name__}: {error}") from error


def profile() -> str:
    """The run profile, from the environment variable WORKBOOK_PROFILE: "smoke" (a CPU, minutes) or "full" (a GPU).

    Unset means smoke. Read here and nowhere else.
    """
    name = os.environ.get("WORKBOOK_PROFILE", "smoke")
    if name not in PROFILES:
        raise ValueError(f"WORKBOOK_PROFILE = {name!r}: choose one of {', '.join(map(repr, PROFILES))}")
    return name


def by_profile(*, smoke, full):
    """The value that belongs to the current profile; notebooks write each dial that differs as one such line."""
    return {"smoke": smoke, "full": full}[profile()]


def half_life(g_bias: float) -> float:
    """Tokens after which a memory with decay sigmoid(g_bias) at every token has lost half its content."""
    # log sigmoid(g_bias), written so that neither end overflows
    log_decay = min(g_bias, 0.0) - math.log1p(math.exp(-abs(g_bias)))
    return math.log(0.5) / log_decay if log_decay else math.inf


def g_bias_for(half_life_tokens: float) -> float:
    """The decay bias whose half-life is `half_life_tokens` (> 0): the inverse of `half_life`."""
    if not half_life_tokens > 0:
        raise ValueError(f"half_life_tokens = {half_life_tokens!r}: needs a number of tokens above 0")
    return -math.log(math.expm1(math.log(2.0) / half_life_tokens))


def round_up(value: float, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return multiple * math.ceil(value / multiple)


# ------------------------------------------------------------------------------------------------ models


@dataclass(frozen=True)
class HybridConfig(Settings):
    """A stack of G layers (gated delta memory) and S layers (sliding-window attention that also reads the memory), and of what
    they are compared with: A (softmax attention to everything before) and L (linear attention).

    The default is the source notes' seed configuration, corrected: their decay bias of 2 halves the memory every 5.5 tokens,
    ours every 2,067 (`half_life(8.0)`), no shorter than the length it is trained at; values are shifted, and the erase
    recalls from the decayed state. `preset("notes")` is theirs.
    """

    d_model: int = 512
    n_heads: int = 8
    head_dim: int = 64  # K, the key width per head of the memory
    value_dim: int = 128  # V, the value width per head of the memory
    layer_pattern: str = "GS"
    window_size: int = 64  # tokens an S layer attends to, the current one included
    chunk_size: int = 64
    vocab_size: int = 50257
    beta_bias: float = -2.0
    g_bias: float = 8.0
    write_gate: str = (
        "sigmoid"  # sigmoid | hard: clamp(1.2 sigmoid - 0.1, 0, 1) | straight: its values, a sigmoid's gradient
    )
    decay: str = "sigmoid"  # sigmoid | mamba | none | hard
    erase: str = "decayed"  # decayed: recall from the decayed state; raw: from the state before the decay
    shifted_value: bool = True  # the write at t pairs key and beta of t-1 with the value of t
    query_proj: bool = False  # G reads with a query projection of its own instead of its key
    key_conv_width: int = 0  # > 0: keys from a causal convolution over so many tokens, in place of the projection
    query_conv_width: int = 0  # > 0: likewise for the query of G
    key_context_conv: int = 0  # > 0: a causal d-to-d convolution with bias before the key projection
    use_rope: bool = False  # rotary positions on q and k of S
    rope_keys: bool = False  # rotary positions on the keys (and queries) of G
    rope_base: float = 10000.0
    key_bank_slots: int = 0  # > 0: so many orthonormal keys per head, for slot markers
    key_bank_start: int = 0  # tokens key_bank_start + i take key i of the bank
    key_bank_marker: int | None = None  # this token takes key i at its i-th occurrence (a write counter)
    init_std: float = 0.02
    impl: str = "auto"  # implementation of the delta rule: reference | torch | triton | auto

    def validate(self):
        self.require_positive("d_model", "n_heads", "head_dim", "value_dim", "window_size", "chunk_size", "vocab_size")
        ok = bool(self.layer_pattern) and set(self.layer_pattern) <= set("GSAL")
        why = "needs one letter per layer, G (memory), S (window attention), A (attention) or L (linear), such as 'GS'"
        self.require(ok, "layer_pattern", why)
        self.require(self.head_dim <= 256, "head_dim", "the delta rule takes key widths up to 256")
        self.require(self.value_dim <= 256, "value_dim", "the delta rule takes value widths up to 256")
        attends = bool(set(self.layer_pattern) & set("SA"))
        if attends:
            why = f"d_model {self.d_model} does not split into {self.n_heads} attention heads; use a divisor of d_model"
            self.require(self.d_model % self.n_heads == 0, "n_heads", why)
        self.require_choice("write_gate", ("sigmoid", "hard", "straight"))
        self.require_choice("decay", ("sigmoid", "mamba", "none", "hard"))
        self.require_choice("erase", ("decayed", "raw"))
        self.require_choice("impl", ("auto", "reference", "torch", "triton"))
        self.require_whole(
            "key_conv_width", "query_conv_width", "key_context_conv", "key_bank_slots", least=0
        )  # 0: off
        if self.key_context_conv and self.key_conv_width:
            why = "stands before the key projection, which key_conv_width replaces: set one of them to 0"
            self.require(False, "key_context_conv", why)
        if self.use_rope:
            self.require(attends, "use_rope", f"rotates S and A layers; {self.layer_pattern!r} has none")
            width = self.d_model // self.n_heads
            self.require(width % 2 == 0, "use_rope", f"d_model / n_heads = {width} must be even to rotate pairs")
        of_g = "query_proj rope_keys key_conv_width query_conv_width key_context_conv key_bank_slots"
        for field in of_g.split():
            ok = "G" in self.layer_pattern or not getattr(self, field)
            self.require(ok, field, f"belongs to G layers; {self.layer_pattern!r} has none")
        ok = not (self.query_proj and self.query_conv_width)
        self.require(ok, "query_proj", "query_conv_width is a query projection already: set one of them")
        if self.rope_keys:
            self.require(
                not self.key_bank_slots, "rope_keys", "would turn the bank's keys apart: set key_bank_slots to 0"
            )
            self.require(self.head_dim % 2 == 0, "rope_keys", f"head_dim {self.head_dim} must be even to rotate pairs")
        self.require(self.rope_base > 1, "rope_base", "needs a number above 1")
        self.require(self.init_std > 0, "init_std", "needs a standard deviation above 0")
        if self.key_bank_slots:
            ok = self.key_bank_slots <= self.head_dim
            self.require(ok, "key_bank_slots", f"at most head_dim = {self.head_dim} keys can be orthonormal")
            last = self.key_bank_start + self.key_bank_slots
            ok = 0 <= self.key_bank_start and last <= self.vocab_size
            self.require(ok, "key_bank_start", f"slot markers must lie inside the vocabulary of {self.vocab_size}")
        if self.key_bank_marker is not None:
            self.require(self.key_bank_slots > 0, "key_bank_marker", "needs key_bank_slots > 0")
            ok = 0 <= self.key_bank_marker < self.vocab_size
            self.require(ok, "key_bank_marker", f"must lie inside the vocabulary of {self.vocab_size}")
            slot = 0 <= self.key_bank_marker - self.key_bank_start < self.key_bank_slots
            self.require(not slot, "key_bank_marker", "is a slot marker as well: choose an id outside the bank's")

    @property
    def ffn_dim(self) -> int:
        """Hidden width of the SwiGLU: 8/3 d_model rounded up to a multiple of 64."""
        return round_up(8 * self.d_model / 3, 64)

    def state_size(self, length: int) -> int:
        """Numbers that a sequence of `length` tokens leaves for the next: memories, and keys and values of attention.

        Those of a G layer's last key and gate and of convolutions, a few per head and channel, are not counted.
        """
        G = self.n_heads * self.head_dim * self.value_dim
        sizes = {"G": G, "L": G + self.n_heads * self.head_dim}
        sizes |= {"S": 2 * self.d_model * min(length, self.window_size - 1), "A": 2 * self.d_model * length}
        return sum(sizes[letter] for letter in self.layer_pattern)

    def __repr__(self):
        """Short form, `HybridConfig(GS, d=512, h=8, K=64, V=128)`; `to_dict()` has every field."""
        widths = f"d={self.d_model}, h={self.n_heads}, K={self.head_dim}, V={self.value_dim}"
        return f"HybridConfig({self.layer_pattern}, {widths})"


@dataclass(frozen=True)
class ConvConfig(Settings):
    """ConvText: byte embedding, dilated same-padded residual convolutions, tied head (the selective-copying study)."""

    channels: int = 64
    kernel_size: int = 9
    dilations: tuple[int, ...] = (1, 2, 3, 4, 5, 1)  # one per layer
    attention_layers: tuple[int, ...] = ()  # indices of the layers with attention; negative ones count from the end
    attention: str = "linear"  # linear (parameter-free) | softmax
    attention_heads: int = 1
    from_conv: str = "QK"  # which of q, k, v the convolution emits; the rest is the layer's input
    feature_map: str = "elu"  # elu (elu + 1) | dpfp, for linear attention
    vocab_size: int = 256

    def validate(self):
        self.require_positive("channels", "kernel_size", "attention_heads", "vocab_size")
        ok = len(self.dilations) > 0 and all(isinstance(d, int) and d >= 1 for d in self.dilations)
        self.require(ok, "dilations", "needs one integer of at least 1 per layer")
        n = len(self.dilations)
        ok = all(-n <= i < n for i in self.attention_layers)
        self.require(ok, "attention_layers", f"the network has {n} layers: indices run from {-n} to {n - 1}")
        self.require_choice("attention", ("linear", "softmax"))
        self.require_choice("feature_map", ("elu", "dpfp"))
        self.require_choice("from_conv", ("QK", "QV", "KV", "QKV"))
        why = f"channels {self.channels} do not split into {self.attention_heads} heads"
        self.require(self.channels % self.attention_heads == 0, "attention_heads", why)


@dataclass(frozen=True)
class TinyConfig(Settings):
    """A small causal transformer (tiny.py): addition, cyclic words, position encodings.

    The default is the addition log's baseline of 763 parameters: full rank, LayerNorm, learned positions.
    """

    d_model: int = 7
    n_layers: int = 1
    n_heads: int = 1
    ffn_dim: int = 14
    vocab_size: int = 14
    max_len: int = 33  # learned positions: the longest sequence; other encodings take any length
    position: str = "learned"  # learned | rope | alibi | none
    norm: str = "layer"  # layer (with its bias) | rms | none
    pos_rank: int = 0  # 0: full rank
    qkv_rank: int = 0  # of the one matrix that makes q, k and v, which so share the factor A
    out_rank: int = 0
    ffn_rank: int = 0
    fixed_residual: bool = False  # x A B + x W_fixed in every low-rank linear
    depth_shared: int = 1  # times that the n_layers blocks are applied one after another, with the same weights
    tie_qkv: str = "none"  # none | kv | qk | qv | qkv: those named are one projection
    tie_head: bool = True
    bias: bool = False  # in every linear but the head; a LayerNorm has its own always
    parallel: bool = False  # attention and feed-forward from one norm (Pythia)
    rope_v: float = 0.0  # V is rotated by this share of the angle that RoPE turns Q and K by; 0: not at all
    rope_v_inverse: bool = False  # rotate what was attended to back, so that V turns by the distance alone
    rope_base: float = 10000.0
    init_std: float = 0.02

    def validate(self):
        self.require_positive("d_model", "n_layers", "n_heads", "ffn_dim", "vocab_size", "max_len", "depth_shared")
        ok = self.d_model % self.n_heads == 0
        self.require(ok, "n_heads", f"d_model {self.d_model} does not split into {self.n_heads} heads")
        self.require_choice("position", ("learned", "rope", "alibi", "none"))
        self.require_choice("norm", ("layer", "rms", "none"))
        self.require_choice("tie_qkv", ("none", "kv", "qk", "qv", "qkv"))
        head = self.d_model // self.n_heads
        if self.position == "rope" or self.rope_v:
            self.require(head % 2 == 0, "n_heads", f"RoPE needs an even head width; d_model / n_heads = {head}")
        for field, full in (
            ("pos_rank", min(self.max_len, self.d_model)),
            ("qkv_rank", self.d_model),
            ("out_rank", self.d_model),
            ("ffn_rank", min(self.d_model, self.ffn_dim)),
        ):
            rank = getattr(self, field)
            self.require(0 <= rank <= full, field, f"needs 0 (full rank) or a rank of at most {full}")
        ok = self.position == "learned" or not self.pos_rank
        self.require(ok, "pos_rank", f"is of learned positions; position = {self.position!r} has none: set 0")
        ranks = self.qkv_rank or self.out_rank or self.ffn_rank
        why = "stands beside low-rank linears: set a rank"
        self.require(bool(ranks) or not self.fixed_residual, "fixed_residual", why)
        self.require(0.0 <= self.rope_v <= 1.0, "rope_v", "needs a number from 0 to 1")
        why = "turns back what rope_v turned: set rope_v above 0"
        self.require(self.rope_v > 0 or not self.rope_v_inverse, "rope_v_inverse", why)
        self.require(self.rope_base > 1, "rope_base", "needs a number above 1")
        self.require(self.init_std > 0, "init_std", "needs a standard deviation above 0")

    def __repr__(self):
        """Short form, what differs from the default: `TinyConfig(d_model=8, ffn_dim=28)`."""
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return f"TinyConfig({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"


@dataclass(frozen=True)
class LSTMConfig(Settings):
    """LSTMText: stacked one-direction LSTM with a tied head."""

    width: int = 64
    n_layers: int = 6
    vocab_size: int = 256
    residual: bool = False

    def validate(self):
        self.require_positive("width", "n_layers", "vocab_size")


@dataclass(frozen=True)
class MambaConfig(Settings):
    """MambaText: minimal selective state-space layers with a tied head."""

    d_model: int = 32
    n_layers: int = 6
    state_dim: int = 16
    expand: int = 2
    conv_width: int = 4
    vocab_size: int = 256

    def validate(self):
        self.require_positive("d_model", "n_layers", "state_dim", "expand", "conv_width", "vocab_size")


# ------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class TrainConfig(Settings):
    """How one model is fitted. Budgets, tasks and leaving rules belong to the phases (`train.Phase`)."""

    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 20  # linear, at the start of every phase
    schedule: str = "cosine"  # cosine | constant, over each phase's budget
    min_lr_ratio: float = 0.1  # where the cosine ends, as a share of lr
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    write_penalty: float = 0.0  # added to the loss: so many times the mean write strength of the memory layers
    key_penalty: float = 0.0  # likewise the mean |cosine| between keys of different tokens
    grad_accum: int = 1  # micro-batches per step; each phase's batch size is per micro-batch
    device: str = "auto"  # auto (CUDA where there is one, else the CPU) | cpu
    precision: str = "auto"  # auto (bf16 autocast on a GPU that has it, else fp32) | fp32 | bf16
    seed: int = 0
    log_every: int = 10  # steps
    save_every: int = 0  # steps between resumable states; 0: only at the end

    def validate(self):
        self.require(self.lr > 0, "lr", "needs a learning rate above 0")
        self.require(self.weight_decay >= 0, "weight_decay", "needs a number of at least 0")
        ok = len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)
        self.require(ok, "betas", "needs two numbers in [0, 1)")
        self.require_whole("warmup_steps", "save_every", "seed", least=0)
        self.require_choice("schedule", ("cosine", "constant"))
        self.require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", "needs a share from 0 to 1")
        self.require(self.grad_clip >= 0, "grad_clip", "needs a norm above 0, or 0 for no clipping")
        for field in ("write_penalty", "key_penalty"):
            self.require(getattr(self, field) >= 0, field, "needs a weight above 0, or 0 for none")
        self.require_positive("grad_accum", "log_every")
        self.require_choice("device", ("auto", "cpu"))
        self.require_choice("precision", ("auto", "fp32", "bf16"))


# ------------------------------------------------------------------------------------------------ presets

PRESETS: dict[str, Settings] = {
    # The source notes' model, decay bias corrected (see HybridConfig).
    "seed": HybridConfig(),
    # The same with the notes' own decay: half-life 5.5 tokens. Kept to show what it costs.
    "notes": HybridConfig(g_bias=2.0, shifted_value=False, erase="raw"),
    # Trains on two CPU cores in about a minute.
    "smoke": HybridConfig(
        d_model=64, n_heads=2, head_dim=32, value_dim=32, vocab_size=256, window_size=16, chunk_size=64,
        g_bias=g_bias_for(4096), beta_bias=0.0,
    ),
}  # fmt: skip


def preset(name: str) -> Settings:
    """A named configuration. ValueError lists the names when `name` is not one of them."""
    if name not in PRESETS:
        raise ValueError(f"preset = {name!r}: choose one of {', '.join(map(repr, PRESETS))}")
    return PRESETS[name]
