"""Shared by all tests: one thread, fixed seeds, and the folder of real data where there is one."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    root = os.environ.get("EMOE_MED_TEST_DATA")
    if not root or not Path(root).is_dir():
        pytest.skip("real scans are not here: set EMOE_MED_TEST_DATA")
    return Path(root)
