"""How the tokens of a shuffled buffer, harvested by several processes, come to those that train on them.

Knows nothing of sources and batches: only who has which tokens, and who sees which.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Int, Shaped
from torch import Tensor

from replacement.training.parallel import Mesh


class Exchange:
    """Where every token of one buffer goes: all processes of a row of the mesh see the same, each once."""

    def __init__(self, holder: Int[Tensor, " tokens"], order: Int[Tensor, " tokens"], mesh: Mesh) -> None:
        """holder: the process that harvested each token; each has its tokens in ascending order. order: the shuffled
        order; the process at place d of D on the data axis sees its entries d, d + D, d + 2 D, ...
        """
        self.mesh, world = mesh, mesh.world
        at = torch.zeros_like(holder)
        own = holder == world.place
        at[own] = torch.arange(int(own.sum()))
        sent = []
        for process in range(world.size):
            wanted = order[process // mesh.features.size :: mesh.data.size]
            sent.append(at[wanted[holder[wanted] == world.place]])
        self._sent, self._sent_sizes = torch.cat(sent), [len(each) for each in sent]
        sources = holder[order[mesh.data.place :: mesh.data.size]]
        self._arrival = sources.argsort(stable=True)
        self._received_sizes = torch.bincount(sources, minlength=world.size).tolist()

    def __call__(self, x: Shaped[Tensor, "harvested ..."]) -> Shaped[Tensor, "seen ..."]:
        """What this process sees, in the order it is served in, of what all processes harvested."""
        received = x.new_empty(len(self._arrival), *x.shape[1:])
        dist.all_to_all_single(
            received, x[self._sent], self._received_sizes, self._sent_sizes, group=self.mesh.world.group
        )
        out = torch.empty_like(received)
        out[self._arrival] = received
        return out
