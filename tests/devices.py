# SPDX-License-Identifier: Apache-2.0
"""The devices a test body runs on: always the CPU, and CUDA where there is one; where not, the test says so."""

from __future__ import annotations

import pytest
import torch

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT TESTED HERE: no CUDA device"),
        ],
    ),
]
