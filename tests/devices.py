# SPDX-License-Identifier: Apache-2.0
"""The devices a test body runs on: always the CPU, and CUDA where there is one; where not, each module says so once."""

from __future__ import annotations

import pytest
import torch

_HAS_CUDA = torch.cuda.is_available()

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if _HAS_CUDA else [])]


@pytest.mark.gpu
def test_all_of_this_module_ran_on_cuda_too() -> None:
    """Imported by modules over `DEVICES`: their one skip, in place of one a test body."""
    if not _HAS_CUDA:
        pytest.skip("NOT TESTED HERE: no CUDA device; every test of this module ran on the CPU alone")
