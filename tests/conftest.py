"""What every test runs under: no network, no window, two threads, property tests that repeat exactly."""

import os

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


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
