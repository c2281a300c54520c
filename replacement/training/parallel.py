"""Several processes as one: a mesh of (data, features), and the few collectives that training needs.

Processes of one row of the mesh see the same tokens, and each holds some of every dictionary's features; processes of
one column hold the same features and see other tokens of the batch. Conventions that hold everywhere:

- of a global batch, the process at place d of D on the data axis sees tokens d, d + D, d + 2 D, ... (runs of tokens
  where the batch is made of documents);
- of n features, the one at place m of M on the feature axis holds the m-th n / M in a row;
- a loss is the same in all processes of a row, and the batch's loss is the mean over a column. So a sum over features
  passes its gradient back as it is, and gradients are averaged over a column before the optimiser's step.

In one process every collective returns what it was given. Knows nothing of dictionaries.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from replacement.errors import InputError


@dataclass(frozen=True, eq=False)
class Axis:
    """The processes of one row or column of the mesh, this one among them."""

    group: dist.ProcessGroup | None = None
    size: int = 1
    place: int = 0  #: of this process
    run: int = 1  #: tokens in a row that are seen by one process

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Axis:
        """The axis of a process group."""
        return cls(group, dist.get_world_size(group), dist.get_rank(group))

    # ---- without gradients

    def total(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """The sum over processes."""
        return x if self.size == 1 else self._reduced(x, dist.ReduceOp.SUM)

    def average(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """The mean over processes."""
        return x if self.size == 1 else self.total(x) / self.size

    def average_in_place(self, x: Shaped[Tensor, "*shape"]) -> None:
        """Put the mean over processes into `x`, which may be too large to have twice."""
        if self.size > 1:
            assert x.is_contiguous()
            dist.all_reduce(x, group=self.group)
            x.div_(self.size)

    def highest(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """The maximum over processes, entry by entry."""
        return x if self.size == 1 else self._reduced(x, dist.ReduceOp.MAX)

    def any(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """Where a process says True."""
        return x if self.size == 1 else self.highest(x.int()).bool()

    def count(self, n: int) -> int:
        """The sum over processes of a number."""
        return n if self.size == 1 else int(self.total(torch.tensor(n)))

    def gathered(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "processes ..."]:
        """What every process has, all of one shape."""
        if self.size == 1:
            return x.unsqueeze(0)
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.stack(parts)

    def told(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """What place 0 has, put into every process's tensor."""
        if self.size > 1:
            dist.broadcast(x, group=self.group, group_src=0)
        return x

    def hand_over(self, x: Shaped[Tensor, "*shape"], *, by: int) -> None:
        """Put what the process at place `by` has into the tensor of that at place 0; these two call this."""
        if self.place != by:
            dist.recv(x, group=self.group, group_src=by)
        elif by:
            dist.send(x.contiguous(), group=self.group, group_dst=0)

    def largest(self, x: Shaped[Tensor, "... n"], k: int) -> Shaped[Tensor, "... k"]:
        """The k largest entries of all processes along the last axis, in falling order; `x` may differ in length."""
        own = x.topk(min(k, x.shape[-1]), dim=-1).values
        if self.size == 1:
            return own
        filled = x.new_full((*x.shape[:-1], k), -torch.inf)
        filled[..., : own.shape[-1]] = own
        return self.gathered(filled).movedim(0, -2).flatten(-2).topk(k, dim=-1).values

    def _reduced(self, x: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        out = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out, how, group=self.group)
        return out

    # ---- with gradients

    def add(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """The sum over processes, whose gradient reaches each process's part as it is."""
        return x if self.size == 1 else _Add.apply(x, self)

    def mean(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """The mean over processes, whose gradient reaches each process's part as it is: to be averaged afterwards."""
        return x if self.size == 1 else _Mean.apply(x, self)

    def share(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
        """What all processes have alike, for each to use in part; the gradients of the parts are added up."""
        return x if self.size == 1 else _Share.apply(x, self)

    # ---- who has what

    def rows_of(self, n: int) -> slice:
        """The rows of n that this process holds, where each holds as many in a row."""
        assert n % self.size == 0
        each = n // self.size
        return slice(self.place * each, (self.place + 1) * each)

    def tokens_of(self, chosen: Int[Tensor, " chosen"]) -> Int[Tensor, " own"]:
        """Where this process has those of the chosen tokens of a global batch that it sees."""
        if self.size == 1:
            return chosen
        run, inside = chosen // self.run, chosen % self.run
        return (run // self.size * self.run + inside)[self.sees(chosen)]

    def sees(self, chosen: Int[Tensor, " chosen"]) -> Bool[Tensor, " chosen"]:
        """Which of the chosen tokens of a global batch this process sees."""
        return chosen // self.run % self.size == self.place

    def fetched(self, x: Shaped[Tensor, "tokens ..."], chosen: Int[Tensor, " chosen"]) -> Shaped[Tensor, "chosen ..."]:
        """The chosen tokens of a global batch, wherever they are."""
        chosen = chosen.to(x.device)
        if self.size == 1:
            return x[chosen]
        out = x.new_zeros(len(chosen), *x.shape[1:])
        out[self.sees(chosen)] = x[self.tokens_of(chosen)]
        return self.total(out)


@dataclass(frozen=True, eq=False)
class Mesh:
    """All processes of a run."""

    data: Axis = Axis()  #: processes with the same features and other tokens
    features: Axis = Axis()  #: processes with the same tokens and other features
    world: Axis = Axis()
    devices: DeviceMesh | None = None  #: the same in torch's words, for checkpoints

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks to people."""
        return self.world.place == 0

    def with_runs(self, run: int) -> Mesh:
        """The same processes, where `run` tokens in a row are seen by one of them."""
        return replace(self, data=replace(self.data, run=run))

    def wait(self) -> None:
        """Return when all processes are here."""
        if self.world.size > 1:
            dist.barrier(group=self.world.group)


ALONE = Mesh()
"""One process."""


def mesh_of(feature_shards: int) -> Mesh:
    """The mesh of the processes that are already connected; neighbours in rank share tokens.

    Raises `InputError` where their number is no multiple of `feature_shards`.
    """
    size = dist.get_world_size() if dist.is_initialized() else 1
    if feature_shards < 1 or size % feature_shards:
        raise InputError(
            f"mesh_of(feature_shards={feature_shards}): needs a number of processes that is a multiple, this run has "
            f"{size}; start it with torchrun --nproc-per-node {max(1, feature_shards)}"
        )
    if size == 1:
        return ALONE
    devices = init_device_mesh("cpu", (size // feature_shards, feature_shards), mesh_dim_names=("data", "features"))
    data, features = Axis.of(devices.get_group("data")), Axis.of(devices.get_group("features"))
    assert dist.group.WORLD is not None
    return Mesh(data, features, Axis.of(dist.group.WORLD), devices)


@contextmanager
def processes(*, feature_shards: int = 1) -> Iterator[Mesh]:
    """The mesh of all processes that `torchrun` started, connected while the context lasts.

    Tensors on a CPU travel by gloo, those on a GPU by NCCL. feature_shards: over how many processes the features of
    each dictionary are spread; the rest of them is data parallel.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ
    if started:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield mesh_of(feature_shards)
    except RuntimeError as error:  # gloo's errors have no class of their own
        if started and (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
            raise InputError("processes: another process of this run has ended; it says why") from error
        raise
    finally:
        if started:
            dist.destroy_process_group()


def local_device(device: str) -> str:
    """The GPU of this process where several are started on one machine and "cuda" alone is asked for."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        return axis.total(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        return axis.average(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.axis.total(grad), None
