"""kernels.py: that its numbers are right, and that every kernel compiles for every GPU we name within its shared memory.

Without a GPU the numbers come from Triton's interpreter, in a process of its own (kernel_child.py, where the cases and the bounds
are), and the binaries from Triton's compiler, which needs none.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import inspect
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
import types
from pathlib import Path
from typing import NamedTuple

import kernel_child as child
import pytest
import torch
from kernel_child import Case

import core

needs_triton = pytest.mark.skipif(not core.HAS_TRITON, reason="Triton is not installed here: it exists for Linux only")

# ------------------------------------------------------------------------------------------------ in the interpreter


@pytest.fixture(scope="module")
def interpreted():
    """What kernel_child.py found in every case, by label."""
    lines = map(json.loads, child.run_in_interpreter(child.__file__))
    return {line["case"]: line for line in lines}


def test_fences():
    """The instrument itself: what is allocated in a backward pass is poisoned too, and a write past an end is seen."""

    class Allocates(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.new_empty(3)

        @staticmethod
        def backward(ctx, grad):
            return torch.empty_like(grad)

    x = torch.zeros(3, requires_grad=True)
    with child.Fenced() as fenced:
        y = Allocates.apply(x)
        (d_x,) = torch.autograd.grad(y, x, torch.ones(3))
        z = fenced.place(torch.arange(6.0).view(3, 2).t())
    assert y.isnan().all() and d_x.isnan().all() and torch.equal(z, torch.tensor([[0.0, 2, 4], [1, 3, 5]]))
    assert z.is_contiguous() and torch.equal(torch.empty(0), torch.zeros(0)) and not fenced.breached()
    z.as_strided((7,), (1,), z.storage_offset())[6] = 0.0
    assert fenced.breached() == 1


@needs_triton
@pytest.mark.parametrize("label", [child.label(*name) for name in child.names()])
def test_in_the_interpreter(interpreted, label):
    assert not interpreted[label]["wrong"], "\n".join(interpreted[label]["wrong"])


# ------------------------------------------------------------------------------------------------ compiled ahead of time

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that one block of threads may use, by architecture
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


class Launched(NamedTuple):
    """One launch as Triton's compiler sees it."""

    kernel: object  # triton.JITFunction
    signature: tuple[tuple[str, str], ...]  # type of every argument
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[int, ...]  # arguments that are multiples of 16
    options: tuple[tuple[str, int], ...]  # num_warps ...


class Recorder:
    """Stands in for a kernel: `recorder[grid](...)` notes what would be compiled, by the rules of Triton's own launch."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches, self.arg_names = kernel, launches, kernel.arg_names

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **options):
        values = dict(zip(self.kernel.arg_names, args, strict=False))
        values |= {name: options.pop(name) for name in list(options) if name in self.kernel.arg_names}
        signature, constants, divisible = {}, {}, []
        for n, parameter in enumerate(self.kernel.params):
            name, x = parameter.name, values[parameter.name]
            free = not parameter.do_not_specialize
            if parameter.is_constexpr or x is None or (free and isinstance(x, int) and x == 1):
                signature[name], constants[name] = "constexpr", x
            elif isinstance(x, torch.Tensor):
                signature[name] = POINTERS[x.dtype]
                divisible.append(n)
            elif isinstance(x, int):
                signature[name] = "i32" if abs(x) < 2**31 else "i64"
                if free and x % 16 == 0:
                    divisible.append(n)
            else:
                signature[name] = "fp32"
        parts = (signature.items(), constants.items(), divisible, options.items())
        self.launches.append(Launched(self.kernel, *map(tuple, parts)))


def kernels_by_name(*more):
    """Every function that Triton compiles of kernels.py, the modules that it imports and `more`: {(module, name): function}."""
    import triton

    import kernels

    modules = [kernels, *(x for x in vars(kernels).values() if isinstance(x, types.ModuleType)), *more]
    ours = [m for m in modules if m.__name__.startswith("kernels")]
    return {(m, n): x for m in ours for n, x in vars(m).items() if isinstance(x, triton.JITFunction)}


class OnGPU(torch.overrides.TorchFunctionMode):
    """Tensors without memory pass for tensors of `cuda:<arch>`."""

    def __init__(self, arch):
        super().__init__()
        self.device = torch.device("cuda", arch)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function == torch.Tensor.device.__get__:
            return self.device
        if function == torch.Tensor.is_cuda.__get__:
            return True
        if function == torch.Tensor.data_ptr:
            return 8  # launches on aligned memory are kept for the next call
        kwargs = kwargs or {}
        return function(*args, **(kwargs | dict(device="meta") if "device" in kwargs else kwargs))


@contextlib.contextmanager
def recorded(arch, *more):
    """The launches of all kernels inside, those of the modules `more` among them, in place of running them."""
    gpu = types.SimpleNamespace(
        name=f"sm_{arch}", major=arch // 10, minor=arch % 10, multi_processor_count=MULTIPROCESSORS[arch],
        shared_memory_per_block_optin=SHARED[arch] * 1024, shared_memory_per_multiprocessor=(SHARED[arch] + 1) * 1024,
    )  # fmt: skip
    launches = []
    with pytest.MonkeyPatch.context() as patch, OnGPU(arch):
        patch.setattr(torch.cuda, "get_device_properties", lambda device=None: gpu)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (gpu.major, gpu.minor))
        patch.setattr(torch.cuda, "current_device", lambda: arch)
        for (module, name), kernel in kernels_by_name(*more).items():
            patch.setattr(module, name, Recorder(kernel, launches))
        yield launches


def launches(arch, K, V, dtype, *, T=2048, H=8, raw=False, norm=False, start=True, later=True):
    """Every kernel of a write with queries, of a later read, of both backward passes and of one token."""
    import kernels

    with recorded(arch) as found:
        new = lambda *shape, dtype=dtype: torch.empty(*shape, dtype=dtype, device="meta")  # noqa: E731
        x = dict(q=new(1, T, H, K), k=new(1, T, H, K), v=new(1, T, H, V), beta=new(1, T, H), g=new(1, T, H))
        state = new(1, H, K, V, dtype=torch.float32)
        x |= dict(S0=state if start else None, d_out=x["v"], d_state=state, d_new_v=None, d_states=None, state=state)

        def call(name, **more):
            function = getattr(kernels, name)
            options = dict(scale=0.5, raw=raw, norm_q=norm, norm_k=norm, **more)
            wanted = inspect.signature(function).parameters
            return function(
                *(x[n] for n in wanted if n not in options), **{n: options[n] for n in wanted if n in options}
            )

        x |= call("write", saves=True, readable=later)._asdict()
        if later:
            call("read")
            *_, x["d_new_v"], x["d_states"] = call("read_backward")
        call("write_backward")
        x |= dict(q=new(1, H, K), k=new(1, H, K), v=new(1, H, V), beta=new(1, H), g=new(1, H))
        call("step")
    return list(dict.fromkeys(found))


def test_what_is_compiled_along_is_what_follows():
    """The kernels of a training step, of one read and of later ones, are all known once the write has compiled its own."""
    if not core.HAS_TRITON:
        pytest.skip("Triton is not installed here: it exists for Linux only")
    import kernels
    import kernels_launch

    settings = itertools.product(
        ((64, 128), (128, 128), (256, 40)),
        (torch.bfloat16, torch.float32),
        (5, 300, 2049, 40_000),
        (90, 86),
        (False, True),
    )
    for (K, V), dtype, T, arch, readable in settings:
        with recorded(arch) as found:
            new = lambda *shape, dtype=dtype: torch.empty(*shape, dtype=dtype, device="meta")  # noqa: E731
            q, k, v, beta, g = new(2, T, 3, K), new(2, T, 3, K), new(2, T, 3, V), new(2, T, 3), new(2, T, 3)
            options = dict(scale=0.5, norm_q=True, norm_k=False)
            written = kernels.write(q, k, v, beta, g, None, raw=False, saves=True, readable=True, **options)
            del found[:]
            later = (None, None)
            if readable:
                kernels.read(q, k, *written[2:3], *written[4:6], written.new_v, **options)
                *_, d_new_v, d_states = kernels.read_backward(
                    q, k, g, *written[2:3], *written[4:6], written.new_v, v, **options
                )
                later = d_new_v, d_states
            kernels.write_backward(q, k, v, beta, g, None, *written[2:7], v, None, *later, raw=False, **options)
            needed = {(x.kernel.__name__, *x[1:]) for x in found}
            del found[:]
            tensors = q, k, v, beta, g, None, *written[2:7], written.new_v if readable else None
            with kernels_launch.gathered() as gathered:
                kernels._what_follows(*tensors, raw=False, saves=True, readable=readable, **options)
            assert not found
            for kernel, programs, args, more in gathered:
                kernel[(programs,)](*args, **more)
            assert len(needed) > 2 and needed == {(x.kernel.__name__, *x[1:]) for x in found}


def compiled(launched, arch, *, binary=True):
    """What Triton's compiler says of a launch on an architecture; not `binary`: without ptxas, which takes most of the time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    position = launched.kernel.arg_names.index
    source = ASTSource(
        launched.kernel,
        dict(launched.signature),
        constexprs={(position(name),): x for name, x in launched.constants},
        attrs={(n,): [["tt.divisibility", 16]] for n in launched.divisible},
    )

    def skip_assembly(*stages_of):
        if not stages_of:
            return "no assembly", "no assembly"  # a part of the cache's key

        def ptx(module, metadata):
            metadata["name"] = launched.kernel.__name__
            return ""

        stages_of[1].update(ptx=ptx, cubin=lambda module, metadata: b"")

    with pytest.MonkeyPatch.context() as patch:
        if not binary:
            patch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", skip_assembly)
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launched.options))


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Triton's compiler with an empty cache."""
    if not core.HAS_TRITON:
        pytest.skip("Triton is not installed here: it exists for Linux only")
    if core.INTERPRETED:
        pytest.skip("this process runs kernels in Triton's interpreter, so it cannot compile them")
    import triton

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))


def disassembled(cubin):
    """Instructions of a binary, by the disassembler that comes with Triton."""
    from triton.backends.nvidia import compiler

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(compiler.__file__).with_name("bin") / "nvdisasm"
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(.*?) ?;", text, re.MULTILINE)


def lost_addresses(instructions):
    """Those that take the stack pointer, R1, for a value: ptxas 12.8 (Triton 3.6 and 3.7.1) puts it where it lost the address of
    a tile in shared memory, for products of Hopper; they then read anywhere."""
    taken = (re.sub(r"\[R1\b[^]]*\]", "", x) for x in instructions if not re.match(r"(@!?U?P\w+ )?\S+ R1,", x))
    return [x for x in taken if re.search(r"\bR1\b", x)]


def check_fits(arch, found, *, binary=True):
    problems = []
    for launched in found:
        kernel = compiled(launched, arch, binary=binary)
        used, limit = kernel.metadata.shared, SHARED[arch] * 1024
        if used > limit:
            problems.append(f"{launched.kernel.__name__}: {used:,} bytes of shared memory, sm_{arch} has {limit:,}")
        if getattr(kernel.metadata, "tmem_size", 0) > 512:
            problems.append(f"{launched.kernel.__name__}: {kernel.metadata.tmem_size} columns of tensor memory of 512")
        if binary and kernel.asm["cubin"][:4] != b"\x7fELF":
            problems.append(f"{launched.kernel.__name__}: no binary")
        if binary and arch == 90 and "wgmma" in kernel.asm["ptx"]:
            lost = lost_addresses(disassembled(kernel.asm["cubin"]))
            problems += [f"{launched.kernel.__name__}: the stack pointer as a value: {x}" for x in lost[:1]]
    assert not problems, "\n".join(problems)


def used_kernels(found):
    return {launched.kernel.__name__ for launched in found}


def test_every_kernel_is_among_the_launches(compiler):
    """One that `launches` does not reach would be compiled nowhere below. A kernel asks for its number, a helper does not."""
    starts = {x.__name__ for x in kernels_by_name().values() if "tl.program_id" in inspect.getsource(x.fn)}
    found = used_kernels(launches(90, 64, 128, torch.bfloat16)) | used_kernels(launches(90, 128, 128, torch.bfloat16))
    assert len(found) > 5 and found == starts


@pytest.fixture
def waiting(monkeypatch):
    """Launches of a first call, as on a GPU, and a kernel that is compiled by `compile` and finished by `finish`."""
    if not core.HAS_TRITON:
        pytest.skip("Triton is not installed here: it exists for Linux only")
    import triton.runtime._async_compile as mode

    import kernels_launch

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    launched = []

    def first_call(compile, finish=lambda kernel: None, then=None):
        class Kernel:
            device_caches, arg_names = {0: "what Triton keeps, errors too"}, ()

            def warmup(self, grid):
                return mode.active_mode.get().submit("key", compile, finish)

            def __getitem__(self, grid):
                assert mode.active_mode.get() is None
                return lambda: launched.append(dict(self.device_caches)) or stand_in()

        run, before = kernels_launch.Launches(("test",), (torch.zeros(1),), together=True), len(launched)
        run.compiled, run.device = {}, 0
        run(Kernel(), 1, (), (), dict)
        assert len(launched) == before
        run.finish(then)

    return types.SimpleNamespace(first_call=first_call, launched=launched, mode=mode.active_mode)


def stand_in():
    return types.SimpleNamespace(run=len, function=None, packed_metadata=None)


def test_a_failed_compilation_is_tried_again(waiting):
    waiting.first_call(stand_in)
    assert waiting.launched == [{0: "what Triton keeps, errors too"}]

    def full():
        raise OSError("no space left on device")

    waiting.first_call(full)  # the launch, which is a stand-in here, would compile again
    assert waiting.launched[1:] == [{}]


def test_a_kernel_that_cannot_be_loaded_is_tried_again(waiting):
    class Unloadable:
        @property
        def run(self):
            raise RuntimeError("out of memory")

    waiting.first_call(Unloadable)
    assert waiting.launched == [{}]


def test_what_is_compiled_along_never_fails_a_call(waiting):
    """Neither what gathers it nor its compilation: the call it is meant for will say what is wrong."""
    import kernels_launch

    def no_memory():
        raise torch.OutOfMemoryError("no memory")

    waiting.first_call(stand_in, then=no_memory)

    def not_compiling():
        class Later:
            device_caches, arg_names = {0: "later"}, ()

            def warmup(self, grid):
                return waiting.mode.get().submit("another key", no_memory, lambda kernel: None)

        kernels_launch.Launches(("later",), (torch.zeros(1),))(Later(), 1, (), (), dict)

    waiting.first_call(stand_in, then=not_compiling)
    assert waiting.launched == [{0: "what Triton keeps, errors too"}] * 2


def test_an_interrupted_compilation_leaves_nothing_behind(waiting):
    def interrupted(kernel):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        waiting.first_call(stand_in, interrupted)
    assert waiting.mode.get() is None and not waiting.launched
    waiting.first_call(stand_in)
    assert len(waiting.launched) == 1


def test_lost_addresses_are_seen():
    """As ptxas of Triton 3.6 left one in `read_gradients`, among what it may do with the stack pointer."""
    fine = [
        "VIADD R1, R1, 0xffffffd0",
        "STL.64 [R1+0x20], R232",
        "@!P3 LDL.LU.64 R232, [R1]",
        "IADD3 R5, P1, R10, R11, RZ",
    ]
    assert lost_addresses(fine) == []
    assert lost_addresses([*fine, "IADD3 R5, P1, R1, 0x2, RZ"]) == ["IADD3 R5, P1, R1, 0x2, RZ"]


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles(compiler, arch):
    """To binaries, in bfloat16 at the model's widths; options that add code differ between architectures."""
    options = {80: dict(raw=True, norm=True), 90: {}, 100: dict(norm=True)}[arch]
    check_fits(arch, launches(arch, 64, 128, torch.bfloat16, **options))
    if arch == 90:  # of one block only
        check_fits(arch, launches(arch, 64, 128, torch.bfloat16, T=60, start=False, later=False))


@pytest.mark.parametrize("T", [2048, 1])
def test_compiles_for_float32(compiler, T):
    check_fits(90, launches(90, 32, 32, torch.float32, T=T, later=False))


# Where shared memory is scarcest, or the tensor memory of sm_100, and what runs for keys wider than 64 alone: architecture, K, V,
# dtype, and the kernels that hold the most.
SCARCE = (
    (86, 64, 128, torch.bfloat16, None),
    (86, 256, 256, torch.float32, ("walk", "walk_back")),
    (80, 128, 128, torch.bfloat16, ("walk_back", "gradients_wide")),
    (90, 128, 128, torch.bfloat16, ("gradients_wide",)),
    (100, 128, 128, torch.bfloat16, ("gradients_wide",)),
    (90, 256, 256, torch.bfloat16, ("scan",)),
    (100, 256, 256, torch.float32, ("walk_back",)),
)


@pytest.mark.parametrize("arch, K, V, dtype, names", SCARCE)
def test_fits_shared_memory(compiler, arch, K, V, dtype, names):
    found = [x for x in launches(arch, K, V, dtype) if names is None or x.kernel.__name__ in names]
    assert used_kernels(found) >= set(names or ())
    check_fits(arch, found, binary=False)


def problems_of(arch, K, V, dtype):
    """`check_fits` in a process of its own: a line, empty where all is well."""
    import triton

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.cache, "dir", folder)
        try:
            for T in (2048, 1) if arch == 90 else (2048,):  # binaries too, where addresses may be lost in them
                check_fits(arch, launches(arch, K, V, dtype, T=T), binary=arch == 90)
        except AssertionError as error:
            return f"K {K}, V {V}, {dtype}: {error}"
    return ""


@pytest.mark.gpu  # for the many cores of such a machine, and its version of Triton
def test_fits_shared_memory_everywhere(compiler):
    """Every kernel at every width we name on every architecture we name, and no address lost: minutes on sixteen cores."""
    widths = ((16, 256), (64, 128), (100, 50), (128, 128), (256, 16), (256, 256))
    jobs = itertools.product(SHARED, widths, (torch.bfloat16, torch.float32))
    jobs = [(arch, K, V, dtype) for arch, (K, V), dtype in jobs]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        problems = [p for p in pool.map(problems_of, *zip(*jobs, strict=True)) if p]
    assert not problems, "\n".join(problems)


# ------------------------------------------------------------------------------------------------ on a GPU

LENGTHS = (1, 63, 64, 65, 500, 512, 2049)
WIDTHS = {
    torch.bfloat16: (
        (16, 16),
        (16, 256),
        (50, 100),
        (64, 128),
        (100, 50),
        (128, 64),
        (128, 128),
        (256, 16),
        (256, 256),
    ),
    torch.float16: ((50, 100), (64, 128), (128, 128)),
    torch.float32: ((16, 16), (50, 100), (64, 128), (128, 128), (256, 256)),
}
GATES = {  # what a gate lets through of e^-60 is beyond 16-bit operands
    "slow decay": Case((), decay=1e-3),
    "decay": Case((), decay=0.1),
    "fast decay": Case((), decay=4.0, noise=("d_initial_state",)),
    "no decay": Case((), child.fill_gates(0.0)),
    "shut gates": Case((), child.shut_some, noise=("d_initial_state",)),
    "nearly parallel keys": Case((), child.correlate, magnified=2.0),
}


@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialised memory holds NaN, and matrix products of float32 are exact."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    assert torch.empty(1000, device="cuda").isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(precision)


def on_a_gpu(case, dtype):
    """Errors and what is wrong, against the chunked path in float64, which test_core.py holds to the reference."""
    x = child.inputs(case, dtype, "cuda")
    given = child.results(case, x, "triton")
    exact = child.results(case, {name: y.double() for name, y in x.items()}, "torch")
    errors, wrong = child.compare(case, x, given, exact)
    if case.replay:
        plain = child.forward(case, x, "triton")
        wrong += [
            f"{n}: other bits where no gradients are wanted" for n in plain if not torch.equal(plain[n], given[n])
        ]
    return errors, wrong


def report(found):
    """Print the largest error of every result, and fail with all that is wrong."""
    worst = {}
    for label, (errors, _) in found.items():
        for name, error in errors.items():
            worst[name] = max(worst.get(name, (0.0, "")), (error, label))
    for name, (error, label) in sorted(worst.items()):
        print(f"{name:16} {error:.2e}  {label}")
    problems = [f"{label}: {line}" for label, (_, wrong) in found.items() for line in wrong]
    assert not problems, "\n".join(problems)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, K, V", [(dtype, *pair) for dtype, pairs in WIDTHS.items() for pair in pairs])
def test_accuracy(poisoned, dtype, K, V):
    """Every length with every kind of gates."""
    found = {}
    for n, (T, (name, gates)) in enumerate(itertools.product(LENGTHS, GATES.items())):
        case = gates._replace(sizes=(2, T, 3, K, V), scale=(1.0, K**-0.5)[n % 2])
        if T == 1:  # the gradient of one token's decay is one number, a sum over K and V of either sign
            case = case._replace(noise=("d_g",))
        found[f"T {T}, {name}, scale {case.scale:.2g}"] = on_a_gpu(case, dtype)
    report(found)


def enlarged(case):
    """Of several blocks, by widths that divide as evenly as before. The memory has to last longer and does: it decays less."""
    B, T, H, K, V = case.sizes
    K, V = (min(4 * n - n % 2, 256) for n in (K, V))
    return case._replace(
        sizes=(B, 16 * T if T > 1 else 1, H, K, V), decay=case.decay / (16 if T > 1 else 1), tiles=None, groups=None
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", child.CASES)
def test_case(poisoned, name, dtype):
    """The cases of the interpreter with the plan's own tiles, sixteen times as long and four times as wide."""
    case = child.CASES[name]
    if dtype == torch.float32 and dtype not in case.dtypes:
        pytest.skip("about the range of 16-bit numbers")
    report({name: on_a_gpu(enlarged(case), dtype)})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_token(dtype):
    for K, V in WIDTHS[torch.bfloat16]:
        assert not child.step_problems(K, V, dtype, "cuda")


@pytest.mark.gpu
def test_matmul_precision_is_torchs(poisoned):
    """float32 inputs multiply as torch.matmul does: exactly by default, in tf32 where that is allowed."""
    case = Case((1, 100, 2, 64, 64), tiles=None)
    for precision, least, most in (("highest", 0.0, 5e-6), ("high", 2e-5, 5e-3)):
        torch.set_float32_matmul_precision(precision)
        errors, _ = on_a_gpu(case, torch.float32)
        assert least <= errors["out"] <= most and least <= errors["d_k"] <= most, (precision, errors)
