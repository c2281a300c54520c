"""Laws of stored activations: they are the source's, batch by batch; shards appear whole; a stopped run goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from replacement.errors import InputError
from replacement.training.data import CachedActivations, cache, storage, storage_cost, write_activations
from replacement.training.data.storage import DTYPES

WIDTHS = {"blocks.0.mlp.hook_in": 12, "blocks.0.mlp.hook_out": 5}
SETTINGS = {"model": "toy", "fingerprint": "f", "dtype": "bfloat16"}
EXACT = {**SETTINGS, "dtype": "float32"}


class Toy:
    """Batches of different sizes, some channels and some tokens much larger than others."""

    sites = tuple(WIDTHS)

    def __init__(self, *, stop_at: int = -1, nan_at: int = -1) -> None:
        self.stop_at, self.nan_at = stop_at, nan_at

    def batch(self, index: int) -> dict[str, torch.Tensor]:
        if index == self.stop_at:
            raise KeyboardInterrupt
        generator = torch.Generator().manual_seed(index)
        tokens = 20 + index % 3
        sizes = torch.rand(tokens, 1, generator=generator).exp()
        found = {
            site: sizes * torch.randn(tokens, width, generator=generator) * torch.arange(width) + 3
            for site, width in WIDTHS.items()
        }
        if index == self.nan_at:
            found["blocks.0.mlp.hook_out"][3, 1] = float("nan")
        return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("shard_bytes", [1, 3000, 10**9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_batches_are_the_sources_up_to_rounding(tmp_path: Path, dtype: str, shard_bytes: int):
    """bfloat16 keeps 8 bits; int8 is off by half a step of its token's or channel's largest number / 127."""
    stored = write_activations(Toy(), tmp_path, batches=7, shard_bytes=shard_bytes, **{**SETTINGS, "dtype": dtype})
    assert stored.sites == Toy.sites and stored.n_batches == 7
    assert stored.index.tokens == sum(20 + index % 3 for index in range(7))
    assert stored.index.sites == WIDTHS
    for index in [3, 0, 6, 9]:  # 9: after the last batch comes the first again
        expected, found = Toy().batch(index % 7), stored.batch(index)
        for site in Toy.sites:
            x = expected[site]
            bound = {
                "float32": torch.zeros(()),
                "bfloat16": x.abs() / 2**8,
                "int8_token": x.abs().amax(1, keepdim=True) / 127 * 0.501,
                "int8_channel": x.abs().amax(0, keepdim=True) / 127 * 0.501,
            }[dtype]
            assert found[site].dtype == torch.float32
            assert ((found[site] - x).abs() <= bound).all()
    names = set(files(tmp_path))
    shards = {1: 7, 3000: len(stored.index.shards), 10**9: 1}[shard_bytes]
    assert names == {"index.json", *(f"shard-{number:05d}.safetensors" for number in range(shards))}


def test_some_sites_can_be_read_alone(tmp_path: Path):
    write_activations(Toy(), tmp_path, batches=2, **EXACT)
    one = CachedActivations(tmp_path, sites=Toy.sites[1:])
    assert one.sites == Toy.sites[1:] and set(one.batch(1)) == set(one.sites)
    assert torch.equal(one.batch(1)[Toy.sites[1]], Toy().batch(1)[Toy.sites[1]])
    with pytest.raises(InputError, match=r"has no blocks\.9\.x; it has blocks\.0\.mlp\.hook_in, blocks"):
        CachedActivations(tmp_path, sites=("blocks.9.x",))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cost_of_storage_is_the_fvu_of_what_comes_back(tmp_path: Path, dtype: str):
    stored = write_activations(Toy(), tmp_path, batches=3, **{**SETTINGS, "dtype": dtype})
    assert stored.index.fvu == {cost.site: cost.fvu for cost in storage_cost(Toy(), dtype=dtype, batches=3)}
    for cost in storage_cost(Toy(), dtype=dtype, batches=3):
        x, kept = (torch.cat([s.batch(i)[cost.site] for i in range(3)]).double() for s in (Toy(), stored))
        fvu = (x - kept).square().sum() / (x - x.mean(0)).square().sum()
        assert cost.fvu == pytest.approx(fvu.item(), rel=1e-9, abs=0)
        width = WIDTHS[cost.site]
        scales = {"int8_token": 4, "int8_channel": 3 * 4 * width / len(x)}.get(dtype, 0)
        assert cost.bytes_per_token == pytest.approx({"float32": 4, "bfloat16": 2}.get(dtype, 1) * width + scales)
    assert (cost.fvu == 0) == (dtype == "float32")


def test_zeros_are_stored_as_zeros():
    for dtype in DTYPES:
        zeros = storage.decode(storage.encode(torch.zeros(3, 4), dtype), torch.float32)
        assert torch.equal(zeros, torch.zeros(3, 4))


@pytest.mark.parametrize("stop_at", [0, 1, 5, 8])
def test_a_run_that_is_stopped_goes_on_to_the_same_bytes(tmp_path: Path, stop_at: int):
    settings = {"batches": 9, "shard_bytes": 3000, **SETTINGS}
    write_activations(Toy(), tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        write_activations(Toy(stop_at=stop_at), tmp_path / "stopped", **settings)
    # as a kill leaves it: half a shard, and a shard that no index counts
    (tmp_path / "stopped" / "shard-00007.safetensors").write_bytes(b"whole, but not counted")
    (tmp_path / "stopped" / "shard-00001.part").write_bytes(b"half")
    reports = []
    write_activations(Toy(), tmp_path / "stopped", report=reports.append, **settings)
    assert reports[-1].batches == 9
    (tmp_path / "stopped" / "shard-00007.safetensors").unlink()
    stopped = files(tmp_path / "stopped")
    stopped.pop("shard-00001.part", None)
    assert stopped == files(tmp_path / "whole")
    write_activations(Toy(stop_at=0), tmp_path / "whole", **settings)  # nothing left to do


def test_a_folder_grows_when_more_batches_are_asked_for(tmp_path: Path):
    write_activations(Toy(), tmp_path, batches=3, **EXACT)
    grown = write_activations(Toy(stop_at=0), tmp_path, batches=8, **EXACT)
    for index in range(8):
        assert all(torch.equal(x, grown.batch(index)[site]) for site, x in Toy().batch(index).items())


def test_a_killed_process_leaves_whole_shards_only(tmp_path: Path):
    """SIGKILL at two moments; what is there can be read, and the run goes on."""
    code = f"""
from pathlib import Path
from tests.test_replacement_training_data_cache import EXACT, Toy, write_activations
write_activations(Toy(), Path({str(tmp_path)!r}), batches=4000, shard_bytes=3000, **EXACT)
"""
    root = Path(__file__).parents[1]
    for moment in (0.05, 0.3):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
        while not (tmp_path / "index.json").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moment)
        process.kill()
        process.wait()
        stored = CachedActivations(tmp_path)
        for index in range(stored.n_batches):
            assert torch.equal(stored.batch(index)[Toy.sites[0]], Toy().batch(index)[Toy.sites[0]])


def test_a_full_disk_gets_one_line_and_keeps_whole_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save, calls = cache.save_tensors, []

    def full(tensors: dict, path: Path) -> None:
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(cache, "save_tensors", full)
    message = r"cannot write shard 2 \(No space left on device\); 2 whole shards with 41 tokens are kept, run again"
    with pytest.raises(InputError, match=message):
        write_activations(Toy(), tmp_path, batches=9, shard_bytes=1, **SETTINGS)
    assert set(files(tmp_path)) == {"index.json", "shard-00000.safetensors", "shard-00001.safetensors"}
    assert write_activations(Toy(), tmp_path, batches=9, shard_bytes=1, **SETTINGS).n_batches == 9


def test_two_processes_fill_one_folder_together(tmp_path: Path):
    """One of them writes at a time, the other goes on after it."""
    with ThreadPoolExecutor(4) as pool:
        given = {"shard_bytes": 1, **SETTINGS}
        found = list(pool.map(lambda n: write_activations(Toy(), tmp_path, batches=n, **given), [9, 7, 9, 4]))
    assert all(one.n_batches >= n for one, n in zip(found, [9, 7, 9, 4], strict=True))
    alone = write_activations(Toy(), tmp_path / "alone", batches=9, shard_bytes=1, **SETTINGS)
    assert files(alone.folder) == {name: data for name, data in files(tmp_path).items() if name != "alone"}


def test_an_index_that_appears_while_a_folder_is_looked_at_is_no_strangers(tmp_path: Path, monkeypatch):
    """Another process writes it between two looks: whoever comes next sees it under the lock."""
    write_activations(Toy(), tmp_path, batches=1, **SETTINGS)
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    assert cache.open_cache(Toy(), tmp_path, **SETTINGS).batches == 0


def test_a_shard_of_another_width_is_damaged(tmp_path: Path):
    write_activations(Toy(), tmp_path, batches=1, shard_bytes=1, **SETTINGS)
    path = cache.shard_path(tmp_path, 0)
    save_file({name: tensor[:, 1:].contiguous() for name, tensor in load_file(path).items()}, path)
    with pytest.raises(InputError, match=r"is damaged \(ValueError: .* has not the shape that the index says\)"):
        CachedActivations(tmp_path).batch(0)


def test_activations_that_are_not_finite_are_told_and_the_shards_before_stay(tmp_path: Path):
    with pytest.raises(InputError, match=r"activations of blocks.0.mlp.hook_out, batch 4: are not finite"):
        write_activations(Toy(nan_at=4), tmp_path, batches=9, shard_bytes=1, **SETTINGS)
    assert CachedActivations(tmp_path).n_batches == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float32"}, r"holds other activations \(dtype bfloat16\); pass another folder, or delete it"),
        (
            {"model": "other", "fingerprint": "g"},
            r"\(model toy; fingerprint f, of other weights, texts, rows or seed\)",
        ),
        ({"dtype": "int4"}, r"write_activations\(dtype='int4'\): needs one of bfloat16, float32, int8_token"),
        ({"batches": 0}, "both must be above 0"),
    ],
)
def test_a_folder_is_never_mixed(tmp_path: Path, changes: dict, message: str):
    write_activations(Toy(), tmp_path, batches=2, **SETTINGS)
    with pytest.raises(InputError, match=message):
        write_activations(Toy(), tmp_path, **{"batches": 3, **SETTINGS, **changes})


def test_other_sites_are_refused(tmp_path: Path):
    write_activations(Toy(), tmp_path, batches=2, **SETTINGS)
    other = Toy()
    other.sites = ("blocks.0.mlp.hook_in",)
    with pytest.raises(InputError, match=r"holds other activations \(sites blocks.0.mlp.hook_in, blocks.0.mlp.hook_o"):
        write_activations(other, tmp_path, batches=3, **SETTINGS)


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(InputError, match=r"holds thesis.txt, and no activations; pass a new folder"):
        write_activations(Toy(), tmp_path, batches=2, **SETTINGS)
    assert set(files(tmp_path)) == {"thesis.txt"}


def test_a_damaged_folder_gets_one_line(tmp_path: Path):
    with pytest.raises(InputError, match=r"holds no stored activations \(no index.json\); write them first"):
        CachedActivations(tmp_path)
    write_activations(Toy(), tmp_path, batches=3, shard_bytes=1, **SETTINGS)
    shard = tmp_path / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    with pytest.raises(InputError, match=r"shard-00001.safetensors: is damaged \(.*\); delete the folder"):
        CachedActivations(tmp_path).batch(1)
    shard.write_bytes(whole)
    values = load_file(shard)
    values["blocks.0.mlp.hook_out"][0, 0] = float("nan")
    save_file(values, shard)
    cached = CachedActivations(tmp_path)
    cached.batch(0)
    with pytest.raises(InputError, match=r"shard-00001.safetensors: is damaged \(.*hook_out is not finite\); delete"):
        cached.batch(1)
    shard.unlink()
    with pytest.raises(InputError, match=r"shard-00001.safetensors: is missing"):
        CachedActivations(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    for broken in ("{", "[]", json.dumps({**index, "version": 9}), json.dumps({**index, "shards": [["a"]]})):
        (tmp_path / "index.json").write_text(broken)
        with pytest.raises(InputError, match=r"index.json: cannot be read \(.*\); delete the folder and cache again"):
            CachedActivations(tmp_path)
