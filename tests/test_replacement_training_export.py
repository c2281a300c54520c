"""Laws of finished dictionaries on their way to files: the bytes of a set that is whole, from pieces of any size and
any processes, in the memory of a piece; and nothing at all where the disk is full."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from circuits.cli import main
from replacement import formats
from replacement.dictionary import DictionarySet
from replacement.errors import InputError
from replacement.formats import native, tensors
from replacement.formats.tensors import Rows
from replacement.training import Activations, Trainee, plans
from replacement.training.export import export
from replacement.training.parallel import ALONE, Mesh
from tests.processes import Case, Job, spawn
from tests.test_circuits_train import command, place  # noqa: F401 - the fixture of a model and a text
from tests.test_replacement_training import N_LAYERS, ToyMLPs, toy_config, trained

PIECE = 300  # bytes: a few rows of the toy
SPREAD = (
    Case("skip topk", {"kind": "skip_transcoder", "sparsity": "topk"}),
    Case("sae relu", {"kind": "sae", "site": "mlp.hook_in", "sparsity": "relu"}),
    Case("clt batchtopk", {"kind": "clt"}),
    Case("crosscoder jumprelu", {"kind": "crosscoder", "site": "mlp.hook_in", "sparsity": "jumprelu"}),
    Case("causal crosscoder floor", {"kind": "causal_crosscoder", "site": "mlp.hook_out", "floor": 0.2}),
    Case("gated", {"sparsity": "gated"}),
)
WHOLE = (
    Case("switch", {"encoder": "switch", "experts": 4, "kind": "skip_transcoder"}),
    Case("kronecker clt", {"encoder": "kronecker", "kind": "clt"}),
    Case("kronecker floor", {"encoder": "kronecker", "floor": 0.2}),
)
CASES = (*SPREAD, *WHOLE)


def trainee_of(case: Case, mesh: Mesh = ALONE) -> Trainee:
    """Dictionaries with numbers of no meaning in all their tensors, the same however they are spread."""
    config = toy_config(**{"start": "random", **case.settings})
    planned, sample = plans(config, N_LAYERS), ToyMLPs().batch(0)
    state, generator = Trainee(planned, sample, config).state_dict(), torch.Generator().manual_seed(1)
    for name, tensor in state.items():
        tensor += 0.1 * torch.rand(tensor.shape, generator=generator)
        if Trainee.is_spread(name, tensor.ndim):
            state[name] = tensor[mesh.features.rows_of(len(tensor))]
    trainee = Trainee(planned, sample, config, mesh)
    trainee.load_state_dict(state)
    return trainee


def export_case(case: Case, folder: Path, mesh: Mesh = ALONE) -> None:
    """Export a case, in small pieces, into `folder/name`."""
    tensors.PIECE_BYTES = PIECE
    export(trainee_of(case, mesh), folder / case.name, metadata={"seed": 3})


def fail_case(case: Case, folder: Path, mesh: Mesh) -> None:
    """The same with a disk that is full once; each process leaves what it says, and goes on."""
    full = pytest.MonkeyPatch()
    full.setattr(os, "fsync", full_disk)
    try:
        export_case(case, folder, mesh)
    except InputError as error:
        (folder / f"{mesh.world.place}.txt").write_text(str(error), encoding="utf-8")
    full.undo()
    mesh.wait()
    export_case(case, folder, mesh)


def full_disk(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote: `1`, each with all features; `2`, with half of them; `full`, on the second attempt."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "full").mkdir()
    jobs = [Job(case, folder / "1", 1, export_case) for case in WHOLE]
    jobs += [Job(case, folder / "2", 2, export_case) for case in SPREAD]
    spawn([*jobs, Job(SPREAD[0], folder / "full", 2, fail_case)], size=2)
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pieces_give_the_bytes_of_the_whole_set(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainee = trainee_of(case)
    whole = DictionarySet({one.layer: one for one in trainee.dictionaries()}, "run", metadata={"seed": 3})
    formats.save(whole, tmp_path / "whole")
    monkeypatch.setattr(tensors, "PIECE_BYTES", PIECE)
    export(trainee, tmp_path / "run", metadata={"seed": 3})
    assert files_of(tmp_path / "run") == files_of(tmp_path / "whole")
    for one, stored in zip(whole, formats.load(tmp_path / "run"), strict=True):
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, stored.state_dict()[name]), name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_several_processes_write_the_bytes_of_one(
    case: Case, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "PIECE_BYTES", tensors.PIECE_BYTES)  # put back what the case sets
    export_case(case, tmp_path)
    assert files_of(two / ("1" if case in WHOLE else "2") / case.name) == files_of(tmp_path / case.name)


def test_a_disk_that_is_full_stops_all_processes_and_the_next_attempt_goes_on(two: Path) -> None:
    first, second = ((two / "full" / f"{i}.txt").read_text() for i in range(2))
    assert "cannot be written (No space left on device); make room there and run it again" in first
    assert second == "export: the first process could not write the dictionaries; it says why"
    assert files_of(two / "full" / SPREAD[0].name) == files_of(two / "2" / SPREAD[0].name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sparsity", ["jumprelu", "gated", "batchtopk"])
def test_thresholds_keep_all_their_digits(sparsity: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """They decide what fires: float32 from activations of half precision to a set that is stored in half precision."""

    class Half(ToyMLPs):
        def batch(self, index: int) -> Activations:
            return {name: tensor.to(dtype) for name, tensor in super().batch(index).items()}

    trainee = trained(Half(), toy_config(sparsity=sparsity, start="random", tokens=64 * 8))
    own = {name: tensor.dtype for name, tensor in trainee.state_dict().items() if ".sparsity." in name}
    assert own and set(own.values()) == {torch.float32}
    made = DictionarySet({one.layer: one for one in trainee.dictionaries()}, "run")
    formats.save(made, tmp_path, dtype=str(dtype).removeprefix("torch."))
    for coder, one, stored in zip(trainee, made, formats.load(tmp_path), strict=True):
        threshold = stored.activation.threshold
        assert stored.W_enc.dtype == dtype and threshold.dtype == torch.float32
        assert torch.equal(threshold, one.activation.threshold) and (threshold != threshold.to(dtype)).any()
        if sparsity == "jumprelu":
            torch.testing.assert_close(threshold, (coder.sparsity.threshold * coder.encoder().norms).detach())


class _Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that is made, views of what there is already left out."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known, self.bytes = {tensor.untyped_storage().data_ptr() for tensor in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, Tensor) and not made.is_meta:
                storage = made.untyped_storage()
                self.bytes = max(self.bytes, 0 if storage.data_ptr() in self.known else storage.nbytes())
        return out


@pytest.mark.parametrize("case", SPREAD, ids=lambda case: case.name)
def test_an_export_makes_no_tensor_larger_than_a_piece(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside what is trained: a set may be more than the memory of the process that writes it."""
    monkeypatch.setattr(tensors, "PIECE_BYTES", 1024)
    trainee = trainee_of(case._replace(settings={**case.settings, "n_features": 256}))  # 1 KB a vector, 16 KB a matrix
    with _Largest(*trainee.state_dict().values()) as made:
        export(trainee, tmp_path, metadata={})
    assert 0 < made.bytes <= 1024


def test_a_full_disk_at_the_end_of_a_run_leaves_its_checkpoint_and_nothing_half_written(
    place: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line says so; the same command then ends the run, with the bytes of one that had room."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert main(command(place, tmp_path / "roomy", "--tokens", "256")) == 0
    capsys.readouterr()
    out = tmp_path / "run"
    written = []

    def write(file: BinaryIO, of_layer: dict[str, Rows]) -> None:
        written.append(file.name)
        if len(written) == 2:
            file.write(b"half")
            full_disk(file.fileno())
        tensors.write_tensors(file, of_layer)

    with monkeypatch.context() as context:
        context.setattr(native, "write_tensors", write)
        assert main(command(place, out, "--tokens", "256")) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith(f"circuits: error: save({out}): cannot be written (No space left on device); make room")
    assert sorted(path.name for path in out.iterdir()) == ["checkpoints", "log.jsonl", "training.json"]
    left = out / ".layer_0.safetensors.0123456789ab.part"  # a killed process leaves what it was writing
    left.write_bytes(b"half")
    assert main(command(place, out, "--tokens", "256")) == 0
    assert not left.exists()
    layers = {name: data for name, data in files_of(out).items() if name.startswith("layer_")}
    assert len(layers) == 3 and all(files_of(tmp_path / "roomy")[name] == data for name, data in layers.items())
