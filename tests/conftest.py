"""What every test runs under: no network, no window, two threads, property tests that repeat exactly.

`pytest -m gpu --record=results/gpu_tests.jsonl` keeps what came out, and where: CI has no GPU.
"""

import datetime
import os
import pathlib

# Before any test module imports torch, matplotlib or the Hugging Face libraries, which read these once.
os.environ.setdefault("OMP_NUM_THREADS", "2")  # more threads slow these sizes down; child processes inherit it
os.environ["HF_HUB_OFFLINE"] = "1"  # a hub call without network takes half a minute to fail
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ["WORKBOOK_PROFILE"] = "smoke"

import hypothesis
import pytest
import torch

# "repeatable" draws the same examples on every machine; `pytest --hypothesis-profile explore` draws new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption("--record", metavar="FILE", help="append the outcome of this run, as a line of JSON")


def pytest_configure(config):
    if config.getoption("--record") and not torch.cuda.is_available():
        raise pytest.UsageError("--record keeps what a GPU showed, and there is none here; nothing was run or recorded")


def pytest_terminal_summary(terminalreporter, config):
    path = config.getoption("--record")
    if not path or hasattr(config, "workerinput"):  # pytest-xdist's workers have a part of it only
        return
    import runs

    found = {kind: terminalreporter.stats.get(kind, []) for kind in ("passed", "failed", "error", "skipped")}
    counts = {kind: len(reports) for kind, reports in found.items()}
    skipped = sorted({str(r.longrepr[-1]) for r in found["skipped"] if isinstance(r.longrepr, tuple)})
    line = dict(date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    line |= dict(
        revision=runs.git_revision(), code=runs.code_hash(), device=runs.device_name(), **runs.versions(), **counts
    )
    line |= dict(not_passed=[r.nodeid for r in found["failed"] + found["error"]], why_skipped=skipped)
    runs.record(line, pathlib.Path(config.invocation_params.dir, path))


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
