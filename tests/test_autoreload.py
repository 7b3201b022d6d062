"""Edit and rerun: every module survives an edit under IPython's own autoreload, as the notebooks use it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import core

ROOT = Path(core.__file__).parent
# Modules that need a GPU's packages to be imported at all, and those that only Triton's absence leaves out.
MODULES = sorted(
    path.stem
    for path in ROOT.glob("*.py")
    if core.HAS_TRITON or not re.search(r"^import triton$", path.read_text(), re.MULTILINE)
)
SESSION = """
import os, sys, time
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()


def run(line):
    result = shell.run_cell(line)
    if not result.success:
        sys.exit(f"failed: {line}")


modules = sys.argv[1:]
run("%load_ext autoreload\\n%autoreload complete")
run("import " + ", ".join(modules))
run("kept = core.delta_rule, model.build(config.HybridConfig(d_model=16, n_heads=2, head_dim=8, value_dim=8, vocab_size=32))")
for step, name in enumerate(modules, 1):
    with open(name + ".py", "a") as file:
        file.write("\\nEDITED = True\\n")
    os.utime(name + ".py", (time.time() + step,) * 2)
    run("1")
    run(f"assert {name}.EDITED")
run("rows = torch.randint(32, (2, 9))" if "torch" in shell.user_ns else "import torch; rows = torch.randint(32, (2, 9))")
run("kept[1](rows, rows).loss.backward()")
run("model.build(kept[1].cfg)(rows, rows).loss.backward()")
print("all of them")
"""


def test_every_module_can_be_edited_in_a_notebook(tmp_path):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "session").write_text(SESSION)
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "MPLBACKEND": "agg",
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }
    if core.HAS_TRITON:  # the kernels import without a GPU in Triton's interpreter alone
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "session", *MODULES],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = done.stdout + done.stderr
    assert "Failed to reload" not in said and "Error" not in said, said[-3000:]
    assert done.returncode == 0 and "all of them" in done.stdout, said[-3000:]
