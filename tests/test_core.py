"""core.py against its own specification: the token loop in float64."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap

import chunked
import core

# Largest relative error, |x - reference| / |reference| in Euclidean norms, of a result in each dtype.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    # One rounding of the result on the way out: the arithmetic in between is float32.
    torch.float16: torch.finfo(torch.float16).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
}
NAMES = ("q", "k", "v", "beta", "g", "initial_state")
IMPLS = ("reference", "torch")  # those that run everywhere; test_kernels.py and test_kernel_ops.py have the third


def draw(B, T, H, K, V, *, dtype=torch.float64, decay=0.1, seed=0, device="cpu"):
    """q, unit k, v, beta in (0, 1), g in [-decay, 0], initial_state; rounded to `dtype`, the state to its own."""
    gen = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64)  # noqa: E731
    tensors = dict(
        q=normal(B, T, H, K),
        k=F.normalize(normal(B, T, H, K), dim=-1),
        v=normal(B, T, H, V),
        beta=normal(B, T, H).sigmoid(),
        g=-decay * torch.rand(B, T, H, generator=gen, dtype=torch.float64),
        initial_state=normal(B, H, K, V),
    )
    return {
        name: x.to(device, core.state_dtype(dtype) if x.dim() == 4 and name[0] == "i" else dtype)
        for name, x in tensors.items()
    }


def weights(like_out, like_state):
    """Fixed cotangents for out and state, exact in every dtype."""
    gen = torch.Generator().manual_seed(7)
    return [torch.randint(-2, 3, x.shape, generator=gen).to(x.device, x.dtype) for x in (like_out, like_state)]


def run(tensors, **options):
    """out, state and the gradient of every tensor, by name."""
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    out, state = core.delta_rule(**leaves, **options)
    grads = torch.autograd.grad((out, state), list(leaves.values()), weights(out, state))
    return dict(out=out.detach(), state=state.detach(), **{f"d_{n}": x for n, x in zip(leaves, grads, strict=True)})


def in_double(tensors):
    return {name: x.cpu().double() for name, x in tensors.items()}


def check(given, reference, dtype=None):
    """Every result finite and within the tolerance of its dtype (or of `dtype`) of the reference."""
    assert given.keys() == reference.keys()
    for name, x in given.items():
        exact = reference[name].double()
        assert x.shape == exact.shape, name
        assert x.isfinite().all(), name
        error = (x.double().cpu() - exact).norm().item()
        assert error <= TOLERANCE[dtype or x.dtype] * exact.norm().item(), f"{name}: {error:.2e} of {exact.norm():.2e}"


def same(a, b):
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------ the specification


def test_reference_is_the_equation():
    """Against the equation written out for a single head, with outer products and nothing else."""
    x = draw(1, 6, 1, 3, 4)
    for erase in core.ERASE_RULES:
        out, state = core.delta_rule(**x, scale=0.5, erase=erase, impl="reference")
        S = x["initial_state"][0, 0]
        for t in range(6):
            q, k, v, beta, g = (x[name][0, t, 0] for name in NAMES[:5])
            decayed = g.exp() * S
            S = decayed + torch.outer(k, beta * (v - (decayed if erase == "decayed" else S).T @ k))
            torch.testing.assert_close(out[0, t, 0], 0.5 * S.T @ q, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state[0, 0], S, rtol=1e-12, atol=1e-12)


def test_a_unit_key_written_with_strength_one_is_given_back():
    x = draw(1, 1, 1, 5, 3)
    x["beta"] = torch.ones(1, 1, 1, dtype=torch.float64)
    for impl in IMPLS:
        out, _ = core.delta_rule(**(x | {"q": x["k"]}), impl=impl)
        torch.testing.assert_close(out, x["v"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("start", [False, True], ids=["empty", "initial_state"])
@pytest.mark.parametrize("erase", core.ERASE_RULES)
@pytest.mark.parametrize("T", [1, 7, 63, 64, 65, 200])
def test_chunked_equals_reference(T, erase, start):
    for dtype in (torch.float64, torch.float32):
        x = draw(2, T, 3, 5, 7, dtype=dtype, seed=T)
        if not start:
            del x["initial_state"]
        reference = run(in_double(x), erase=erase, scale=0.7, impl="reference")
        check(run(x, erase=erase, scale=0.7, impl="torch"), reference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLS)
def test_half_precision_inputs(dtype, impl):
    x = draw(2, 70, 2, 16, 9, dtype=dtype)
    given = run(x, impl=impl)
    assert {name: y.dtype for name, y in given.items() if y.dtype != dtype} == dict.fromkeys(
        ("state", "d_initial_state"), torch.float32
    )
    check(given, run(in_double(x), impl="reference"))


def test_gates_may_stay_in_float32():
    x = draw(1, 70, 2, 8, 8, dtype=torch.bfloat16)
    x["g"], x["beta"] = draw(1, 70, 2, 8, 8, dtype=torch.float32)["g"], x["beta"].float()
    given = run(x)
    assert given["out"].dtype == torch.bfloat16 and given["d_g"].dtype == given["d_beta"].dtype == torch.float32
    check(given, run(in_double(x), impl="reference"))


@pytest.mark.parametrize("chunk_size", [1, 3, 16, 64, 1000])
def test_any_chunk_size(chunk_size):
    x = draw(1, 100, 2, 6, 5)
    check(run(x, chunk_size=chunk_size), run(x, impl="reference"))


def test_more_chunks_than_one_group_holds(monkeypatch):
    """Groups are an order of work, so bits may differ and results may not."""
    x = draw(2, 200, 2, 5, 7)
    reference = run(x, impl="reference", erase="raw")
    for at_once in (1, 8, 12, 10_000):
        monkeypatch.setattr(chunked, "GROUP_CPU", at_once)
        check(run(x, chunk_size=16, erase="raw"), reference)


@settings(max_examples=40)
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (3, 40, 3, 9, 9))),
    chunk_size=st.integers(1, 50),
    decay=st.sampled_from([0.0, 0.01, 1.0, 30.0]),
    erase=st.sampled_from(core.ERASE_RULES),
    start=st.booleans(),
)
def test_any_shape(sizes, chunk_size, decay, erase, start):
    x = draw(*sizes, decay=decay)
    if not start:
        del x["initial_state"]
    check(run(x, chunk_size=chunk_size, erase=erase), run(x, erase=erase, impl="reference"))


def test_widest_keys_and_values():
    x = draw(1, 66, 1, 256, 256, dtype=torch.float32)
    check(run(x), run(in_double(x), impl="reference"))


# ------------------------------------------------------------------------------------------------ hard numbers


@pytest.mark.parametrize("erase", core.ERASE_RULES)
def test_nearly_parallel_keys(erase):
    """Cosines above 0.9 and full write strength, no decay: powers of L grow to 1e10 here before they cancel."""
    x = draw(1, 512, 2, 32, 16, dtype=torch.float32, decay=0.0)
    x["k"] = F.normalize(x["k"][:, :1] + 0.2 * x["k"], dim=-1)
    assert torch.einsum("bshk,bthk->bhst", x["k"], x["k"]).min() > 0.9
    x["beta"] = torch.ones_like(x["beta"])
    check(run(x, erase=erase), run(in_double(x), erase=erase, impl="reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("erase", core.ERASE_RULES)
def test_strong_decay_everywhere(erase, dtype):
    """e^-50 at every token: quotients of cumulative decays would overflow or divide by zero."""
    x = draw(2, 130, 2, 8, 8, dtype=dtype)
    x["g"] = torch.full_like(x["g"], -50.0)
    reference = run(in_double(x), erase=erase, impl="reference")
    given = run(x, erase=erase)
    assert 0 < reference["d_g"].norm() < 1e-15
    if erase == "raw":
        # What a token erases of the one before does not decay here: two terms of order 1 cancel in d_g, to rounding.
        assert given.pop("d_g").norm() < TOLERANCE[dtype] * reference["d_beta"].norm()
        del reference["d_g"]
    check(given, reference)  # with erase="decayed" d_g is right to so many digits of e^-50


@pytest.mark.parametrize("closed", [-3000.0, -float("inf")])
@pytest.mark.parametrize("erase", core.ERASE_RULES)
def test_closed_gates_among_open_ones(erase, closed):
    """What lies after a closed gate keeps every digit of its slow decay, which running sums beyond 3,000 would round away."""
    for dtype in (torch.float32, torch.float64):
        x = draw(2, 130, 2, 8, 8, dtype=dtype, decay=0.01)
        x["g"][:, [5, 20, 21, 70]] = closed
        given = run(x, erase=erase)
        check(given, run(in_double(x), erase=erase, impl="reference"))
        assert (given["d_g"][:, [5, 20, 21, 70]] == 0).all()


def test_a_closed_gate_forgets_exactly():
    x = draw(1, 9, 1, 4, 4, dtype=torch.float32)
    x["g"][:, 5] = -float("inf")
    other = x | {"initial_state": 1e20 * x["initial_state"]}
    a, b = core.delta_rule(**x), core.delta_rule(**other)
    assert torch.equal(a.out[:, 5:], b.out[:, 5:]) and torch.equal(a.state, b.state)
    assert not torch.equal(a.out[:, :5], b.out[:, :5])


def test_thousands_of_tokens_in_float32():
    x = draw(1, 2048, 1, 16, 16, dtype=torch.float32, decay=0.001)
    check(run(x), run(in_double(x), impl="reference"))


# ------------------------------------------------------------------------------------------------ equivalences


def pieces(x, bounds):
    """The tokens of x cut at `bounds`; the state left out."""
    return [
        {name: y[:, a:b] for name, y in x.items() if name != "initial_state"}
        for a, b in zip([0, *bounds], [*bounds, x["q"].shape[1]], strict=True)
    ]


def segmented(x, bounds, **options):
    """As `run`, from one call per segment that hands its state on."""
    leaves = {name: y.clone().requires_grad_() for name, y in x.items()}
    state, outs = leaves["initial_state"], []
    for piece in pieces(leaves, bounds):
        out, state = core.delta_rule(**piece, initial_state=state, **options)
        outs.append(out)
    out = torch.cat(outs, 1)
    grads = torch.autograd.grad((out, state), list(leaves.values()), weights(out, state))
    return dict(out=out.detach(), state=state.detach(), **{f"d_{n}": y for n, y in zip(leaves, grads, strict=True)})


def test_segmented_equals_whole():
    x = draw(2, 200, 2, 8, 8)
    whole = run(x, chunk_size=16)
    check(segmented(x, [1, 50, 163], chunk_size=16), whole)
    aligned = segmented(x, [32, 160], chunk_size=16)
    check(aligned, whole)
    # Cut between chunks, the same sums are formed in the same order.
    assert torch.equal(aligned["out"], whole["out"]) and torch.equal(aligned["state"], whole["state"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("erase", core.ERASE_RULES)
def test_step_by_step_equals_parallel(erase, dtype):
    x = draw(2, 70, 2, 8, 6, dtype=dtype)
    out, last = core.delta_rule(**x, erase=erase, scale=0.3)
    state, before = x["initial_state"], x["initial_state"].clone()
    steps = []
    for t in range(70):
        token = {name: x[name][:, t] for name in NAMES[:5]}
        o, state = core.delta_step(**token, state=state, erase=erase, scale=0.3)
        steps.append(o)
    check(dict(out=torch.stack(steps, 1)), dict(out=out))
    check(dict(state=state), dict(state=last))
    assert steps[0].dtype == dtype and torch.equal(x["initial_state"], before)


def test_a_sequence_alone_equals_itself_in_a_batch():
    """To tolerance: bit for bit wherever it was tried, but a matrix library owes nobody that."""
    x = draw(5, 150, 2, 8, 6, dtype=torch.float32)

    def everything(x):
        out, state = core.delta_rule(**x)
        return dict(out=out, state=state, **grad(lambda x: loss_of("torch")(*x.values()))(x))

    together = everything(x)
    for b in range(5):
        check(everything({n: y[b : b + 1] for n, y in x.items()}), {n: y[b : b + 1] for n, y in together.items()})


@pytest.mark.parametrize("impl", IMPLS)
def test_the_future_does_not_leak(impl):
    x = draw(2, 100, 2, 8, 6, dtype=torch.float32)
    changed = {name: y.clone() for name, y in x.items()}
    other = draw(2, 100, 2, 8, 6, dtype=torch.float32, seed=1)
    for name in NAMES[:5]:
        changed[name][:, 70:] = other[name][:, 70:]
    a, b = core.delta_rule(**x, impl=impl), core.delta_rule(**changed, impl=impl)
    assert torch.equal(a.out[:, :70], b.out[:, :70])
    assert not (a.out[:, 70:] == b.out[:, 70:]).any(-1).any()


def test_without_a_graph_the_same_bits():
    x = draw(2, 200, 8, 8, 6, dtype=torch.float32)
    with_graph = core.delta_rule(**{name: y.requires_grad_() for name, y in x.items()}, erase="raw", scale=0.3)
    with torch.no_grad():
        without = core.delta_rule(**x, erase="raw", scale=0.3)
    assert with_graph.out.requires_grad and not without.out.requires_grad
    assert torch.equal(with_graph.out, without.out) and torch.equal(with_graph.state, without.state)


def test_strided_inputs_and_no_leak_of_what_lies_between():
    """Views into a buffer of NaN, as slices of one fused projection are: nothing outside the view may be touched."""
    x = draw(2, 75, 2, 5, 7)
    views = {}
    for name, y in x.items():
        buffer = torch.full([n + 3 for n in y.shape], float("nan"), dtype=y.dtype)
        views[name] = buffer[tuple(slice(2, 2 + n) for n in y.shape)]
        views[name].copy_(y)
    a = core.delta_rule(**views)
    assert same(a._asdict(), core.delta_rule(**x)._asdict())


@pytest.mark.parametrize("impl", IMPLS)
def test_queries_that_come_with_the_write(impl):
    x = draw(2, 70, 2, 5, 7, dtype=torch.float32)
    q, state = x.pop("q"), x.pop("initial_state")
    memory = core.delta_write(**x, q=q, scale=0.4, normalize_q=True, initial_state=state, impl=impl)
    assert torch.equal(memory.out, memory.read(q, 0.4, normalize=True))
    assert core.delta_write(**x, impl=impl).out is None
    with pytest.raises(ValueError, match="^q: expected shape"):
        core.delta_write(**x, q=q[:, 1:], impl=impl)


def rows_of_length_one(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("erase", core.ERASE_RULES)
def test_normalised_queries_and_keys(erase, impl):
    """In one call, in a memory, and token by token, as if they had come normalised; gradients through the norm included."""
    x = draw(2, 70, 2, 5, 7)
    x["k"] = 3 * x["k"] + 0.1 * x["q"]
    x["k"][:, 3] = 0  # a key of length 0 stays one
    options = dict(erase=erase, scale=0.7)

    def by_hand(q, k, **others):
        q, k = rows_of_length_one(q), rows_of_length_one(k)
        return core.delta_rule(q, k, **others, **options, impl="reference")

    def at_once(**tensors):
        return core.delta_rule(**tensors, **options, normalize_qk=True, impl=impl)

    def memory(q, k, v, beta, g, initial_state):
        written = core.delta_write(
            k, v, beta, g, initial_state=initial_state, erase=erase, normalize_k=True, chunk_size=16, impl=impl
        )
        return written.read(q, 0.7, normalize=True), written.state

    def steps(initial_state, **tokens):
        state, outs = initial_state, []
        for t in range(70):
            token = {name: y[:, t] for name, y in tokens.items()}
            out, state = core.delta_step(**token, state=state, **options, normalize_qk=True)
            outs.append(out)
        return torch.stack(outs, 1), state

    def everything(function):
        leaves = {name: y.clone().requires_grad_() for name, y in x.items()}
        out, state = function(**leaves)
        grads = torch.autograd.grad((out, state), list(leaves.values()), weights(out, state))
        return dict(out=out.detach(), state=state.detach(), **dict(zip(x, grads, strict=True)))

    expected = everything(by_hand)
    for function in (at_once, memory, steps):
        check(everything(function), expected)
        with torch.no_grad():
            check(dict(zip(("out", "state"), function(**x), strict=True)), {n: expected[n] for n in ("out", "state")})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_norm_is_not_rounded_to_half_precision(dtype, impl):
    x = draw(2, 70, 2, 16, 9, dtype=dtype)
    given = run(x, impl=impl, normalize_qk=True)
    assert given["out"].dtype == given["d_q"].dtype == given["d_k"].dtype == dtype
    check(given, run(in_double(x), impl="reference", normalize_qk=True))
    q = x.pop("q")
    assert core.delta_write(**x, impl=impl, normalize_k=True).read(q, normalize=True).dtype == dtype


# ------------------------------------------------------------------------------------------------ the memory


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("erase", core.ERASE_RULES)
def test_one_write_many_reads(erase, impl):
    """Two layers read one memory. Compared with the states token by token, gradients included."""
    x = draw(2, 75, 2, 5, 7)
    x["second"] = draw(2, 75, 2, 5, 7, seed=1)["q"]

    def through_memory(q, second, k, v, beta, g, initial_state):
        memory = core.delta_write(k, v, beta, g, initial_state=initial_state, erase=erase, chunk_size=16, impl=impl)
        return memory.read(q), memory.read(second, scale=0.4), memory.state

    def by_steps(q, second, k, v, beta, g, initial_state):
        first, other, state = [], [], initial_state
        for t in range(75):
            token = k[:, t], v[:, t], beta[:, t], g[:, t]
            first.append(core.delta_step(q[:, t], *token, state, erase=erase).out)
            o, state = core.delta_step(second[:, t], *token, state, erase=erase, scale=0.4)
            other.append(o)
        return torch.stack(first, 1), torch.stack(other, 1), state

    def everything(function):
        leaves = {name: y.clone().requires_grad_() for name, y in x.items()}
        results = function(**leaves)
        loss = sum((n + 1) * (y * y).sum() for n, y in enumerate(results))
        grads = torch.autograd.grad(loss, list(leaves.values()))
        results = dict(zip(("first", "second", "state"), (y.detach() for y in results), strict=True))
        return results | {f"d_{n}": y for n, y in zip(leaves, grads, strict=True)}

    check(everything(through_memory), everything(by_steps))


def test_a_memory_that_is_never_read_has_gradients():
    x = draw(1, 40, 1, 4, 4)
    del x["q"]
    grads = []
    for impl in IMPLS:
        leaves = {name: y.clone().requires_grad_() for name, y in x.items()}
        state = core.delta_write(**leaves, chunk_size=16, impl=impl).state
        grads.append(dict(zip(x, torch.autograd.grad(state.square().sum(), list(leaves.values())), strict=True)))
    check(*reversed(grads))


def test_a_memory_continues():
    """Chunk by chunk: each memory starts where the one before it ended."""
    x = draw(2, 96, 2, 5, 7)
    whole = core.delta_rule(**x, chunk_size=32)
    state, outs = x["initial_state"], []
    for piece in pieces(x, [32, 64]):
        q = piece.pop("q")
        memory = core.delta_write(**piece, initial_state=state, chunk_size=32)
        outs.append(memory.read(q))
        state = memory.state
    assert torch.equal(torch.cat(outs, 1), whole.out) and torch.equal(state, whole.state)


# ------------------------------------------------------------------------------------------------ gradients, functorch, autocast


@pytest.mark.parametrize("erase", core.ERASE_RULES)
def test_gradcheck(erase):
    x = {name: y.requires_grad_() for name, y in draw(1, 7, 1, 3, 2).items()}
    rule = lambda *args: core.delta_rule(*args[:5], initial_state=args[5], erase=erase, chunk_size=3)  # noqa: E731
    assert torch.autograd.gradcheck(rule, tuple(x[name] for name in NAMES))


def test_a_second_derivative_is_refused():
    x = {name: y.requires_grad_() for name, y in draw(1, 7, 1, 3, 2).items()}
    (first,) = torch.autograd.grad(core.delta_rule(**x).out.sum(), x["k"], create_graph=True)
    with pytest.raises(NotImplementedError, match="reference"):
        torch.autograd.grad(first.sum(), x["k"])


def loss_of(impl):
    def loss(*args):
        out, state = core.delta_rule(*args[:5], initial_state=args[5], chunk_size=16, impl=impl)
        return out.square().sum() + (state**3).sum()

    return loss


@pytest.mark.parametrize("mapped", ["all", *NAMES])
def test_ensembles_with_vmap(mapped):
    """Members with parameters of their own, all inputs or a single one mapped: every member as if alone."""
    members = [draw(2, 37, 2, 5, 7, seed=seed) for seed in range(3)]
    dims = tuple(0 if mapped in ("all", name) else None for name in NAMES)
    stacked = [
        torch.stack([m[n] for m in members]) if d == 0 else members[0][n] for n, d in zip(NAMES, dims, strict=True)
    ]
    every = tuple(range(6))
    given = vmap(grad(loss_of("torch"), argnums=every), in_dims=dims)(*stacked)
    with torch.no_grad():
        losses = vmap(loss_of("torch"), in_dims=dims)(*stacked)
    for e in range(3):
        alone = [y[e] if d == 0 else y for y, d in zip(stacked, dims, strict=True)]
        reference = grad(loss_of("reference"), argnums=every)(*alone)
        check({n: y[e] for n, y in zip(NAMES, given, strict=True)}, dict(zip(NAMES, reference, strict=True)))
        torch.testing.assert_close(losses[e], loss_of("reference")(*alone), rtol=1e-10, atol=0)


def test_gradient_through_vmap():
    """The other order: one shared tensor collects the gradients of all members."""
    members = [draw(2, 37, 2, 5, 7, seed=seed) for seed in range(3)]
    v = torch.stack([m["v"] for m in members])

    def total(impl):
        def loss(k):
            x = members[0]
            call = lambda v: loss_of(impl)(x["q"], k, v, x["beta"], x["g"], x["initial_state"])  # noqa: E731
            return vmap(call)(v).sum() if impl == "torch" else sum(call(one) for one in v)

        return grad(loss)(members[0]["k"])

    check(dict(k=total("torch")), dict(k=total("reference")))


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl):
    x = draw(2, 40, 2, 8, 6, dtype=torch.float32)
    plain = run(x, impl=impl)
    token = {name: x[name][:, 0] for name in NAMES[:5]} | {"state": x["initial_state"]}
    step = core.delta_step(**token)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = core.delta_rule(**x, impl=impl)
        assert torch.equal(out, plain["out"]) and torch.equal(state, plain["state"])
        if impl != "reference":  # whose backward is autograd's own
            assert same(run(x, impl=impl), plain)
        assert same(core.delta_step(**token)._asdict(), step._asdict())


def test_what_is_kept_for_the_backward():
    """No more than the inputs, the written values, a state per chunk and one C x C matrix per chunk."""
    B, T, H, K, V, C = 2, 256, 2, 16, 32, 64
    x = {name: y.requires_grad_() for name, y in draw(B, T, H, K, V, dtype=torch.float32).items()}
    kept = {}

    def pack(y):
        kept[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
        return y

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        result = core.delta_rule(**x)
    N = T // C
    inputs = B * T * H * (2 * K + V + 2)
    bound = 4 * (inputs + B * T * H * V + (N + 1) * B * H * K * V + B * T * H * C)
    assert 0 < sum(kept.values()) <= bound, (sum(kept.values()), bound)
    del result


# ------------------------------------------------------------------------------------------------ bad input


def bad(**changes):
    """Arguments of delta_rule with some replaced; a callable is given the good value."""
    x = draw(2, 6, 3, 4, 5, dtype=torch.float32)
    return x | {name: change(x[name]) if callable(change) else change for name, change in changes.items()}


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(k=lambda x: x[0]), r"^k: .*\[B, T, H, K\].*given \(6, 3, 4\)"),
        (dict(k=[1.0]), r"^k: .*tensor.*given list"),
        (dict(k=lambda x: x[:, :0]), r"^k: .*at least 1, given \(2, 0, 3, 4\)"),
        (dict(k=lambda x: x.repeat(1, 1, 1, 65)), r"^k: .*at most 256, given 260"),
        (dict(v=lambda x: x.repeat(1, 1, 1, 52)), r"^v: .*at most 256, given 260"),
        (dict(k=lambda x: x.long()), r"^k: .*dtype.*float32.*given torch.int64"),
        (dict(q=lambda x: x[..., :3]), r"^q: .*\[B, T, H, K\] = \(2, 6, 3, 4\), given \(2, 6, 3, 3\)"),
        (dict(q=None), r"^q: .*tensor.*given NoneType"),
        (dict(v=lambda x: x[:, :5]), r"^v: .*\[B, T, H, V\] = \(2, 6, 3, 5\), given \(2, 5, 3, 5\)"),
        (dict(v=lambda x: x.bfloat16()), r"^v: .*torch.float32, given torch.bfloat16"),
        (dict(v=lambda x: x.repeat_interleave(2, 2)), r"^v: .*given \(2, 6, 6, 5\); q, k and v have as many heads"),
        (dict(scale=None), r"scale = None: .*K \*\* -0.5"),
        (dict(v=lambda x: x.to("meta")), r"^v: .*device cpu, that of k, given meta"),
        (dict(beta=lambda x: x[..., None]), r"^beta: .*\[B, T, H\] = \(2, 6, 3\), given \(2, 6, 3, 1\)"),
        (dict(beta=lambda x: x.double()), r"^beta: .*torch.float32, given torch.float64"),
        (dict(g=lambda x: x[:1]), r"^g: .*\[B, T, H\] = \(2, 6, 3\), given \(1, 6, 3\)"),
        (dict(g=lambda x: x.half()), r"^g: .*torch.float32, given torch.float16"),
        (dict(g=lambda x: -x), r"^g: .*at most 0, given 0\.0"),
        (dict(initial_state=lambda x: x.mT), r"^initial_state: .*= \(2, 3, 4, 5\), given \(2, 3, 5, 4\)"),
        (dict(initial_state=lambda x: x.double()), r"^initial_state: .*torch.float32, given torch.float64"),
        (dict(erase="none"), r"^erase = 'none': .*'decayed', 'raw'"),
        (dict(scale=float("nan")), r"^scale = nan: .*finite"),
        (dict(scale=True), r"^scale = True"),
        (dict(chunk_size=0), r"^chunk_size = 0: .*at least 1"),
        (dict(chunk_size=8.0), r"^chunk_size = 8.0"),
        (dict(impl="cuda"), r"^impl = 'cuda': .*'reference', 'torch'"),
        (dict(impl="triton"), r"^impl = 'triton' with torch.float32 on cpu: .*'torch' and 'auto'"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        core.delta_rule(**bad(**changes))
    if not {"q", "scale"} & changes.keys():  # delta_write takes neither
        arguments = bad(**changes)
        del arguments["q"]
        with pytest.raises(ValueError, match=message):
            core.delta_write(**arguments)


def test_bad_flags():
    x = bad()
    q, k, v, beta, g, S = x.values()
    for call, name in (
        (lambda: core.delta_rule(**x, normalize_qk=1), "normalize_qk"),
        (lambda: core.delta_write(k, v, beta, g, normalize_k="yes"), "normalize_k"),
        (lambda: core.delta_write(k, v, beta, g).read(q, normalize=None), "normalize"),
        (lambda: core.delta_step(*(y[:, 0] for y in (q, k, v, beta, g)), S, normalize_qk=0), "normalize_qk"),
    ):
        with pytest.raises(ValueError, match=rf"^{name} = .*True or False"):
            call()


@pytest.mark.parametrize("name", NAMES)
def test_not_finite_is_refused_on_request(name):
    x = bad()
    x[name].view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=f"^{name}: .*1 of {x[name].numel()} NaN|^{name}: .*-inf to 0"):
        core.delta_rule(**x, check_finite=True)
    core.delta_rule(**x)


def test_a_closed_gate_is_finite_enough():
    core.delta_rule(**bad(g=lambda x: x - float("inf")), check_finite=True)


def test_bad_arguments_of_a_step():
    x = {name: y[:, 0] for name, y in bad().items() if name != "initial_state"} | {"state": bad()["initial_state"]}
    core.delta_step(**x)
    for changes, message in (
        (dict(k=bad()["k"]), r"^k: .*\[B, H, K\]"),
        (dict(state=x["state"][:1]), r"^state: .*\[B, H, K, V\] = \(2, 3, 4, 5\), given \(1, 3, 4, 5\)"),
        (dict(state=None), r"^state: .*given NoneType"),
        (dict(g=-x["g"]), r"^g: .*at most 0"),
        (dict(erase="no"), r"^erase = 'no'"),
    ):
        with pytest.raises(ValueError, match=message):
            core.delta_step(**(x | changes))


def test_bad_queries_of_a_memory():
    x = bad()
    q = x.pop("q")
    for impl in IMPLS:
        memory = core.delta_write(**x, impl=impl)
        for wrong in (q[:, :3], q.double(), q.to("meta")):
            with pytest.raises(ValueError, match=r"^q: "):
                memory.read(wrong)
        with pytest.raises(ValueError, match=r"^scale"):
            memory.read(q, scale=float("inf"))


def test_explain_impl():
    assert core.explain_impl().startswith("torch (auto on cpu")
    assert core.explain_impl("reference").startswith("reference")
    with pytest.raises(ValueError, match="'triton'.*mps: .*NVIDIA|'triton'.*mps: .*not installed"):
        core.explain_impl("triton", device="mps")
    with pytest.raises(ValueError, match="dtype = torch.int32: expected"):
        core.explain_impl(dtype=torch.int32)


@pytest.mark.parametrize(
    "has_triton, interpreted, capability, device, dtype, reason",
    [
        (True, False, (9, 0), "cuda", torch.bfloat16, None),
        (True, False, (8, 0), "cuda", torch.float32, None),
        (True, False, (7, 5), "cuda", torch.float32, "sm_80 or newer.*sm_75"),
        (True, False, (9, 0), "cuda", torch.float64, "no float64"),
        (False, False, (9, 0), "cuda", torch.float32, "not installed: .*triton"),
        (True, False, (9, 0), "cpu", torch.float32, "TRITON_INTERPRET=1"),
        (True, True, (9, 0), "cpu", torch.float16, None),
        (True, True, (9, 0), "cpu", torch.float64, "no float64"),
        (True, True, (9, 0), "cpu", torch.bfloat16, "computes bfloat16 wrongly"),
        (True, True, (9, 0), "mps", torch.float32, "NVIDIA GPU"),
    ],
)
def test_where_the_kernels_run(monkeypatch, has_triton, interpreted, capability, device, dtype, reason):
    monkeypatch.setattr(core, "HAS_TRITON", has_triton)
    monkeypatch.setattr(core, "INTERPRETED", interpreted)
    gpu = types.SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(core, "_properties", lambda device: gpu)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    auto = core.explain_impl(device=device, dtype=dtype)
    if reason is None:
        assert core.explain_impl("triton", device=device, dtype=dtype) == "triton (named)"
        assert auto.startswith("triton (auto on cuda" if device == "cuda" else "torch (auto on cpu")
    else:
        with pytest.raises(ValueError, match=f"^impl = 'triton' with {dtype} on {device}: .*{reason}.*'torch'"):
            core.explain_impl("triton", device=device, dtype=dtype)
        assert auto.startswith("torch")
        assert device != "cuda" or "because" in auto


# ------------------------------------------------------------------------------------------------ GPU


@pytest.mark.gpu
@pytest.mark.parametrize("erase", core.ERASE_RULES)
def test_on_a_gpu(erase):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = draw(2, 200, 3, 33, 65, dtype=dtype, device="cuda")
        x["g"][:, 70] = -float("inf")
        reference = run(in_double(x), erase=erase, impl="reference")
        check(run(x, erase=erase, impl="torch"), reference)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            check(run(x, erase=erase, impl="torch"), reference)
    assert core.explain_impl(device="cuda", dtype=torch.float64).startswith("torch")
