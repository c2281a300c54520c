"""Tracing, interventions, effects and figures on another device: as on the CPU, and nothing is left behind there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.elsewhere import NAME
from tests.traced_elsewhere import figures

DEVICES = [
    pytest.param(NAME, 1e-6),
    pytest.param("cuda:0", 5e-3, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]
"""Devices, and how far results may be from the CPU's, of the largest: a GPU rounds bfloat16 products otherwise."""


@pytest.mark.slow
@pytest.mark.parametrize(("device", "bound"), DEVICES)
def test_results_do_not_depend_on_the_device(tmp_path: Path, device: str, bound: float) -> None:
    root, out = Path(__file__).resolve().parents[1], tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.traced_elsewhere", str(out), device],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    for name, wanted in figures("cpu"):
        np.testing.assert_allclose(found.pop(name), wanted, rtol=0, atol=bound * np.abs(wanted).max(), err_msg=name)
    assert not found
