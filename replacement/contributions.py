"""What each source contributes to each target of a local model: one row of an attribution graph per target.

`row[t, s] = w_t^T J(t <- s) v_s` with v_s the vector that source s writes and J the frozen linear map (Ameisen et al.
2025, "Circuit Tracing", section on attribution graphs; Dunefsky et al. 2024). Two engines give the same rows:
`linear`, an explicit transposed sweep, and `autograd`, `torch.autograd` on the hooked language model, the reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from replacement.columns import filled
from replacement.features import Targets
from replacement.linear import Entry, apply_norm
from replacement.local import LocalModel
from replacement.sites import Slot
from replacement.sweep import Group, Pulled, Sweep, Transposed

KEPT_BYTES = 256 * 2**20  #: the most that is kept from sweep to sweep: all of the first block
GATHERED_BYTES = 2**19  #: decoder rows gathered at once: they stay in the processor's cache until they are multiplied


class Contributions(NamedTuple):
    """Signed contributions of all sources to a batch of targets; along a row they sum to the target's value."""

    features: Float[Tensor, "n n_features"]
    errors: Float[Tensor, "n slots pos"]
    embeddings: Float[Tensor, "n pos"]
    bias: Float[Tensor, " n"]  # all constants: b_dec, attention and norm biases, position embeddings, the target's own
    bos: Float[Tensor, " n"]  # what is written at position 0, zero where position 0 is traced


@runtime_checkable
class Engine(Protocol):
    """Computes rows of contributions for targets of one local model."""

    def rows(self, targets: Targets) -> Contributions:
        """The contributions of every source to each target."""
        ...


def zero_contributions(local: LocalModel, n: int) -> Contributions:
    """Rows of zeros, to be added to."""
    like = local.forward.embedding
    return Contributions(
        like.new_zeros(n, len(local.features.layer)),
        like.new_zeros(n, len(local.slots), local.n_positions),
        like.new_zeros(n, local.n_positions),
        like.new_zeros(n),
        like.new_zeros(n),
    )


def total_rows(engine: Engine, reads: Sequence[Targets]) -> Contributions:
    """Rows of targets that read several sites: the sum of the rows of each."""
    parts = [engine.rows(targets) for targets in reads]
    return parts[0] if len(parts) == 1 else Contributions(*(sum(of) for of in zip(*parts, strict=True)))


class LinearEngine:
    """Rows by a transposed sweep of matrix products from the targets' layer down; no autograd, no hooks."""

    def __init__(
        self,
        local: LocalModel,
        transposed: Transposed | None = None,
        *,
        products: torch.dtype | None = None,
        room: int | None = None,
    ) -> None:
        """transposed: the language model's maps, where they are kept from prompt to prompt.

        products: the precision of attention's matrix products, where most of the time goes; sums stay in the model's.
        room: bytes for what is kept from sweep to sweep, at most KEPT_BYTES; without it more is computed anew.
        """
        room = KEPT_BYTES if room is None else min(room, KEPT_BYTES)
        dtype = local.forward.embedding.dtype
        self.local = local
        self.slots = {slot: index for index, slot in enumerate(local.slots)}
        self._kept: dict[tuple[object, ...], Tensor] = {}
        value = local.path.weights.blocks[0].W_V
        width = local.forward.embedding.shape[1] + value.shape[0] * value.shape[2]
        first = sum(len(writes.feature) for slot, of in local.writes.items() for writes in of if slot.layer == 0)
        wide = first * width * dtype.itemsize
        transposed, widens = transposed or Transposed(local.path.weights), wide <= room // 2
        self.sweep = Sweep(
            local.path, transposed, products or dtype, widens=widens, room=room - wide if widens else room
        )

    def rows(self, targets: Targets) -> Contributions:
        order = torch.argsort(targets.positions, stable=True)
        entry, own_bias = enter(self.local, targets)
        ordered = filled(entry._replace(gradient=entry.gradient[order], positions=entry.positions[order]))
        found = _Columns(self.local, len(ordered.positions))
        groups = _groups(ordered.positions)
        for pulled in self.sweep.pull(ordered, groups):
            if pulled.slot is None:
                self._add_embeddings(pulled, groups, found)
            else:
                self._add_slot(pulled, groups, found)
        return found.rows(torch.argsort(order), own_bias)

    def _add_slot(self, pulled: Pulled, groups: list[Group], found: _Columns) -> None:
        assert pulled.slot is not None
        if (constant := self._constants.get(pulled.slot)) is not None:
            constant = self._reached(pulled, constant, "constant", pulled.slot)
            found.bias += _dot(pulled, groups, constant).sum(0)
        if (index := self.slots.get(pulled.slot)) is None:
            return
        found.errors[index, : groups[-1].position + 1] = _dot(
            pulled, groups, self._reached(pulled, self._errors[index], "error", index)
        )
        bos = self._reached(pulled, self._bos[index], "bos", index)
        for position, columns in groups[:1] if pulled.alone else [Group(0, slice(None))]:
            if position == 0:
                found.bos[columns] += bos @ _at(pulled, 0, columns)
        for number, writes in enumerate(self.local.writes.get(pulled.slot, ())):
            starts = self._starts[pulled.slot, number]
            spans = [_Span(starts[p], starts[p + 1], p, columns) for p, columns in _places(pulled, groups)]
            spans = [span for span in spans if span.start < span.stop]
            for first, rows, some in self._gathered(pulled, number, spans):
                for start, stop, position, columns in some:
                    into = found.features[writes.first + start : writes.first + stop, columns]
                    into.addmm_(rows[start - first : stop - first], _at(pulled, position, columns))

    def _gathered(self, pulled: Pulled, number: int, spans: list[_Span]) -> Iterator[tuple[int, Tensor, list[_Span]]]:
        """Decoder rows of one dictionary at a slot, those of some spans at once, with the number of the first row.

        They are multiplied while they lie in the cache, so that to keep them all would take memory and save no time.
        """
        assert pulled.slot is not None
        if pulled.wide:
            if ("wide", pulled.slot, number) not in self._kept:
                every = self._rows(pulled.slot, number, slice(None))
                self._kept["wide", pulled.slot, number] = self.sweep.widened(every)
            yield 0, self._kept["wide", pulled.slot, number], spans
            return
        like = self.local.forward.embedding
        most = GATHERED_BYTES // (like.shape[1] * like.element_size())
        while spans:
            first = spans[0].start
            fit = max(1, sum(span.stop - first <= most for span in spans))
            yield first, self._rows(pulled.slot, number, slice(first, spans[fit - 1].stop)), spans[:fit]
            spans = spans[fit:]

    def _add_embeddings(self, pulled: Pulled, groups: list[Group], found: _Columns) -> None:
        forward = self.local.forward
        if pulled.by_table:
            table = self.sweep.wide_table if pulled.wide else self.sweep.table
            assert table is not None
            for position, columns in _places(pulled, groups):
                into = found.embeddings[: position + 1, columns]
                into.addmm_(table[position, : position + 1], _at(pulled, position, columns))
        else:
            found.embeddings[: groups[-1].position + 1] += _dot(pulled, groups, forward.embedding)
        if pulled.beside is not None:
            beside = pulled._replace(gradient=pulled.beside)
            found.embeddings[: groups[-1].position + 1] += _dot(beside, groups, forward.embedding)
        if (place := forward.position_embedding) is not None:
            moved = self._reached(pulled, self._moved_place if pulled.by_table else place, "positions")
            found.bias += _dot(pulled, groups, moved).sum(0)
            if pulled.beside is not None:
                found.bias += _dot(pulled._replace(gradient=pulled.beside), groups, place).sum(0)

    def _reached(self, pulled: Pulled, vectors: Tensor, *what: object) -> Tensor:
        """Vectors as these gradients read them; wide ones are kept under the name `what`."""
        if not pulled.wide:
            return vectors
        if ("wide", *what) not in self._kept:
            self._kept["wide", *what] = self.sweep.widened(vectors)
        return self._kept["wide", *what]

    # ---- what is written, as it reaches the stream

    @cached_property
    def _constants(self) -> dict[Slot, Float[Tensor, "pos d_model"]]:
        return {slot: constant for slot, constant in self.local.constants.items() if constant.any()}

    @cached_property
    def _errors(self) -> list[Float[Tensor, "pos d_model"]]:
        local = self.local
        sites = [(slot.layer, local.write_site(slot)) for slot in local.slots]
        return [local.path.write(*at, error, bias=False) for at, error in zip(sites, local.errors, strict=True)]

    @cached_property
    def _bos(self) -> list[Float[Tensor, " d_model"]]:
        local, found = self.local, []
        for slot, bos in zip(local.slots, local.bos, strict=True):
            norm = local.path.write_norm(slot.layer, local.write_site(slot))
            found.append(bos if norm is None else apply_norm(norm[0], norm[1][:1], bos[None], bias=False)[0])
        return found

    @cached_property
    def _moved_place(self) -> Float[Tensor, "pos d_model"]:
        """What position embeddings add to the stream after the first attention, themselves included."""
        place = self.local.forward.position_embedding
        assert place is not None
        return place + self.local.path.attention(0, place, bias=False)

    @cached_property
    def _starts(self) -> dict[tuple[Slot, int], list[int]]:
        """Where the writes of each position begin, and at last where they end."""
        edges = torch.arange(self.local.n_positions + 1, device=self.local.forward.tokens.device)
        return {
            (slot, number): torch.searchsorted(writes.position, edges).tolist()
            for slot, of in self.local.writes.items()
            for number, writes in enumerate(of)
        }

    def _rows(self, slot: Slot, number: int, rows: slice) -> Float[Tensor, "n d_model"]:
        """What one unit of each of some features of a dictionary adds to the stream at a slot, gathered anew."""
        writes = self.local.writes[slot][number]
        norm = self.local.path.write_norm(slot.layer, self.local.write_site(slot))
        vectors = writes.writer.write_rows(writes.feature[rows], writes.layer)
        return vectors if norm is None else apply_norm(norm[0], norm[1][writes.position[rows]], vectors, bias=False)


class _Span(NamedTuple):
    """What one dictionary writes at one position, and the targets that have a gradient there."""

    start: int  # of its writes
    stop: int
    position: int
    columns: slice


class _Columns:
    """Contributions of all sources, targets last as the sweep has them."""

    def __init__(self, local: LocalModel, n: int) -> None:
        like, n_features = local.forward.embedding, len(local.features.layer)
        sources = like.new_zeros(n_features + (len(local.slots) + 1) * local.n_positions, n)
        self.features, own = sources[:n_features], sources[n_features:].view(-1, local.n_positions, n)
        self.errors, self.embeddings, self.activation = own[:-1], own[-1], local.features.activation
        self.bias, self.bos = like.new_zeros(n), like.new_zeros(n)

    def rows(self, order: Int[Tensor, " n"], own_bias: Float[Tensor, " n"]) -> Contributions:
        """As rows, in the targets' own order; features have met their decoder rows, and now their activations."""
        self.features.mul_(self.activation[:, None])
        sorted_already = torch.equal(order, torch.arange(len(order), device=order.device))
        wanted = slice(len(order)) if sorted_already else order
        parts = (self.features, self.errors, self.embeddings, self.bias, self.bos)
        features, errors, embeddings, bias, bos = (part[..., wanted] for part in parts)
        return Contributions(features.T, errors.permute(2, 0, 1), embeddings.T, bias + own_bias, bos)


def _groups(positions: Int[Tensor, " n"]) -> list[Group]:
    """Runs of equal positions among sorted ones."""
    found, counts = torch.unique_consecutive(positions, return_counts=True)
    stops = counts.cumsum(0).tolist()
    starts = [0, *stops[:-1]]
    return [Group(*each) for each in zip(found.tolist(), map(slice, starts, stops), strict=True)]


def _places(pulled: Pulled, groups: list[Group]) -> list[Group]:
    """Where gradients stand: all targets at every position up to the last, or each at its own."""
    return groups if pulled.alone else [Group(position, slice(None)) for position in range(groups[-1].position + 1)]


def _at(pulled: Pulled, position: int, columns: slice) -> Float[Tensor, "d_model n"]:
    """The gradients at one position, of all targets or of those that stand alone there."""
    return pulled.gradient[:, columns] if pulled.alone else pulled.gradient[position]


def _dot(pulled: Pulled, groups: list[Group], vectors: Float[Tensor, "pos d_model"]) -> Float[Tensor, "prefix batch"]:
    """Gradients times one vector a position; zero where a target has no gradient."""
    if not pulled.alone:
        return torch.bmm(vectors[: len(pulled.gradient), None], pulled.gradient)[:, 0]
    found = pulled.gradient.new_zeros(groups[-1].position + 1, pulled.gradient.shape[1])
    for position, columns in groups:
        found[position, columns] = vectors[position] @ pulled.gradient[:, columns]
    return found


def enter(local: LocalModel, targets: Targets) -> tuple[Entry, Float[Tensor, " n"]]:
    """Where the targets' gradients enter the residual stream, and the part of their value that no source moves."""
    path = local.path
    if targets.layer == local.n_layers:
        bias = path.weights.ln_final.bias
        own_bias = targets.biases if bias is None else targets.biases + targets.rows @ bias
        return path.final_entry(targets.rows, targets.positions), own_bias
    constant = local.read_constant(targets.layer, targets.site, written=targets.written)[targets.positions]
    entry = path.entry(targets.layer, targets.site, targets.rows, targets.positions, written=targets.written)
    return entry, targets.biases + (targets.rows * constant).sum(-1)
