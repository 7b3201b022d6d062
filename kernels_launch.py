"""How the workbook's Triton kernels are launched: what a GPU allows, which launch a kernel gets, and a way past Triton's own
launch once a kernel is compiled. Imported by `kernels` and `kernels_window`, on a GPU.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import functools
import importlib
import sys
from typing import NamedTuple

import torch
import triton
import triton.language as tl

import kernels_pieces

# ------------------------------------------------------------------------------------------------ what a kernel is given

INTERPRETED = triton.knobs.runtime.interpret
# With tiles of 32 columns ptxas 12.8 (Triton 3.6 and 3.7.1) loses addresses of operands of some kernels on Hopper: "A lost
# address" in LOG.md. With those of 16 that `scan` takes it never did; other GPUs have no such operands, or another ptxas.
LEAST = 16 if INTERPRETED else 64


def power_of_two(n: int, least: int = 16) -> int:
    """The least power of two that is no smaller than n and `least`."""
    return max(least, 1 << (n - 1).bit_length())


class Launch(NamedTuple):
    """How one kernel is launched: warps, stages of its loop's software pipeline, registers of a thread at most (0: no limit)."""

    warps: int
    stages: int = 1
    registers: int = 0

    def options(self):
        """As a launch takes them. Stages are an argument of the kernels' loops."""
        options = dict(num_warps=self.warps)
        if self.registers:
            options["maxnreg"] = self.registers
        return options


def operands(x: torch.Tensor) -> tuple[tl.dtype, str, torch.dtype]:
    """Operand dtype of products, their precision, and the dtype such operands are kept in."""
    if x.dtype != torch.float32:
        return tl.float16, "tf32", torch.float16
    return tl.float32, "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32", torch.float32


@functools.cache
def limits(device: torch.device) -> tuple[int, int]:
    """What a plan asks of a device: bytes of shared memory that one program may take, and the major compute capability. Those of
    an H100 for a device that is no GPU."""
    if device.type != "cuda":
        return 232_448, 9
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin, properties.major


# ------------------------------------------------------------------------------------------------ launching

_COMPILED = {}  # {key of a call: {place in it: (function, what launches it compiled, ..., values of its constant arguments)}}


def on_device(launcher):
    """Run a launcher on the device of its keys, the second argument: Triton launches on the current one."""

    @functools.wraps(launcher)
    def run(*args, **options):
        k = args[1]
        if not k.is_cuda or k.device.index == torch.cuda.current_device():
            return launcher(*args, **options)
        with torch.cuda.device(k.device):
            return launcher(*args, **options)

    return run


def _watched():
    """Whether a profiler of Triton's wants to hear of launches: then they go through Triton."""
    hook = triton.knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))  # a chain of hooks in Triton 3.5 and later


def forget():
    """Launch nothing as it was before: called by launchers that a notebook has reloaded, whose constants may be others now."""
    _COMPILED.clear()


def _follow_edits():
    """Build kernels anew where a notebook has reloaded the pieces since: Triton would not look at those again."""
    for name in ("kernels_forward", "kernels_backward", "kernels_window"):
        module = sys.modules.get(name)
        if module is not None and module.BUILT_FROM is not kernels_pieces.REVISION:
            importlib.reload(module)
            forget()


def _built(kernel):
    """Whether a kernel compiled, and with its launcher, for which Triton 3.6 runs a C compiler."""
    try:
        kernel = kernel.result(ignore_errors=True) if hasattr(kernel, "result") else kernel
        return kernel is not None and kernel.run is not None
    except Exception:  # noqa: BLE001 - a load without memory, more shared memory than there is: the launch will say it again
        return False


_gathered = contextvars.ContextVar("_gathered", default=None)


@contextlib.contextmanager
def gathered():
    """A list of the launches inside, which do not run."""
    launches = []
    token = _gathered.set(launches)
    try:
        yield launches
    finally:
        _gathered.reset(token)


class Launches:
    """The kernels of one call, in order. Triton's own launch looks at every argument again, some 60 microseconds each; where
    everything that a compiled kernel depends on is in `key`, the one of the last time is launched as it is.

    `tensors` are the arguments that a caller chose, never None the first: their dtypes, device and alignment are part of the
    key. With `together`, kernels that are not known yet wait for `finish`, which compiles all of them at the same time.
    """

    def __init__(self, key, tensors, *, together=False):
        _follow_edits()
        k, self.count, self.compiled, self.together, self.waiting = tensors[0], 0, None, together, ()
        self.gathered = _gathered.get()
        # Aligned as Triton likes it, and torch allocates.
        if (
            k.is_cuda
            and not INTERPRETED
            and not _watched()
            and not any([x is not None and x.data_ptr() % 16 for x in tensors])
        ):
            device = k.device
            key = (key, device, *[None if x is None else x.dtype for x in tensors])
            self.compiled, self.device = _COMPILED.setdefault(key, {}), device.index
            self.stream = triton.runtime.driver.active.get_current_stream(device.index)

    def __call__(self, function, programs, tensors, numbers, constants):
        """Launch `function` on its tensors, then numbers. `constants` returns those of the compiler and of the launch: called
        only where the kernel may have to be compiled."""
        if self.gathered is not None:
            self.gathered.append((function, programs, (*tensors, *numbers), constants()))
            return
        at, self.count = self.count, self.count + 1
        if self.compiled is not None:
            of, run, kernel, values = self.compiled.get(at, (None,) * 4)
            if of is function and not self.waiting:  # another one where a notebook has reloaded an edited module
                # Addresses instead of tensors: Triton would ask the driver about each.
                run(programs, 1, 1, self.stream, *kernel, *[x.data_ptr() for x in tensors], *numbers, *values)
                return
        self.waiting += ((at, (function, programs, (*tensors, *numbers), constants())),)
        if self.compiled is None or not self.together:
            self._launch_waiting()

    def finish(self, then=None):
        """Compile what waits, all at the same time, and launch it in order. `then` calls what is likely to be called next: its
        kernels are compiled along, so that a first training step waits once."""
        if not self.waiting:
            return
        with gathered() as later:
            if then is not None:
                with contextlib.suppress(Exception):  # those calls will come, and say it themselves
                    then()
        # In a context of its own: Triton stays in the mode of an interrupted compilation.
        contextvars.copy_context().run(self._compile, [*(launch for _, launch in self.waiting), *later])
        self._launch_waiting()

    def _compile(self, launches):
        """All at the same time: Triton compiles outside of Python's lock."""
        with concurrent.futures.ThreadPoolExecutor(initializer=torch.cuda.set_device, initargs=(self.device,)) as pool:
            with triton.AsyncCompileMode(pool, ignore_errors=True):
                kernels = [f.warmup(*args, grid=(programs,), **options) for f, programs, args, options in launches]
            for (function, *_), built in zip(launches, pool.map(_built, kernels), strict=True):
                if not built:  # Triton would raise what went wrong for good; so the launch compiles again, and says it
                    function.device_caches.pop(self.device, None)

    def _launch_waiting(self):
        waiting, self.waiting = self.waiting, ()
        for at, (function, programs, args, options) in waiting:
            kernel = function[(programs,)](*args, **options)
            if self.compiled is not None:
                values = [options[name] for name in function.arg_names[len(args) :]]
                kernel = kernel.run, (kernel.function, kernel.packed_metadata, None, None, None)
                self.compiled[at] = function, *kernel, values


def scratch(like: torch.Tensor, *sizes: int) -> tuple[torch.Tensor, ...]:
    """Float32 tensors of at least these sizes in one allocation, which takes as long as a launch: for what kernels of one call
    hand each other. They begin where they would alone, at multiples of 512 bytes, and fill what is between."""
    sizes = [-(-size // 128) * 128 for size in sizes]
    return like.new_empty(sum(sizes), dtype=torch.float32).split_with_sizes(sizes)
