"""Training on another device: nothing is left behind on the CPU, and what comes out is what the CPU gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import elsewhere
from tests.processes import cases_of, largest_difference, run_case

DEVICES = [
    elsewhere.NAME,
    pytest.param("cuda:0", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cpu")
    for case in cases_of(1):
        run_case(case, folder)
    elsewhere.run_atlas(folder, "cpu")
    return folder


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_on_another_device_has_the_losses_of_one_on_the_cpu(on_cpu: Path, tmp_path: Path, device: str) -> None:
    """Every sparsity, remedy, start, encoder and kind, both stages, and a whole run with a language model."""
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.elsewhere", str(tmp_path), device]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in (*(case.name for case in cases_of(1)), elsewhere.ATLAS):
        differences = largest_difference(on_cpu, tmp_path, name)
        assert differences.pop("fvu") < 2e-3, name
        assert max(differences.values()) < 0.1, (
            name,
            differences,
        )  # one token more or less fires, where all begin at 0
    whole, resumed = (sorted(folder.rglob("layer_*.safetensors")) for folder in broken(tmp_path))
    assert whole and [path.read_bytes() for path in whole] == [path.read_bytes() for path in resumed]


def broken(folder: Path) -> tuple[Path, Path]:
    """Folders of a run without a break, and with one."""
    name = cases_of(1)[0].name
    return folder / name, folder / elsewhere.RESUMED / name


@pytest.mark.parametrize("mistake", ["two devices", "generator"])
def test_the_pretended_device_refuses_what_a_gpu_refuses(mistake: str) -> None:
    """So that the law above can fail."""
    lines = {
        "two devices": "torch.ones(2, device=device) + torch.ones(2)",
        "generator": "torch.randn(2, device=device, generator=torch.Generator())",
    }
    script = (
        "import torch\nfrom tests.elsewhere import pretended\n"
        f"with pretended() as device:\n    torch.ones(2, device=device) + 1\n    {lines[mistake]}\n"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "on pretended" in done.stderr.splitlines()[-1]
