"""The committed notebooks: how they are kept, and that every cell still runs in the smoke profile.

Each notebook runs once, here, through nbval in a pytest of its own. A pytest of its own (rather than --nbval-lax on the
main command line) lets this file read the outcome of every cell: nbval lets the cells after a time-out fail
unnoticed (xfail), and a cell that swallows the interrupt of its time-out passes. Both are red here.
"""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))
CELL_TIMEOUT = 240  # seconds; the longest smoke cell trains for about 75 on two cores
MAX_BYTES = 1_500_000

# `!cmd`, `files = !cmd`, `%%bash` and their kin, at the start of a line; `!=` there is Python.
SHELL = re.compile(r"^\s*(?:[\w., ]+=\s*)?(?:!(?!=)|%%?(?:bash|sh|script|system|sx|!)(?!\w))", re.MULTILINE)
FROM_OURS = re.compile(rf"^\s*from\s+(?:{'|'.join(MODULES)})\b[\w.]*\s+import\b", re.MULTILINE)
MACHINE_PATH = re.compile(
    r"(?<![\w.])(?:/(?:root|work|home|tmp|Users|private|mnt|workspace|content)/|[A-Z]:\\\\?Users)"
)


# ------------------------------------------------------------------------------------------------ reading


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def output_text(cell) -> str:
    """All that a cell printed or displayed as text, HTML included, pictures not."""
    parts = []
    for output in cell.outputs:
        if output.output_type == "stream":
            parts.append(output.text)
        elif output.output_type == "error":
            parts += [output.ename, output.evalue, *output.traceback]
        else:
            parts += [str(value) for mime, value in output.data.items() if not mime.startswith("image/")]
    return "\n".join(parts)


def faults(path: Path) -> list[str]:
    """What is wrong with a committed notebook, one line per fault; empty when it is fit to be committed."""
    notebook = nbformat.read(path, as_version=4)
    cells = code_cells(notebook)
    if not cells:
        return ["it has no code cell"]
    found = []
    if path.stat().st_size > MAX_BYTES:
        found.append(f"{path.stat().st_size} bytes: at most {MAX_BYTES}")
    for line in ("%load_ext autoreload", "%autoreload complete"):
        if line not in cells[0].source.splitlines():
            found.append(f"the first code cell lacks the line {line!r}")
    profile = re.findall(r"^profile[ \t]+(\w+)", output_text(cells[-1]), re.MULTILINE)
    if profile != ["full"]:
        found.append(f"the last cell must print one provenance line 'profile full'; it prints {profile}")
    for number, cell in enumerate(cells, start=1):
        if cell.execution_count != number:
            found.append(f"code cell {number} has execution count {cell.execution_count}: run all cells in order")
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"code cell {number} shows an error: {output.ename}: {output.evalue}")
        for pattern, what in ((SHELL, "runs a shell command"), (FROM_OURS, "imports names from a workbook module")):
            match = pattern.search(cell.source)
            if match:
                found.append(f"code cell {number} {what}: {match.group().strip()!r}")
        match = MACHINE_PATH.search(output_text(cell))
        if match:
            found.append(f"the output of code cell {number} holds the path of a machine: {match.group()!r}")
    for number, cell in enumerate(notebook.cells, start=1):
        match = MACHINE_PATH.search(cell.source)
        if match:
            found.append(f"cell {number} holds the path of a machine: {match.group()!r}")
    return found


# ------------------------------------------------------------------------------------------------ running


def run_nbval(path: Path, *, folder: Path, cell_timeout: float) -> list[str]:
    """Run a notebook in the smoke profile; returns one line per cell that did not simply pass, and per cell not run.

    `folder` takes the report of the inner pytest. The kernel is this interpreter, whatever the notebook names.
    """
    report = folder / f"{path.stem}.xml"
    env = {**os.environ, "WORKBOOK_PROFILE": "smoke", "WORKBOOK_HEADLESS": "1", "PYTHONPATH": str(ROOT)}
    env.pop("MPLBACKEND", None)  # the kernel's own backend, which draws into the notebook
    env.pop("PYTEST_ADDOPTS", None)
    flags = ["--nbval-lax", "--nbval-current-env", f"--nbval-cell-timeout={cell_timeout}"]
    quiet = ["-q", "--color=no", "-p", "no:cacheprovider", "-o", "addopts=", "--rootdir", str(path.parent)]
    command = [sys.executable, "-m", "pytest", *flags, *quiet, f"--junitxml={report}", str(path)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    if not report.exists():
        return [f"nbval did not start (exit status {done.returncode}):\n{done.stdout}{done.stderr}"]

    trouble = []
    cases = list(xml.etree.ElementTree.parse(report).getroot().iter("testcase"))
    for case in cases:
        for outcome in case:  # failure, error, or skipped, which is also how an xfail is written
            if outcome.tag in ("failure", "error", "skipped"):
                kind = outcome.get("type") or outcome.tag
                trouble.append(f"{case.get('name')}: {kind}: {outcome.get('message')}\n{outcome.text or ''}")
        if float(case.get("time")) >= cell_timeout:
            trouble.append(f"{case.get('name')}: took {case.get('time')} s, the limit is {cell_timeout}")
    expected = len(code_cells(nbformat.read(path, as_version=4)))
    if len(cases) != expected:
        trouble.append(f"{len(cases)} of {expected} code cells were run")
    if done.returncode != 0 and not trouble:
        trouble.append(f"exit status {done.returncode}:\n{done.stdout}{done.stderr}")
    return trouble


# ------------------------------------------------------------------------------------------------ the real notebooks


def test_there_are_notebooks():
    assert NOTEBOOKS, f"no notebook in {ROOT / 'notebooks'}: nothing was tested"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_fit_to_be_committed(path):
    found = faults(path)
    assert not found, "\n".join([path.name, *found])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_in_the_smoke_profile(path, tmp_path):
    trouble = run_nbval(path, folder=tmp_path, cell_timeout=CELL_TIMEOUT)
    assert not trouble, "\n".join([path.name, *trouble])


# ------------------------------------------------------------------------------------------------ planted faults

FIRST = "%load_ext autoreload\n%autoreload complete\n\nimport config"


def committed(source: str, text: str = "", count: int | None = None):
    """A code cell as it stands in a committed notebook: executed, with `text` as what it printed."""
    outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)] if text else []
    return nbformat.v4.new_code_cell(source, outputs=outputs, execution_count=count)


def write(path: Path, *cells) -> Path:
    """A notebook of these cells between a good first and a good last one, numbered as if run in order."""
    last = committed("print('profile      full')", "profile      full\n")
    notebook = nbformat.v4.new_notebook(cells=[committed(FIRST), *cells, last])
    for number, cell in enumerate(code_cells(notebook), start=1):
        cell.execution_count = cell.execution_count or number
    nbformat.write(notebook, path)
    return path


def test_a_good_notebook_has_no_faults(tmp_path):
    cells = [
        nbformat.v4.new_markdown_cell("# Title\n\nSee https://example.org/home/ and data/home/x."),
        committed("x = 3\nassert (\n    x\n    != 4\n)\nprint(config.HybridConfig())", "HybridConfig(...)\n"),
        committed("import data_tools_of_others as others  # from config import nothing"),
    ]
    assert faults(write(tmp_path / "good.ipynb", *cells)) == []


@pytest.mark.parametrize(
    ("cell", "fault"),
    [
        (committed("x = 1", count=7), "run all cells in order"),
        (committed("!ls"), "shell command"),
        (committed("x = 1\nfiles = !ls"), "shell command"),
        (committed("%%bash\nls"), "shell command"),
        (committed("from config import HybridConfig"), "imports names"),
        (committed("if True:\n    from config import preset"), "imports names"),
        (committed("x = 1", "saved in /home/someone/x\n"), "path of a machine"),
        (committed("open('/tmp/x')"), "path of a machine"),
        (nbformat.v4.new_markdown_cell("look in `/Users/x`"), "path of a machine"),
        (committed("x = 1", "a" * MAX_BYTES), "bytes: at most"),
        (
            nbformat.v4.new_code_cell(
                "1 / 0",
                outputs=[nbformat.v4.new_output("error", ename="ZeroDivisionError", evalue="by zero", traceback=[])],
            ),
            "shows an error: ZeroDivisionError",
        ),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_a_planted_fault_is_found(tmp_path, cell, fault):
    found = faults(write(tmp_path / "bad.ipynb", cell))
    assert len(found) == 1 and fault in found[0]


def test_missing_autoreload_smoke_outputs_and_unrun_cells_are_found(tmp_path):
    path = tmp_path / "bad.ipynb"
    cells = [committed("import config", count=1), committed("show()", "profile      smoke\n")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    found = "\n".join(faults(path))
    assert "lacks the line '%load_ext autoreload'" in found
    assert "lacks the line '%autoreload complete'" in found
    assert "it prints ['smoke']" in found
    assert "code cell 2 has execution count None" in found
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Empty")]), path)
    assert faults(path) == ["it has no code cell"]


def test_nbval_passes_a_good_notebook(tmp_path):
    """In the smoke profile, with this interpreter whatever kernel the notebook names, in the notebook's folder."""
    checks = (
        "import os, sys\n"
        f"assert sys.executable == {sys.executable!r}\n"
        f"assert os.path.samefile(os.getcwd(), {str(tmp_path)!r})\n"
        "assert config.profile() == 'smoke'\n"
    )
    cells = [
        committed(checks, "not compared\n"),
        committed("# NBVAL_CHECK_OUTPUT\nprint(config.HybridConfig())", "HybridConfig(GS, d=512, h=8, K=64, V=128)\n"),
    ]
    path = write(tmp_path / "good.ipynb", *cells)
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata["kernelspec"] = {"name": "no-such-kernel", "display_name": "none", "language": "python"}
    nbformat.write(notebook, path)
    assert run_nbval(path, folder=tmp_path, cell_timeout=60) == []


SLEEP = "import time\ntime.sleep(30)"
SWALLOWED = "import time\ntry:\n    time.sleep(30)\nexcept KeyboardInterrupt:\n    pass"


@pytest.mark.parametrize(
    ("cells", "cell_timeout", "signs"),
    [
        ([committed("1 / 0")], 60, ["Cell 1: failure", "ZeroDivisionError"]),
        ([committed("# NBVAL_CHECK_OUTPUT\nprint(2)", "1\n")], 60, ["Cell 1: failure", "Cell outputs differ"]),
        ([committed("# NBVAL_SKIP\n1 / 0")], 60, ["Cell 1: pytest.skip"]),
        ([committed(SLEEP)], 2, ["Cell 1: failure", "Timeout of 2 seconds"]),
        # Time-outs that nbval by itself lets pass: the cell ends well after the interrupt, the next one "may" fail.
        ([committed(SWALLOWED), committed("1 / 0")], 2, ["Cell 1: took", "Cell 2: pytest.xfail"]),
        ([committed("import os\nos._exit(1)")], 2, ["Cell 1: failure"]),
    ],
    ids=["raises", "output-changed", "skipped", "times-out", "swallows-the-time-out", "kernel-dies"],
)
def test_nbval_is_red_on_a_planted_failure(tmp_path, cells, cell_timeout, signs):
    trouble = "\n".join(run_nbval(write(tmp_path / "bad.ipynb", *cells), folder=tmp_path, cell_timeout=cell_timeout))
    assert all(sign in trouble for sign in signs), trouble
