"""Laws of training in several processes: the losses and dictionaries of one process, whoever began the run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
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
from tests.processes import CASES, FEW, WAYS, Case, Job, cases_of, largest_difference, run_case, spawn
from tests.test_circuits_train import command, place  # noqa: F401 - the fixture of a model and a text
from tests.test_replacement_training import N_LAYERS, ToyMLPs, toy_config

CLOSE = 1e-5


FIRST = FEW[0]


def stopped(steps: int) -> Case:
    """The first case, left after so many steps."""
    return FIRST._replace(stop_after=steps)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases in one process."""
    folder = tmp_path_factory.mktemp("one")
    for case in cases_of(1):
        run_case(case, folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes did: `1` and `2`, few cases with features spread over as many; `again`, a run stopped and gone
    on by the same; `begun`, one that is stopped; `taken`, one that one process began.
    """
    folder = tmp_path_factory.mktemp("two")
    run_case(stopped(5), folder / "taken")
    jobs = [Job(case, folder / str(shards), shards) for shards in (1, 2) for case in cases_of(shards, FEW)]
    jobs += [Job(stopped(5), folder / "again", 1), Job(FIRST, folder / "again", 1)]
    jobs += [Job(stopped(5), folder / "begun", 2), Job(FIRST, folder / "taken", 2)]
    spawn(jobs, size=2)
    return folder


def assert_same_runs(one: Path, other: Path, cases: Sequence[Case]) -> None:
    """Every figure of every step, and every tensor of the dictionaries, but for rounding."""
    for case in cases:
        differences = largest_difference(one, other, case.name)
        assert max(differences.values()) < CLOSE, (case.name, differences)
        for a, b in zip(formats.load(one / case.name), formats.load(other / case.name), strict=True):
            for name, tensor in a.state_dict().items():
                assert (tensor - b.state_dict()[name]).abs().max() < 1e-3 * tensor.abs().max(), (case.name, name)


@pytest.mark.parametrize("shards", [1, 2])
def test_two_processes_have_the_losses_of_one(shards: int, one: Path, two: Path) -> None:
    """Tokens shared, or features spread: the same batches, choices, losses and dictionaries."""
    assert_same_runs(one, two / str(shards), cases_of(shards, FEW))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_any_way_of_sharing_has_the_losses_of_one_process(size: int, one: Path, two: Path, tmp_path: Path) -> None:
    """Every sparsity, remedy for dead features, start and stage in two processes, few of them in four (`python -m
    tests.processes` has all); and what two processes began goes on."""
    ways, cases = [shards for processes, shards in WAYS if processes == size], CASES if size == 2 else FEW
    jobs = [Job(case, tmp_path / str(shards), shards) for shards in ways for case in cases_of(shards, cases)]
    for shards in ways:
        shutil.copytree(two / "begun", tmp_path / f"begun-{shards}")
    spawn([*jobs, *(Job(FIRST, tmp_path / f"begun-{shards}", shards) for shards in ways)], size=size)
    for shards in ways:
        assert_same_runs(one, tmp_path / str(shards), cases_of(shards, cases))
        assert_goes_on(one, tmp_path / f"begun-{shards}", 5)


def test_the_cases_have_dead_features(one: Path) -> None:
    """Else the remedies would not be compared."""
    for case in cases_of(1):
        if case.settings.get("dead", "auxk") != "none" and case.settings.get("sparsity", "batchtopk") == "batchtopk":
            figures = json.loads((one / case.name / "figures.json").read_text())
            assert any(step["dead"] > 0 for step in figures), case.name


def assert_goes_on(one: Path, other: Path, steps: int) -> None:
    """The figures of the steps after `steps` are those of the unbroken run in one process."""
    whole, rest = (json.loads((folder / FIRST.name / "figures.json").read_text()) for folder in (one, other))
    assert len(rest) == len(whole) - steps > 0
    for a, b in zip(whole[steps:], rest, strict=True):
        assert abs(a["loss"] - b["loss"]) < CLOSE


def test_a_run_goes_on_in_another_number_of_processes(one: Path, two: Path, tmp_path: Path) -> None:
    """Two after one, and one after two; only the newest checkpoint is left, and nothing is pickled."""
    parts, file = "checkpoint", "checkpoint.safetensors"
    assert_goes_on(one, two / "taken", 5)
    taken = two / "taken" / FIRST.name
    assert len(list((taken / parts).iterdir())) == 1 and not (taken / file).exists()
    assert {path.suffix for path in (taken / parts).rglob("*") if path.is_file()} == {".safetensors", ".json"}
    shutil.copytree(two / "begun", tmp_path / "begun")
    run_case(FIRST, tmp_path / "begun")
    assert_goes_on(one, tmp_path / "begun", 5)
    assert (tmp_path / "begun" / FIRST.name / file).exists() and not (tmp_path / "begun" / FIRST.name / parts).exists()


def test_a_stopped_run_of_the_same_processes_goes_on_bit_for_bit(two: Path) -> None:
    files = sorted((two / "1" / FIRST.name).glob("layer_*.safetensors"))
    assert files
    for path in files:
        assert path.read_bytes() == (two / "again" / FIRST.name / path.name).read_bytes(), path.name


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kills processes")
def test_a_killed_torchrun_goes_on_in_one_process(place: Path, tmp_path: Path, monkeypatch) -> None:  # noqa: F811
    """The command line under torchrun, killed with SIGKILL; the same command without it ends the run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ("--kind", "clt", "--tokens", "76800", "--json")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    many = [*start, "-m", "circuits", *command(place, killed, *more, "--feature-shards", "2")]
    running = subprocess.Popen(many, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    checkpoint = killed / "checkpoints" / "reconstruction"
    while running.poll() is None and not list(checkpoint.glob("step-*[0-9]")):
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    _kill_all_that_name(killed)  # its workers have sessions of their own, and would write on
    assert not (killed / "config.json").exists(), "the run ended before it could be killed"
    assert main(command(place, whole, *more)) == 0
    assert main(command(place, killed, *more)) == 0
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (whole, killed)]
    assert [r["step"] for r in logs[0]] == [r["step"] for r in logs[1]]
    apart = {a["step"]: abs(a["loss"] - b["loss"]) for a, b in zip(*logs, strict=True)}
    assert max(apart[step] for step in apart if step <= 220) < 1e-3  # it was killed soon after step 200
    # later a rounding that lets one feature fire grows; another batch would change the loss by 0.1
    assert max(apart.values()) < 2e-2


def _kill_all_that_name(folder: Path) -> None:
    def found() -> list[int]:
        each = [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if _mentions(path, str(folder))]
        return [int(pid) for pid in each if int(pid) != os.getpid()]

    while pids := found():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _mentions(path: Path, text: str) -> bool:
    try:
        return text.encode() in path.read_bytes()
    except OSError:
        return False


def test_features_start_alike_however_few_are_drawn() -> None:
    """Some rows of a start equal the same rows of the whole one, also beyond one piece."""
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    for name in ("random", "samples"):

        def rows(own: slice, name: str = name) -> tuple[torch.Tensor, ...]:
            generator = torch.Generator().manual_seed(3)
            return start(name, x, x, prefixes=(9000,), k=4, tied=None, own=own, generator=generator)

        assert all(
            torch.equal(a[4000:5000], b) for a, b in zip(rows(slice(0, 9000)), rows(slice(4000, 5000)), strict=True)
        )
    drawn = torch.randn(9000, 6, generator=torch.Generator().manual_seed(3))
    direction = torch.nn.functional.normalize(drawn, dim=1)
    generator = torch.Generator().manual_seed(3)
    both = torch.cat([x, x], 1)  # a later site is written too
    found = start("random", x, both, prefixes=(9000,), k=4, tied=0.3, own=slice(0, 9000), generator=generator)
    assert torch.equal(found.W_enc, direction)
    assert torch.equal(found.W_dec, 0.3 * direction.repeat(1, 2))


def test_one_process_shares_with_nobody() -> None:
    """Every collective returns what it was given, the very tensor where it can."""
    x, axis = torch.arange(6.0), Axis()
    assert all(f(x) is x for f in (axis.total, axis.average, axis.highest, axis.add, axis.mean, axis.share))
    assert axis.told(x) is x and axis.tokens_of(x) is x and mesh_of(1) is ALONE
    assert axis.largest(x, 2).tolist() == [5.0, 4.0] and axis.rows_of(6) == slice(0, 6)


def test_every_token_of_a_batch_is_seen_by_one_process() -> None:
    """Single tokens, or runs of them, in turn; where each is found is its place among those that a process sees."""
    for size, run in ((2, 1), (3, 1), (2, 5), (4, 3)):
        tokens = torch.arange(2 * size * run)
        axes = [Axis(size=size, place=at, run=run) for at in range(size)]
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
    for encoder in ("switch", "kronecker"):
        config = toy_config(encoder=encoder, start="random")
        with pytest.raises(InputError, match=rf"encoder='{encoder}'\): 2 processes share the features.*feature-shards"):
            Trainee(plans(config, N_LAYERS), source.batch(0), config, Mesh(features=Axis(size=2)))


def test_the_command_line_names_a_missing_torchrun(place: Path, tmp_path: Path, capsys) -> None:  # noqa: F811
    assert main(command(place, tmp_path / "run", "--feature-shards", "2")) == 2
    assert "start it with torchrun --nproc-per-node 2" in capsys.readouterr().err
