"""Run the notebooks without a browser and write them as HTML pages that open offline: what `make report` calls.

    python report.py                     every notebooks/NN_*.ipynb, in the profile that suits the machine
    python report.py 00 02               those two
    python report.py --profile full      on a GPU
    python report.py --profile full --save   the same, then put the outputs into notebooks/ where all of them passed

The notebooks themselves stay as they are unless --save is given. Each one runs in the interpreter that runs this file,
whatever Jupyter kernels are registered on the machine. Exit status: 0 when every cell of every notebook ran, 1 when one
did not, 2 for a wrong argument.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import platform
import signal
import sys
import time
import traceback
from pathlib import Path

import nbformat
import zmq
from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tqdm import tqdm
from traitlets import default

import config
import report_html

ROOT = Path(__file__).resolve().parent
PATTERN = "[0-9][0-9]_*.ipynb"


@dataclasses.dataclass(frozen=True)
class Result:
    """How one notebook went. `error` is empty when every cell ran, else one line naming the cell and what it raised."""

    name: str
    title: str
    error: str
    seconds: float
    notebook: nbformat.NotebookNode


# ------------------------------------------------------------------------------------------------ choosing


def choose_profile(name: str | None = None) -> str:
    """The profile to run in: `name`, else what WORKBOOK_PROFILE says, else full where torch sees CUDA, else smoke."""
    if name is not None:
        return name
    if "WORKBOOK_PROFILE" in os.environ:
        return config.profile()
    import torch  # seconds to import: not for a wrong argument

    return "full" if torch.cuda.is_available() else "smoke"


def find_notebooks(folder: Path, names: list[str]) -> list[Path]:
    """The notebooks of `folder` in order; with `names`, those whose file name starts with one of them.

    ValueError when the folder holds none, or when a name fits none.
    """
    found = sorted(folder.glob(PATTERN))
    if not found:
        raise ValueError(f"notebooks: no file named like NN_topic.ipynb in {folder}")
    stems = {name: [p for p in found if p.name.startswith(Path(name).name)] for name in names}
    for name, matches in stems.items():
        if not matches:
            raise ValueError(f"notebooks: {name!r} fits none of {', '.join(p.stem for p in found)}")
    return [p for p in found if not names or any(p in matches for matches in stems.values())]


def kernel_env(profile: str, folder: Path = ROOT / "notebooks") -> dict[str, str]:
    """Environment of a kernel that starts in `folder`: the profile, and the modules of the workbook on its path.

    Texts and tokenizers named by a path from here are named from `folder` instead, still without saying where that is.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "WORKBOOK_PROFILE": profile, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    env["WORKBOOK_HEADLESS"] = "1"  # nobody watches: live curves draw once, at their end
    env.pop("MPLBACKEND", None)  # a leftover Agg would keep the figures out of the page
    for name in ("WORKBOOK_CORPUS", "WORKBOOK_TOKENIZER"):
        if name in env and Path(env[name]).exists():
            env[name] = os.path.relpath(Path(env[name]).resolve(), folder.resolve())
    return env


# ------------------------------------------------------------------------------------------------ running


class OwnInterpreter(KernelSpecManager):
    """Answers every kernel name with the interpreter that runs this file.

    Jupyter looks names up in the user's folders as well, where `python3` may be any other environment.
    """

    def get_kernel_spec(self, kernel_name):
        return self.kernel_spec_class(resource_dir=RESOURCES, **get_kernel_dict())


class OwnKernelManager(AsyncKernelManager):
    @default("kernel_spec_manager")
    def _own_interpreter(self):
        return OwnInterpreter(parent=self)

    @default("transport_encryption")
    def _encrypted(self):  # other users of a shared machine can read local ports
        return "auto" if zmq.has("curve") else "disabled"

    def client(self, **options):
        client = super().client(**options)
        # Of 1,000 messages that wait, ZeroMQ drops the next, be it the one that says a cell has ended: a run would wait forever.
        client.context.rcvhwm = 0
        return client


class Client(NotebookClient):
    """Forgets a widget once it is closed, as a browser does, so that a finished bar leaves nothing on the page."""

    def handle_comm_msg(self, outs, msg, cell_index):
        super().handle_comm_msg(outs, msg, cell_index)
        if msg["msg_type"] == "comm_close":
            self.widget_state.pop(msg["content"]["comm_id"], None)


def run_notebook(path: Path, profile: str) -> Result:
    """Execute a copy of the notebook at `path`, in its own folder, up to its end or to the first cell that fails."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)  # an earlier run's outputs must not pass for this one's
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    start = time.perf_counter()
    cells = sum(cell.cell_type == "code" and bool(cell.source.strip()) for cell in notebook.cells)
    with tqdm(total=cells, desc=path.stem, unit="cell", file=sys.stdout, dynamic_ncols=True) as bar:
        error = asyncio.run(_execute(notebook, path.parent, profile, bar))
    report_html.freeze_widgets(notebook)
    return Result(path.stem, report_html.title(notebook, path.stem), error, time.perf_counter() - start, notebook)


async def _execute(notebook, folder: Path, profile: str, bar: tqdm) -> str:
    """Run the cells, moving `bar` along. Returns the error as one line, or an empty string."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    current, stopped = None, False

    def stop():
        nonlocal stopped
        stopped = True
        task.cancel()

    def on_start(**_):  # nbclient's own handler makes Ctrl-C look like a crash of this notebook alone
        loop.add_signal_handler(signal.SIGINT, stop)

    def on_cell(cell, cell_index):
        nonlocal current
        current = cell_index

    client = Client(
        notebook,
        kernel_manager_class=OwnKernelManager,
        kernel_name="python3",
        timeout=None,  # a full run may train for hours in one cell
        iopub_timeout=600,  # seconds after a cell's end for its last outputs: nbclient's 4 lose some on a busy machine
        raise_on_iopub_timeout=True,
        record_timing=False,
        coalesce_streams=True,  # keep the last state of a text bar, not every one
        resources={"metadata": {"path": str(folder)}},
        on_notebook_start=on_start,
        on_cell_execute=on_cell,
        on_cell_executed=lambda **_: bar.update(),
    )

    async def tick():  # a training cell can take a minute: let the clock of the bar show that it lives
        while True:
            await asyncio.sleep(1)
            bar.refresh()

    ticking = asyncio.create_task(tick()) if sys.stdout.isatty() else None
    try:
        await client.async_execute(env=kernel_env(profile, folder))
        return ""
    except CellExecutionError as error:  # the cell holds the traceback already
        what = f"{error.ename}: {error.evalue}"
    except (Exception, asyncio.CancelledError) as error:
        if stopped:
            raise KeyboardInterrupt from None
        # The kernel died or never started: put what is known where the traceback would be.
        what = f"{type(error).__name__}: {error}"
        lines = traceback.format_exception_only(error)
        if current is not None:
            output = nbformat.v4.new_output(
                "error", ename=type(error).__name__, evalue=str(error), traceback=[line.rstrip() for line in lines]
            )
            notebook.cells[current].outputs.append(output)
    finally:
        if ticking:
            ticking.cancel()
        client.set_widgets_metadata()  # nbclient does so only after the last cell
    code = [index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    where = "kernel start" if current is None else f"code cell {code.index(current) + 1} of {len(code)}"
    return f"{where}: {what.strip().splitlines()[0]}"


# ------------------------------------------------------------------------------------------------ the command


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, run, write the pages; returns the exit status."""
    parser = argparse.ArgumentParser(description="Run the notebooks and write them as HTML pages that open offline.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="notebooks to run, such as 00 or 02_hybrid_niah")
    parser.add_argument("--profile", choices=config.PROFILES, help="default: full where torch sees a GPU, else smoke")
    parser.add_argument("--notebooks", type=Path, default=ROOT / "notebooks", help="folder that holds the notebooks")
    parser.add_argument("--out", type=Path, default=ROOT / "reports", help="folder for the pages and executed copies")
    parser.add_argument("--save", action="store_true", help="put the outputs into the notebooks (full profile only)")
    options = parser.parse_args(arguments)
    try:
        profile = choose_profile(options.profile)
        paths = find_notebooks(options.notebooks, options.names)
    except ValueError as error:
        parser.error(str(error))
    if options.save and profile != "full":
        parser.error(f"--save: the profile is {profile!r}; only the outputs of the full profile are kept in notebooks/")

    count = f"{len(paths)} notebook{'s' * (len(paths) != 1)}"
    print(f"profile {profile}, {count}, Python {platform.python_version()} at {sys.executable}", flush=True)
    start = time.perf_counter()
    import runs  # and torch with it

    made = f"Revision {runs.git_revision()}, {runs.device_name()}, {time.strftime('%Y-%m-%d %H:%M')}."
    options.out.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    for path in paths:
        try:
            result = run_notebook(path, profile)
        except KeyboardInterrupt:
            print(f"\nstopped in {path.stem}; the pages of the notebooks before it are in {options.out}")
            return 130
        results.append(result)
        nbformat.write(result.notebook, options.out / path.name)
        page = report_html.notebook_page(result.notebook, name=result.name, folder=path.parent)
        (options.out / f"{path.stem}.html").write_text(page, encoding="utf-8")
        rows = [(r.name, r.title, r.error, r.seconds) for r in results]
        index = options.out / "index.html"
        index.write_text(report_html.index_page(rows, profile=profile, made=made), encoding="utf-8")
        if result.error:
            print(f"FAILED {result.name}: {result.error}", flush=True)

    failed = [r.name for r in results if r.error]
    if options.save and not failed:
        for path, result in zip(paths, results, strict=True):
            nbformat.write(result.notebook, path)
    seconds = time.perf_counter() - start
    print(f"\n{len(results) - len(failed)} of {count} ran to the end in {seconds:.0f} s (profile {profile})")
    print(f"report: {index.resolve()}")
    if failed:
        print(f"FAILED: {', '.join(failed)}; the pages show the tracebacks", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
