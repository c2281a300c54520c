"""Laws of training in several processes: the losses and dictionaries of one process, whoever began the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from circuits.cli import main
from replacement import formats
from replacement.errors import InputError
from replacement.training import Trainee, plans
from replacement.training.parallel import ALONE, Axis, Mesh, mesh_of
from replacement.training.source import Stream
from replacement.training.starts import start
from tests.processes import CASES, FEW, Case, largest_difference, run_case, spawn
from tests.test_circuits_train import command, place  # noqa: F401 - the fixture of a model and a text
from tests.test_replacement_training import N_LAYERS, ToyMLPs, toy_config

CLOSE = 1e-5


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases in one process."""
    folder = tmp_path_factory.mktemp("one")
    for case in CASES:
        run_case(case, folder)
    return folder


def assert_same_runs(one: Path, other: Path, cases: Sequence[Case]) -> None:
    """Every figure of every step, and every tensor of the dictionaries, but for rounding."""
    for case in cases:
        differences = largest_difference(one, other, case)
        assert max(differences.values()) < CLOSE, (case.name, differences)
        for a, b in zip(formats.load(one / case.name), formats.load(other / case.name), strict=True):
            for name, tensor in a.state_dict().items():
                assert (tensor - b.state_dict()[name]).abs().max() < 1e-3 * tensor.abs().max(), (case.name, name)


def test_two_processes_have_the_losses_of_one(one: Path, tmp_path: Path) -> None:
    """Tokens shared, and features spread: the same batches, choices, losses and dictionaries."""
    for shards in (1, 2):
        spawn(FEW, tmp_path / str(shards), size=2, shards=shards)
        assert_same_runs(one, tmp_path / str(shards), FEW)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "shards"), [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_any_way_of_sharing_has_the_losses_of_one_process(size: int, shards: int, one: Path, tmp_path: Path) -> None:
    """Every sparsity, remedy for dead features, start and stage."""
    spawn(CASES, tmp_path, size=size, shards=shards)
    assert_same_runs(one, tmp_path, CASES)


def test_the_cases_have_dead_features(one: Path) -> None:
    """Else the remedies would not be compared."""
    for case in CASES:
        if case.settings.get("dead", "auxk") != "none" and case.settings.get("sparsity", "batchtopk") == "batchtopk":
            figures = json.loads((one / case.name / "figures.json").read_text())
            assert any(step["dead"] > 0 for step in figures), case.name


def stopped(case: Case, steps: int) -> Case:
    return case._replace(stop_after=steps, end_to_end=False)


def assert_goes_on(one: Path, other: Path, case: Case, steps: int) -> None:
    """The figures of the steps after `steps` are those of the unbroken run in one process."""
    whole, rest = (json.loads((folder / case.name / "figures.json").read_text()) for folder in (one, other))
    assert len(rest) == len(whole) - steps
    for a, b in zip(whole[steps:], rest, strict=True):
        assert abs(a["loss"] - b["loss"]) < CLOSE


def test_a_run_of_two_processes_goes_on_in_one_and_back(one: Path, tmp_path: Path) -> None:
    """Checkpoints do not say how many wrote them, and only the newest is left."""
    case, checkpoint = FEW[0], tmp_path / FEW[0].name / "checkpoint"
    spawn([stopped(case, 5)], tmp_path, size=2, shards=2)
    assert {path.suffix for path in checkpoint.rglob("*") if path.is_file()} == {".safetensors", ".json"}
    run_case(stopped(case, 8), tmp_path)
    assert not checkpoint.exists() and checkpoint.with_suffix(".safetensors").exists()
    spawn([case], tmp_path, size=2, shards=2)
    assert len(list(checkpoint.iterdir())) == 1 and not checkpoint.with_suffix(".safetensors").exists()
    assert_goes_on(one, tmp_path, case, 8)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "shards"), [(1, 1), (2, 1), (4, 1), (4, 2), (4, 4)])
def test_a_run_of_two_processes_goes_on_in_any_number(size: int, shards: int, one: Path, tmp_path: Path) -> None:
    case = FEW[0]
    spawn([stopped(case, 5)], tmp_path, size=2, shards=2)
    if size == 1:
        run_case(case, tmp_path)
    else:
        spawn([case], tmp_path, size=size, shards=shards)
    assert_goes_on(one, tmp_path, case, 5)


def test_a_stopped_run_of_the_same_processes_goes_on_bit_for_bit(tmp_path: Path) -> None:
    case, whole, broken = FEW[0], tmp_path / "whole", tmp_path / "broken"
    spawn([case], whole, size=2, shards=1)
    spawn([stopped(case, 5)], broken, size=2, shards=1)
    spawn([case], broken, size=2, shards=1)
    files = sorted((whole / case.name).glob("layer_*.safetensors"))
    assert files
    for path in files:
        assert path.read_bytes() == (broken / case.name / path.name).read_bytes(), path.name


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills processes")
def test_a_killed_torchrun_goes_on_in_one_process(place: Path, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    """The command line under torchrun, killed with SIGKILL; the same command without it ends the run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ("--kind", "clt", "--tokens", "76800", "--json")
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    many = [*start, "-m", "circuits", *command(place, killed, *more, "--feature-shards", "2")]
    running = subprocess.Popen(many, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    checkpoint = killed / "checkpoints" / "reconstruction"
    while running.poll() is None and not list(checkpoint.glob("step-*[0-9]")):
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert not (killed / "config.json").exists(), "the run ended before it could be killed"
    assert main(command(place, whole, *more)) == 0
    assert main(command(place, killed, *more)) == 0
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (whole, killed)]
    assert [r["step"] for r in logs[0]] == [r["step"] for r in logs[1]]
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(*logs, strict=True)) < 1e-3


def test_features_start_alike_however_few_are_drawn() -> None:
    """Some rows of a start equal the same rows of the whole one, also beyond one piece."""
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    for name in ("random", "samples"):

        def rows(own: slice, name: str = name) -> tuple[torch.Tensor, ...]:
            generator = torch.Generator().manual_seed(3)
            return start(name, x, x, prefixes=(9000,), same=False, own=own, generator=generator)

        assert all(
            torch.equal(a[4000:5000], b) for a, b in zip(rows(slice(0, 9000)), rows(slice(4000, 5000)), strict=True)
        )
    drawn = torch.randn(9000, 6, generator=torch.Generator().manual_seed(3))
    direction = torch.nn.functional.normalize(drawn, dim=1)
    generator = torch.Generator().manual_seed(3)
    found = start("random", x, x, prefixes=(9000,), same=True, own=slice(0, 9000), generator=generator)
    assert torch.equal(found.W_enc, direction)


def test_one_process_shares_with_nobody() -> None:
    """Every collective returns what it was given, the very tensor where it can."""
    x, axis = torch.arange(6.0), Axis()
    assert all(f(x) is x for f in (axis.total, axis.average, axis.highest, axis.add, axis.mean, axis.share))
    assert axis.collected(x) is x and axis.tokens_of(x) is x and mesh_of(1) is ALONE
    assert axis.largest(x, 2).tolist() == [5.0, 4.0] and axis.rows_of(6) == slice(0, 6)


def test_every_token_of_a_batch_is_seen_by_one_process() -> None:
    """Single tokens, or runs of them, in turn; where each is found is its place among those that a process sees."""
    for size, run in ((2, 1), (3, 1), (2, 5), (4, 3)):
        tokens = torch.arange(2 * size * run)
        axes = [Axis(size=size, place=place, run=run) for place in range(size)]
        assert torch.stack([axis.sees(tokens) for axis in axes]).sum(0).tolist() == [1] * len(tokens)
        for axis in axes:
            chosen = tokens.flip(0)
            assert torch.equal(tokens[axis.sees(tokens)][axis.tokens_of(chosen)], chosen[axis.sees(chosen)])


def test_what_cannot_be_shared_evenly_is_named() -> None:
    config, source = toy_config(), ToyMLPs()
    with pytest.raises(InputError, match=r"multiple, this run has 1; start it with torchrun --nproc-per-node 2"):
        mesh_of(2)
    with pytest.raises(InputError, match=r"Stream\(batch_tokens=64\): 3 processes share a batch; pass a multiple"):
        Stream(source, buffer_bytes=1, batch_tokens=64, seed=0, mesh=Mesh(data=Axis(size=3)))
    with pytest.raises(InputError, match=r"n_features=64\): 3 processes share the features; pass a multiple"):
        Trainee(plans(config, N_LAYERS), source.batch(0), config, Mesh(features=Axis(size=3)))


def test_the_command_line_names_a_missing_torchrun(place: Path, tmp_path: Path, capsys) -> None:  # noqa: F811
    assert main(command(place, tmp_path / "run", "--feature-shards", "2")) == 2
    assert "start it with torchrun --nproc-per-node 2" in capsys.readouterr().err
