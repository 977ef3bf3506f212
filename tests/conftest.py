import os

import pytest
import torch

pytest_plugins = ["cli_runs", "crash_runs", "report_runs"]  # their fixtures, each for two test files


def pytest_configure(config):
    # Two test processes with two spinning threads each on two cores are many times slower than one thread each.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop("BLN_DEBUG", None)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
