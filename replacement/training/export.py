"""The finished dictionaries on their way out of training: on unscaled activations, piece by piece, whoever holds them.

A finished set may be more than one process has memory for. The first process asks for rows in the order in which they
stand in the files, and the processes that hold them make them and send them. What a file looks like is for
`replacement.formats` to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from replacement import formats
from replacement.activation import JumpReLU, build_activation
from replacement.dictionary import DictionarySet, LearnedDictionary
from replacement.errors import InputError
from replacement.formats.drafts import remove_drafts
from replacement.formats.native import Pieces
from replacement.formats.tensors import row_slices
from replacement.training import kinds
from replacement.training.coder import Coder
from replacement.training.kinds import Weights
from replacement.training.parallel import Mesh

if TYPE_CHECKING:
    from replacement.training.trainee import Trainee

_NAMES = ("W_enc", "b_enc", "W_dec", "W_skip", "threshold")  # what may be too large for one process
_END, _FAILED = -1, -2  # instead of a dictionary's number: the first process needs no more, or can't go on


class Unscaled:
    """One dictionary as it leaves training: input scales in the encoder, output scales in the decoder.

    Of several processes that hold the features each has the rows of its own.
    """

    def __init__(
        self,
        coder: Coder,
        *,
        into: Float[Tensor, " d_in"],
        out: Float[Tensor, " n_writes"],
        b_dec: Float[Tensor, "n_writes d_out"],
    ) -> None:
        """into, out: the factors that brought what is read and written to scaled units. b_dec: in scaled units."""
        self.coder, self.into, self.out, self.b_dec = coder, into, out, (b_dec / out[:, None]).cpu()
        encoder = coder.encoder()
        self.norms, self.exported = encoder.norms, coder.sparsity.export(encoder)
        own = (coder.W_enc, self.exported.b_enc, coder.W_dec, coder.W_skip, self._threshold())
        self._own = {name: tensor.detach() for name, tensor in zip(_NAMES, own, strict=True) if tensor is not None}

    def _threshold(self) -> Tensor | None:
        """One a feature; None where all share one."""
        activation = self.exported.activation
        return activation.threshold if isinstance(activation, JumpReLU) and activation.threshold.ndim else None

    def holders(self, name: str) -> range:
        """The processes that have rows of a tensor, by their places among those that hold the features."""
        return range(1 if name == "W_skip" else self.coder.mesh.features.size)

    def slices(self, name: str) -> Iterator[slice]:
        """The rows of a tensor that each holder has, piece by piece."""
        return row_slices(self._own[name].shape, self._own[name].dtype)

    def like(self, name: str, rows: int) -> Shaped[Tensor, "rows ..."]:
        """Room for so many rows of a tensor."""
        return torch.empty(rows, *self._own[name].shape[1:], dtype=self._own[name].dtype)

    def rows(self, name: str, rows: slice) -> Shaped[Tensor, "rows ..."]:
        """Some of this process's rows, as the dictionary stores them."""
        part = self._own[name][rows].clone()
        if name == "W_enc":
            for factor in self.exported.factors:
                part.mul_(factor[rows, None])
            part.mul_(self.into)
        elif name == "W_dec":
            if self.exported.unit_rows:
                part.div_(self.norms[rows, None, None])
            part.div_(self.out[:, None])
        elif name == "W_skip":
            part.mul_(self.into[0] / self.out[0])
        return part.cpu()

    def build(self, tensor: Callable[[str], Tensor]) -> LearnedDictionary:
        """The dictionary, with all rows of its larger tensors from elsewhere, by name."""
        activation = self.exported.activation.cpu()
        if "threshold" in self._own:
            activation = build_activation(activation.settings(), tensor("threshold"))
        weights = Weights(
            W_enc=tensor("W_enc"),
            b_enc=tensor("b_enc"),
            W_dec=tensor("W_dec"),
            b_dec=self.b_dec,
            W_skip=tensor("W_skip") if "W_skip" in self._own else None,
            activation=activation,
            encoding=self.coder.scheme.export(self.into).cpu(),
        )
        return kinds.build(self.coder.plan, weights)

    def outline(self) -> LearnedDictionary:
        """The dictionary without its larger tensors: they are on the device "meta"."""

        def like(name: str) -> Tensor:
            own = self._own[name]
            return own.new_empty((len(own) * len(self.holders(name)), *own.shape[1:]), device="meta")

        return self.build(like)


def export(trainee: Trainee, folder: Path, *, metadata: Mapping[str, Any]) -> None:
    """Write the finished dictionaries into a folder that nobody else writes to; all processes of the run call this.

    The first one writes the files, and holds some `PIECE_BYTES` for that beside its own features. metadata: kept in the
    config. Raises `InputError` in all processes where the files can't be written; then none of them appears.
    """
    with gathered(trainee) as pieces:
        if pieces is not None:
            remove_drafts(folder)
            outlines = [trainee.unscaled(index).outline() for index in range(len(trainee.planned))]
            whole = DictionarySet({one.layer: one for one in outlines}, folder.name, metadata=metadata)
            formats.save(whole, folder, pieces=pieces)


def dictionaries(trainee: Trainee) -> list[LearnedDictionary]:
    """The finished dictionaries in the memory of the first process, none in the others; all have to ask."""
    with gathered(trainee) as pieces:
        if pieces is None:
            return []
        found = []
        for index in range(len(trainee.planned)):
            one = trainee.unscaled(index)
            found.append(one.build(partial(_whole, pieces, one.outline())))
        return found


def _whole(pieces: Pieces, dictionary: LearnedDictionary, name: str) -> Tensor:
    return torch.cat(list(pieces(dictionary, name)))


@contextmanager
def gathered(trainee: Trainee) -> Iterator[Pieces | None]:
    """In the first process: what gives all rows of a tensor that an outline lacks. The others send theirs until it
    leaves the context, and get None.

    All processes hear of each piece, so that none waits for longer than one takes. Raises `InputError` in the others
    where the first one could not go on.
    """
    mesh, unscaled = trainee.mesh, lru_cache(maxsize=1)(trainee.unscaled)
    layers = [plan.layer for plan in trainee.planned]

    def pieces(dictionary: LearnedDictionary, name: str) -> Iterator[Tensor]:
        index = layers.index(dictionary.layer)
        one = unscaled(index)
        for place in one.holders(name):
            for rows in one.slices(name):
                mesh.world.told(torch.tensor([index, _NAMES.index(name), place, rows.start, rows.stop]))
                own = place == mesh.features.place
                part = one.rows(name, rows) if own else one.like(name, rows.stop - rows.start)
                mesh.features.hand_over(part, by=place)
                yield part

    if not mesh.is_first:
        _serve(mesh, unscaled)
        yield None
        return
    end = _FAILED
    try:
        yield pieces
        end = _END
    finally:
        mesh.world.told(torch.tensor([end, 0, 0, 0, 0]))


def _serve(mesh: Mesh, unscaled: Callable[[int], Unscaled]) -> None:
    while True:
        index, name, place, start, stop = mesh.world.told(torch.zeros(5, dtype=torch.long)).tolist()
        if index == _FAILED:
            raise InputError("export: the first process could not write the dictionaries; it says why")
        if index == _END:
            return
        if mesh.data.place == 0 and mesh.features.place == place:
            mesh.features.hand_over(unscaled(index).rows(_NAMES[name], slice(start, stop)), by=place)
