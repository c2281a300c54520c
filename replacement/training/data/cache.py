"""Activations on disk: written once, in shards that appear whole, and read back batch by batch.

A folder holds `shard-00000.safetensors`, `shard-00001.safetensors`, ... (one tensor a site, and its scales) and
`index.json`, which appears by rename after every shard and names those that count. A stopped run goes on after the last
of them. Batch n of the folder is batch n of the source that it was made from. Knows nothing of models.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from replacement.errors import InputError
from replacement.finite import all_finite
from replacement.formats.tensors import save_tensors
from replacement.training.data.harvest import require_finite
from replacement.training.data.storage import Costs, Stored, decode, encode, require_dtype
from replacement.training.source import Activations, ActivationSource

VERSION = 1
_INDEX, _DRAFT, _LOCK = "index.json", "index.json.part", ".lock"
_SCALE = ":scale"


@dataclass(frozen=True)
class CacheIndex:
    """What a folder of activations holds."""

    sites: dict[str, int]
    """Full hook name -> width."""
    dtype: str
    """How numbers are kept: a name of `replacement.training.data.storage`."""
    model: str
    """Name of the model that they are of."""
    fingerprint: str
    """What they are a function of; a run goes on only where it is the same."""
    shards: tuple[tuple[int, ...], ...] = ()
    """Tokens of each batch, shard by shard."""
    fvu: dict[str, float] = field(default_factory=dict)
    """What keeping them as `dtype` lost at each site, over the first shard: `storage.Costs`."""
    version: int = VERSION

    @property
    def batches(self) -> int:
        """Batches in all shards."""
        return sum(map(len, self.shards))

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(map(sum, self.shards))


def write_activations(
    source: ActivationSource,
    folder: Path,
    *,
    batches: int,
    model: str,
    fingerprint: str,
    dtype: str,
    shard_bytes: int = 128_000_000,
    report: Callable[[CacheIndex], None] | None = None,
) -> CachedActivations:
    """Store the first `batches` batches of a source; goes on after the last whole shard of a folder that has some.

    model: name of the model, stored. fingerprint: what the activations are a function of (`BridgeActivations` has one).
    dtype: `bfloat16`, `float32`, `int8_token` or `int8_channel`; what it costs is measured on the
        first shard, and kept in the index.
    shard_bytes: a shard is written once it holds so many bytes; about three times as much memory is taken.
    report: called after every shard.
    Raises `InputError` for activations that are not finite, a folder that holds other activations, or a disk that is
    full: the shards written until then stay.
    """
    if batches < 1 or shard_bytes < 1:
        raise InputError(f"write_activations(batches={batches}, shard_bytes={shard_bytes}): both must be above 0")
    given: Any = {"dtype": dtype, "model": model, "fingerprint": fingerprint}
    if open_cache(source, folder, **given).batches >= batches:
        return CachedActivations(folder)
    with FileLock(folder / _LOCK):  # another process may fill the same folder; this one goes on after it
        index = open_cache(source, folder, **given)
        _write_on(source, folder, index, batches=batches, shard_bytes=shard_bytes, report=report)
    return CachedActivations(folder)


def _write_on(
    source: ActivationSource,
    folder: Path,
    index: CacheIndex,
    *,
    batches: int,
    shard_bytes: int,
    report: Callable[[CacheIndex], None] | None,
) -> None:
    parts: list[dict[str, Stored]] = []
    costs, size = Costs(), 0
    for number in range(index.batches, batches):
        batch = source.batch(number)
        stored = _encode(batch, index.dtype, number, tuple(source.sites))
        if not index.shards:
            costs.add(batch, stored)
        size += sum(t.nbytes for one in stored.values() for t in one if t is not None)
        parts.append(stored)
        if size >= shard_bytes or number == batches - 1:
            if not index.shards:
                index = replace(index, fvu={one.site: one.fvu for one in costs.result()})
            index = _write_shard(folder, index, parts)
            parts, size = [], 0
            if report is not None:
                report(index)


class CachedActivations:
    """A folder of stored activations as a source; after the last batch comes the first again."""

    def __init__(self, folder: Path, *, dtype: torch.dtype = torch.float32, sites: tuple[str, ...] = ()) -> None:
        """Open a folder; raises `InputError` where it holds no activations, lacks a site, or shards are missing.

        dtype: of the activations that `batch` returns. sites: of which alone they are read; () for all.
        """
        self.folder, self.dtype = Path(folder), dtype
        self.index = read_index(self.folder)
        if not self.index.batches:
            raise InputError(f"CachedActivations({str(folder)!r}): holds no whole shard yet; run the caching again")
        self.sites = sites or tuple(self.index.sites)
        if missing := [name for name in self.sites if name not in self.index.sites]:
            raise InputError(
                f"CachedActivations({str(folder)!r}, sites=...): has no {missing[0]}; it has "
                f"{', '.join(self.index.sites)}"
            )
        for number in range(len(self.index.shards)):
            if not shard_path(self.folder, number).is_file():
                raise InputError(f"{shard_path(self.folder, number)}: is missing; delete the folder and cache again")
        self._places = [(s, b) for s, shard in enumerate(self.index.shards) for b in range(len(shard))]
        self._open: tuple[int, Any] = (-1, None)

    @property
    def n_batches(self) -> int:
        """Batches before they come again."""
        return len(self._places)

    @property
    def fingerprint(self) -> str:
        """What the activations are a function of."""
        return f"{self.index.fingerprint} {self.index.dtype} {self.n_batches}"

    def batch(self, index: int) -> dict[str, Float[Tensor, "tokens width"]]:
        """The index-th batch; raises `InputError` where its shard is damaged."""
        shard, place = self._places[index % self.n_batches]
        sizes = self.index.shards[shard]
        rows = slice(sum(sizes[:place]), sum(sizes[: place + 1]))
        try:
            if self._open[0] != shard:
                self._open = (shard, safe_open(shard_path(self.folder, shard), framework="pt"))
            found = {site: decode(self._read(site, rows, place), self.dtype) for site in self.sites}
            if odd := next((site for site, values in found.items() if not all_finite(values)), None):
                raise ValueError(f"{odd} is not finite")
            return found
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(
                f"{shard_path(self.folder, shard)}: is damaged ({_reason(error)}); delete the folder and cache again"
            ) from error

    def _read(self, site: str, rows: slice, place: int) -> Stored:
        file, dtype = self._open[1], self.index.dtype
        values = file.get_slice(site)[rows]
        if tuple(values.shape) != (rows.stop - rows.start, self.index.sites[site]):
            raise ValueError(f"{site} has not the shape that the index says")
        if not dtype.startswith("int8"):
            return Stored(values, None)
        lines = rows if dtype == "int8_token" else slice(place, place + 1)
        return Stored(values, file.get_slice(site + _SCALE)[lines])


def shard_path(folder: Path, number: int) -> Path:
    """File of a shard."""
    return folder / f"shard-{number:05d}.safetensors"


def read_index(folder: Path) -> CacheIndex:
    """The index of a folder; raises `InputError` where there is none, or it cannot be read."""
    path = folder / _INDEX
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored.get("version") != VERSION:
            raise ValueError(f"version {stored.get('version')}, this program reads {VERSION}")
        stored["shards"] = tuple(tuple(int(tokens) for tokens in shard) for shard in stored["shards"])
        return CacheIndex(**stored)
    except FileNotFoundError as error:
        raise InputError(f"{folder}: holds no stored activations (no {_INDEX}); write them first") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read ({_reason(error)}); delete the folder and cache again") from error


def open_cache(source: ActivationSource, folder: Path, *, dtype: str, model: str, fingerprint: str) -> CacheIndex:
    """What a folder holds of a source already; arguments as of `write_activations`.

    Raises `InputError` where it holds something else, or cannot be made.
    """
    call, wanted = f"write_activations(folder={str(folder)!r})", CacheIndex({}, dtype, model, fingerprint)
    require_dtype(dtype, "write_activations")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{call}: {_reason(error)}; pass another") from error
    if not (folder / _INDEX).is_file():
        own = (_DRAFT, _LOCK, _INDEX)  # another process may just have written the index
        if foreign := sorted(one.name for one in folder.iterdir() if not one.match("shard-*") and one.name not in own):
            raise InputError(f"{call}: holds {foreign[0]}, and no activations; pass a new folder")
        return wanted
    index = read_index(folder)
    given = {"dtype": wanted.dtype, "model": wanted.model, "fingerprint": wanted.fingerprint}
    differ = [f"{name} {getattr(index, name)}" for name, value in given.items() if getattr(index, name) != value]
    if index.fingerprint != wanted.fingerprint:
        differ[-1] += ", of other weights, texts, rows or seed"
    if set(index.sites) != set(source.sites):
        differ.append(f"sites {', '.join(index.sites)}")
    if differ:
        raise InputError(f"{call}: holds other activations ({'; '.join(differ)}); pass another folder, or delete it")
    return index


def _encode(activations: Activations, dtype: str, number: int, sites: tuple[str, ...]) -> dict[str, Stored]:
    assert len({len(activations[site]) for site in sites}) == 1, "sites of one batch have one number of tokens"
    for site in sites:
        require_finite(activations[site], site=site, index=number)
    return {site: encode(activations[site].detach().cpu(), dtype) for site in sites}


def _write_shard(folder: Path, index: CacheIndex, parts: list[dict[str, Stored]]) -> CacheIndex:
    """Write the next shard and the index that counts it."""
    tensors, widths = {}, {}
    for site in parts[0]:
        tensors[site] = torch.cat([part[site].values for part in parts])
        widths[site] = tensors[site].shape[1]
        scales = [part[site].scale for part in parts]
        if scales[0] is not None:
            tensors[site + _SCALE] = torch.cat([scale for scale in scales if scale is not None])
    tokens = tuple(len(next(iter(part.values())).values) for part in parts)
    new = replace(index, sites=widths, shards=(*index.shards, tokens))
    path = shard_path(folder, len(index.shards))
    drafts = [path.with_suffix(".part"), folder / _DRAFT]
    try:
        save_tensors(tensors, drafts[0])
        _replace(drafts[0], path)
        drafts[1].write_text(json.dumps(asdict(new)), encoding="utf-8")
        _replace(drafts[1], folder / _INDEX)
    except (OSError, SafetensorError) as error:
        for draft in drafts:
            draft.unlink(missing_ok=True)
        raise InputError(
            f"write_activations(folder={str(folder)!r}): cannot write shard {len(index.shards)} ({_reason(error)}); "
            f"{len(index.shards)} whole shards with {index.tokens} tokens are kept, run again to go on"
        ) from error
    return new


def _replace(draft: Path, path: Path) -> None:
    """Put a file in its place, once it is on the disk."""
    with open(draft, "rb") as written:
        os.fsync(written.fileno())
    os.replace(draft, path)


def _reason(error: Exception) -> str:
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror or f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
