"""The gated delta rule: an associative memory written and read token by token.

State `S [B, H, K, V]`, one matrix per sequence and head. With log-decay `g_t <= 0` and write strength `beta_t`, each token does

    S_t = e^g_t S_{t-1} + k_t (beta_t (v_t - k_t^T (e^g_t S_{t-1})))^T        o_t = scale * S_t^T q_t

that is: decay everything, look up what key k_t recalls, and move that answer a share beta_t of the way to v_t.

    out, state = core.delta_rule(q, k, v, beta, g)        write and read in one call
    memory = core.delta_write(k, v, beta, g)              write once ...
    out = memory.read(q)                                  ... read with as many sets of queries as there are layers
    out, state = core.delta_step(q, k, v, beta, g, state) one token, for generation

Here are the contract, the reference and the choice of an implementation: `chunked.py` holds the PyTorch one, `kernel_ops.py` and
`kernels.py` the Triton one, imported when it is chosen.

Letters: B batch, T tokens, H heads, K key width, V value width, C chunk length, N chunks.
Sources: Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (2024) and "Gated Delta
Networks: Improving Mamba2 with Delta Rule" (2024).
"""

from __future__ import annotations

import abc
import functools
import importlib.util
import math
import os
from typing import NamedTuple

import torch

import chunked

MAX_WIDTH = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ERASE_RULES = ("decayed", "raw")
NORM_EPS = 1e-6
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it once too, when it is imported

state_dtype = chunked.state_dtype


class DeltaOutput(NamedTuple):
    """`out [B, T, H, V]` in the dtype of the inputs and `state [B, H, K, V]` after the last token in `state_dtype`."""

    out: torch.Tensor
    state: torch.Tensor


class Memory(abc.ABC):
    """What `delta_write` wrote, readable at every position: position t sees the writes at positions <= t and no later one.

    `state [B, H, K, V]` is the state after the last token (float32; float64 for float64 inputs). It carries gradients, and as the
    `initial_state` of the next call it continues the sequence. `out [B, T, H, V]` is what queries
    given with the write read, None without.
    """

    state: torch.Tensor
    out: torch.Tensor | None = None
    _k: torch.Tensor

    def read(self, q: torch.Tensor, scale: float = 1.0, *, normalize: bool = False) -> torch.Tensor:
        """`o_t = scale * S_t^T q_t` for queries `q [B, T, H, K]`; returns `[B, T, H, V]` in the dtype of q.

        Shape, dtype and device of q are those of the written keys; anything else is a ValueError. `normalize` brings q to unit
        length first, as `normalize_qk` of `delta_rule` does. Several reads of one memory share its write, and their gradients add
        up in it.
        """
        _check_tensor("q", q, "[B, T, H, K]", self._k.shape, (self._k.dtype,), self._k.device)
        _check_scale(scale)
        _check_flag("normalize", normalize)
        with chunked.full_precision(q.device):
            return self._read(q, float(scale), normalize)

    @abc.abstractmethod
    def _read(self, q, scale, normalize):
        """`read` without checks, autocast already off."""


def _unit(x):
    """x [..., K] with rows of length 1, in the dtype of the arithmetic."""
    x = x.to(state_dtype(x.dtype))
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + NORM_EPS)


# ------------------------------------------------------------------------------------------------ reference


def _step(q, k, v, beta, g, S, scale, raw):
    """One token of the recurrence. q, k [B, H, K], v [B, H, V], beta, g [B, H], S [B, H, K, V], all in the dtype of S."""
    decayed = S * g.exp()[..., None, None]
    recalled = torch.einsum("bhk,bhkv->bhv", k, S if raw else decayed)
    S = decayed + torch.einsum("bhk,bhv->bhkv", k, beta[..., None] * (v - recalled))
    out = None if q is None else scale * torch.einsum("bhk,bhkv->bhv", q, S)
    return out, S


class _ReferenceMemory(Memory):
    """The specification: a plain loop over tokens that keeps every state. Differentiated by autograd."""

    def __init__(self, k, v, beta, g, initial_state, raw, normalize, chunk_size):
        self._k, (B, T, H, K), dtype = k, k.shape, state_dtype(k.dtype)
        k = _unit(k) if normalize else k
        k, v, beta, g = (x.to(dtype) for x in (k, v, beta, g))
        S = k.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state
        states = []
        for t in range(T):
            _, S = _step(None, k[:, t], v[:, t], beta[:, t], g[:, t], S, None, raw)
            states.append(S)
        self.state = S
        self._states = torch.stack(states, dim=1)  # [B, T, H, K, V]

    def _read(self, q, scale, normalize):
        q_ = _unit(q) if normalize else q.to(self._states.dtype)
        return (scale * torch.einsum("bthk,bthkv->bthv", q_, self._states)).to(q.dtype)


# ------------------------------------------------------------------------------------------------ chunks, kernels


class _ChunkedMemory(Memory):
    """Chunks in parallel, a loop over chunks only. Keeps the values written and the state at every chunk's start."""

    def __init__(self, k, v, beta, g, initial_state, raw, normalize, chunk_size):
        self._k, self._g = k, g
        self._keys, self._chunk = _unit(k) if normalize else k, min(chunk_size, k.shape[1])
        written = chunked.write(self._keys, v, beta, g, initial_state, self._chunk, raw)
        self._new_v, self._states, self.state, _ = written

    def _read(self, q, scale, normalize):
        q_ = _unit(q) if normalize else q
        return chunked.read(q_, self._keys, self._g, self._new_v, self._states, scale, self._chunk).to(q.dtype)


class _TritonMemory(Memory):
    """The Triton kernels, which choose chunks of their own. Keeps the same as `_ChunkedMemory`, in float16 for 16-bit inputs."""

    def __init__(self, k, v, beta, g, initial_state, raw, normalize, q, scale, normalize_q):
        import kernel_ops

        self._k, self._g, self._normalize = k, g, normalize
        options = dict(scale=scale, raw=raw, norm_q=normalize_q, norm_k=normalize, readable=True)
        self._written = kernel_ops.write(q, k, v, beta, g, initial_state, **options)
        self.state = self._written.state
        self.out = None if q is None else self._written.out

    def _read(self, q, scale, normalize):
        import kernel_ops

        norms = dict(norm_q=normalize, norm_k=self._normalize)
        return kernel_ops.read(q, self._k, self._g, self._written, scale=scale, **norms)


# ------------------------------------------------------------------------------------------------ validation


def _check_tensor(name, x, letters, shape, dtypes, device):
    """ValueError unless `x` is a tensor of `shape` (described by `letters`), one of `dtypes`, on `device`."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor {letters}, given {type(x).__name__}")
    if x.shape != shape:  # a tuple or a torch.Size, which compares like one
        heads = x.dim() == len(shape) == 4 and x.shape[:2] == shape[:2] and x.shape[2] != shape[2]
        hint = "; q, k and v have as many heads: repeat_interleave those that are shared" if heads else ""
        raise ValueError(f"{name}: expected shape {letters} = {tuple(shape)}, given {tuple(x.shape)}{hint}")
    if x.dtype not in dtypes:
        raise ValueError(
            f"{name}: expected dtype {' or '.join(map(str, dtypes))}, given {x.dtype}; the dtype of k decides"
        )
    if x.device != device:
        raise ValueError(f"{name}: expected device {device}, that of k, given {x.device}")


def _check_scale(scale):
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not -math.inf < scale < math.inf:
        hint = ", such as 1.0 or K ** -0.5" if scale is None else ""
        raise ValueError(f"scale = {scale!r}: expected a finite number{hint}")


def _check_flag(name, x):
    if not isinstance(x, bool):
        raise ValueError(f"{name} = {x!r}: expected True or False")


def _any(condition):
    """Whether any element is true; False where values cannot be read: under torch.func.vmap and while compiling."""
    if torch.compiler.is_compiling():
        return False
    try:
        return bool(condition.any())
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        return False


NOT_TAKEN = object()  # in place of an argument that a function does not have


def _check_rows(name, x, letters, axes):
    """The shape of `x`, k or v; ValueError unless it is a tensor of so many axes, none of them empty or too wide."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor {letters}, given {type(x).__name__}")
    shape = x.shape
    if len(shape) != axes or 0 in shape:
        raise ValueError(f"{name}: expected shape {letters} with every size at least 1, given {tuple(shape)}")
    if shape[-1] > MAX_WIDTH:
        raise ValueError(f"{name}: expected a width {name.upper()} of at most {MAX_WIDTH}, given {shape[-1]}")
    return shape


LETTERS = {lead: tuple(f"[{lead}{width}]" for width in ("", ", K", ", V")) for lead in ("B, T, H", "B, H")}


def _validate(
    *, k, v, beta, g, erase, q=NOT_TAKEN, state=None, state_name="initial_state", check_finite=False, lead="B, T, H"
):
    """The one validator. `lead` names the axes before the width: "B, T, H", or "B, H" for one token. Raises ValueError.

    Every call goes through here: nothing is put together that only a message needs, and nothing asked of a tensor twice.
    """
    without, of_k, of_v = LETTERS[lead]
    axes = 4 if lead == "B, T, H" else 3
    shape, V = _check_rows("k", k, of_k, axes), _check_rows("v", v, of_v, axes)[-1]
    dtype, device, tokens = k.dtype, k.device, shape[:-1]
    if dtype not in DTYPES:
        raise ValueError(f"k: expected dtype {' or '.join(map(str, DTYPES))}, given {dtype}")
    full = state_dtype(dtype)
    same, gates = (dtype,), (dtype,) if dtype == full else (dtype, full)
    if q is not NOT_TAKEN:
        _check_tensor("q", q, of_k, shape, same, device)
    _check_tensor("v", v, of_v, (*tokens, V), same, device)
    _check_tensor("beta", beta, without, tokens, gates, device)
    _check_tensor("g", g, without, tokens, gates, device)
    if state is not None:
        _check_tensor(state_name, state, "[B, H, K, V]", (shape[0], *shape[-2:], V), (full,), device)
    if erase not in ERASE_RULES:
        raise ValueError(f"erase = {erase!r}: choose one of {', '.join(map(repr, ERASE_RULES))}")
    # Reading a value waits for the device, so on a GPU values are checked on request only.
    if (check_finite or g.is_cpu) and _any(g.detach() > 0):
        raise ValueError(f"g: expected log-decays of at most 0, given {g.max().item():g}")
    if check_finite:
        for name, x in (("q", q), ("k", k), ("v", v), ("beta", beta), (state_name, state)):
            if isinstance(x, torch.Tensor) and _any(~x.detach().isfinite()):
                raise ValueError(f"{name}: expected finite values, given {_count_bad(~x.detach().isfinite())}")
        if _any(g.detach().isnan()):  # -inf is a log-decay: everything is forgotten
            raise ValueError(f"g: expected values from -inf to 0, given {_count_bad(g.detach().isnan())}")


def _count_bad(bad):
    return f"{bad.sum().item()} of {bad.numel()} NaN or infinite"


# ------------------------------------------------------------------------------------------------ choice of implementation

IMPLS = {"reference": _ReferenceMemory, "torch": _ChunkedMemory, "triton": _TritonMemory}


@functools.cache
def _properties(device):
    return torch.cuda.get_device_properties(device)


def triton_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the workbook's Triton kernels cannot run for `dtype` on `device`; None where they can."""
    if dtype == torch.float64:
        return "the Triton kernels take float32, bfloat16 and float16, no float64"
    if not HAS_TRITON:
        return "Triton is not installed: `pip install triton` (Linux only)"
    if INTERPRETED and device.type in ("cpu", "cuda"):
        wrong = dtype == torch.bfloat16
        return "Triton's interpreter computes bfloat16 wrongly: take float32 or float16" if wrong else None
    if device.type != "cuda":
        interpreter = "; TRITON_INTERPRET=1, set before Python starts, runs them in Triton's interpreter, slowly"
        able = device.type == "cpu" and dtype != torch.bfloat16
        return f"the Triton kernels need an NVIDIA GPU{interpreter if able else ''}"
    try:
        # Dynamo looks at no cache.
        gpu = torch.cuda.get_device_properties(device) if torch.compiler.is_compiling() else _properties(device)
    except (RuntimeError, AssertionError) as error:
        return f"PyTorch sees no such GPU ({str(error).splitlines()[0]})"
    if torch.version.cuda is None or gpu.major < 8:
        name = "an AMD GPU" if torch.version.cuda is None else f"sm_{gpu.major}{gpu.minor}"
        return f"the Triton kernels need an NVIDIA GPU of sm_80 or newer, and this is {name}"
    return None


def _choose(impl, device, dtype):
    """The implementation that runs for `impl`, and why. ValueError for one that cannot run: a named one never falls back."""
    if impl == "auto":
        if device.type != "cuda":
            return "torch", f"auto on {device.type}: the chunked PyTorch path, which runs on every device"
        problem = triton_problem(device, dtype)
        if problem is None:
            return "triton", "auto on cuda: the Triton kernels"
        return "torch", f"auto on cuda: the chunked PyTorch path, because {problem}"
    if impl not in IMPLS:
        raise ValueError(f"impl = {impl!r}: choose one of 'auto', {', '.join(map(repr, IMPLS))}")
    problem = triton_problem(device, dtype) if impl == "triton" else None
    if problem is not None:
        raise ValueError(f"impl = 'triton' with {dtype} on {device.type}: {problem}. 'torch' and 'auto' run everywhere")
    return impl, "named"


def explain_impl(impl: str = "auto", *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """One line: which implementation `impl` means for inputs of `dtype` on `device`, and why.

    ValueError, as from `delta_rule` itself, for an implementation that is unknown or cannot run there, and for another dtype than
    its own four.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype}: expected {' or '.join(map(str, DTYPES))}")
    name, why = _choose(impl, torch.device(device), dtype)
    return f"{name} ({why})"


# ------------------------------------------------------------------------------------------------ public functions


def _check_chunk_size(chunk_size):
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size!r}: expected an integer of at least 1")


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float = 1.0,
    initial_state: torch.Tensor | None = None,
    erase: str = "decayed",
    normalize_qk: bool = False,
    chunk_size: int = 64,
    impl: str = "auto",
    check_finite: bool = False,
) -> DeltaOutput:
    """Write every token into the memory and read it with the token's own query.

        S_t = e^g_t S_{t-1} + k_t (beta_t (v_t - k_t^T (e^g_t S_{t-1})))^T          o_t = scale * S_t^T q_t

    Args:
        q, k: queries and keys `[B, T, H, K]`, used as they are unless `normalize_qk`. K <= 256, T >= 1.
        v: values `[B, T, H, V]`, V <= 256. q, k and v share a dtype: float32, bfloat16, float16 or float64.
        beta: write strengths `[B, T, H]`, in the dtype of k or in float32. With unit keys, 0 writes nothing and 1 replaces.
            Mind the order: other libraries take g before beta.
        g: log-decays `[B, T, H]`, <= 0, in the dtype of k or in float32. 0 keeps everything, -inf forgets everything.
        scale: factor on what is read.
        initial_state: state before the first token, `[B, H, K, V]`, float32 (float64 for float64 inputs); None: empty.
        erase: "decayed" recalls from the decayed state, as above; "raw" recalls k_t^T S_{t-1} instead.
        normalize_qk: bring q and k to unit length first: x rsqrt(sum_K x^2 + 1e-6), in the dtype of the state.
        chunk_size: tokens that impl="torch" works on in parallel; changes speed and rounding only. "triton" chooses its own.
        impl: "reference" | "torch" | "triton" | "auto" (see `explain_impl`). A named one that cannot run raises.
        check_finite: also refuse NaN and infinite inputs. g > 0 is refused always on a CPU; on a GPU, where reading a value waits
            for the device, with this option only.

    Returns:
        DeltaOutput(out, state): `out [B, T, H, V]` in the dtype of v; `state [B, H, K, V]` after the last token, float32 (float64
        for float64 inputs). Gradients flow from both to every tensor argument.

    Raises:
        ValueError: naming the argument, what was expected and what was given.

    torch.compile with fullgraph=True goes through; the kernels' plan follows from T, so every new length compiles once more, and
    after `torch._dynamo.config.recompile_limit` of them no more: pad to a few lengths.

    All arithmetic is in the dtype of the state, also under autocast. impl="triton" multiplies 16-bit inputs in float16 and adds
    up in float32, so entries and products of queries and keys have to stay below 65,504 (values and gradients may have any size);
    float32 inputs it multiplies as `torch.set_float32_matmul_precision` says. Sources: see the module.
    """
    _validate(q=q, k=k, v=v, beta=beta, g=g, state=initial_state, erase=erase, check_finite=check_finite)
    _check_scale(scale)
    _check_chunk_size(chunk_size)
    _check_flag("normalize_qk", normalize_qk)
    name, _ = _choose(impl, k.device, k.dtype)
    scale, raw = float(scale), erase == "raw"
    if name == "triton":
        import kernel_ops

        written = kernel_ops.write(
            q, k, v, beta, g, initial_state, scale=scale, raw=raw, norm_q=normalize_qk, norm_k=normalize_qk
        )
        return DeltaOutput(written.out, written.state)
    with chunked.full_precision(k.device):
        if name == "torch" and not torch.is_grad_enabled():
            q, k = (_unit(q), _unit(k)) if normalize_qk else (q, k)
            chunk = min(chunk_size, k.shape[1])
            return DeltaOutput(*chunked.both(q, k, v, beta, g, initial_state, scale, chunk, raw))
        memory = IMPLS[name](k, v, beta, g, initial_state, raw, normalize_qk, chunk_size)
        return DeltaOutput(memory._read(q, scale, normalize_qk), memory.state)


def delta_write(
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor,
    *,
    q: torch.Tensor | None = None,
    scale: float = 1.0,
    initial_state: torch.Tensor | None = None,
    erase: str = "decayed",
    normalize_k: bool = False,
    normalize_q: bool = False,
    chunk_size: int = 64,
    impl: str = "auto",
    check_finite: bool = False,
) -> Memory:
    """The write half of `delta_rule`, for a memory that is read more than once or by several layers.

    Arguments and errors are those of `delta_rule`; `delta_write(k, v, beta, g).read(q, scale)` is its `out`. Queries that are at
    hand when the memory is written can come along as `q`: what they read is `Memory.out`, and on a GPU one kernel does both.
    `normalize_k` and `normalize_q` are `normalize_qk` of `delta_rule`, one by one.
    """
    given = {} if q is None else dict(q=q)
    _validate(k=k, v=v, beta=beta, g=g, state=initial_state, erase=erase, check_finite=check_finite, **given)
    _check_scale(scale)
    _check_chunk_size(chunk_size)
    _check_flag("normalize_k", normalize_k)
    _check_flag("normalize_q", normalize_q)
    name, _ = _choose(impl, k.device, k.dtype)
    scale, raw = float(scale), erase == "raw"
    if name == "triton":
        return _TritonMemory(k, v, beta, g, initial_state, raw, normalize_k, q, scale, normalize_q)
    with chunked.full_precision(k.device):
        memory = IMPLS[name](k, v, beta, g, initial_state, raw, normalize_k, chunk_size)
        if q is not None:
            memory.out = memory._read(q, scale, normalize_q)
        return memory


def delta_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor,
    *,
    scale: float = 1.0,
    erase: str = "decayed",
    normalize_qk: bool = False,
    check_finite: bool = False,
) -> DeltaOutput:
    """One token of `delta_rule`, for generation: time and memory do not grow with what came before.

    q, k `[B, H, K]`, v `[B, H, V]`, beta, g `[B, H]`, `state [B, H, K, V]` as `delta_rule` returns it. Returns
    DeltaOutput(out `[B, H, V]` in the dtype of v, the next state); the given state is left as it is. Options and errors are those
    of `delta_rule`. Where `explain_impl` says triton and no gradient is wanted, one kernel does it all.
    """
    if not isinstance(state, torch.Tensor):
        raise ValueError(f"state: expected a tensor [B, H, K, V], given {type(state).__name__}")
    options = dict(state=state, state_name="state", erase=erase, check_finite=check_finite, lead="B, H")
    _validate(q=q, k=k, v=v, beta=beta, g=g, **options)
    _check_scale(scale)
    _check_flag("normalize_qk", normalize_qk)
    scale, raw, dtype = float(scale), erase == "raw", state_dtype(k.dtype)
    if _choose("auto", k.device, k.dtype)[0] == "triton":
        import kernel_ops

        if not kernel_ops.wants_gradients(q, k, v, beta, g, state):
            options = dict(scale=scale, raw=raw, norm_q=normalize_qk, norm_k=normalize_qk)
            return DeltaOutput(*kernel_ops.step(q, k, v, beta, g, state, **options))
    with chunked.full_precision(k.device):
        q_, k_ = (_unit(x) if normalize_qk else x.to(dtype) for x in (q, k))
        v_, beta_, g_ = (x.to(dtype) for x in (v, beta, g))
        out, S = _step(q_, k_, v_, beta_, g_, state, scale, raw)
        return DeltaOutput(out.to(v.dtype), S)
