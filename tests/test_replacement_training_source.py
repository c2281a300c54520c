"""Laws of the shuffled buffer: every token once, in memory that the user bounds, and no more than the run reads."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from replacement.errors import InputError
from replacement.training import Activations
from replacement.training.kinds import MLP_IN, hook
from replacement.training.source import Position, Stream
from tests.test_replacement_training import D_MODEL, N_LAYERS, ToyMLPs


class Numbered:
    """Batches of any sizes whose tokens are numbered; knows how many of their tensors anyone still holds."""

    sites = ("a", "b")

    def __init__(self, *sizes: int) -> None:
        self.sizes, self.asked, self._given, self.most_held = sizes, 0, [], 0

    def batch(self, index: int) -> Activations:
        self.asked = max(self.asked, index + 1)
        held = sum(one() is not None for one in self._given)
        self.most_held = max(self.most_held, held)
        size = self.sizes[index % len(self.sizes)]
        numbers = 1000 * index + torch.arange(size, dtype=torch.float32)
        made = {"a": numbers[:, None].clone(), "b": -numbers[:, None].expand(-1, 3).clone()}
        self._given = [weakref.ref(tensor) for tensor in made.values()]
        return made


def test_a_stream_serves_every_token_of_a_buffer_once_and_goes_on_anywhere() -> None:
    """The buffer's tokens come whole and shuffled across its batches; what comes next depends on the position alone."""
    source, name = ToyMLPs(), hook(0, MLP_IN)
    size = 2 * ToyMLPs.tokens * 2 * N_LAYERS * D_MODEL * 4

    def stream(position: Position) -> Stream:
        made = Stream(source, buffer_bytes=size, batch_tokens=48, seed=3)
        made.position = position
        return made

    one = stream(Position())
    assert one.block.batches == 2
    served = [one.next()[name] for _ in range(8)]
    wanted = torch.cat([source.batch(i)[name] for i in (2, 3)])
    assert torch.equal(torch.cat(served[4:]).sort(0).values, wanted.sort(0).values)
    assert not torch.equal(torch.cat(served[4:]), wanted)
    assert torch.equal(stream(Position(1, 2)).next()[name], served[6])
    with pytest.raises(InputError, match="raise buffer_bytes or lower batch_tokens"):
        Stream(source, buffer_bytes=1, batch_tokens=200, seed=0).next()


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6), blocks=st.integers(1, 7), seed=st.integers(0, 9))
def test_batches_of_any_sizes_fill_a_buffer(sizes: list[int], blocks: int, seed: int) -> None:
    """Its tokens are those of its batches, each once, with all sites side by side; one batch at a time is held. What is
    held stays within the bytes: of batches that are longer than the first it is their first tokens."""
    source = Numbered(*sizes)
    room = blocks * sizes[0] + seed  # tokens
    stream = Stream(source, buffer_bytes=room * 4 * 4, batch_tokens=1, seed=seed)
    n_batches, most = stream.block
    assert n_batches == room // sizes[0] and sizes[0] <= most <= max(sizes[0], 9 * sizes[0] // 8)
    wanted = torch.cat([source.batch(i)["a"][:most] for i in range(n_batches)]).flatten()
    served = [stream.next() for _ in range(len(wanted))]
    assert torch.equal(torch.cat([one["a"] for one in served]).flatten().sort().values, wanted)
    assert all(torch.equal(one["b"], -one["a"].expand(-1, 3)) for one in served)
    held = sum(content.untyped_storage().nbytes() for content in stream._content.values())
    assert held <= room * 4 * 4
    stream.next()
    assert stream.position.block == 1 and source.most_held <= len(source.sites)


def test_no_more_is_harvested_than_a_run_reads() -> None:
    """However large a buffer is allowed."""
    source = Numbered(50, 46)
    stream = Stream(source, buffer_bytes=10**12, batch_tokens=20, seed=0, tokens=1000)
    for _ in range(49):
        stream.next()
    stream.peek()
    assert stream.position.block == 0 and 1000 <= 48 * source.asked <= 1150


@pytest.mark.parametrize("longer", [8, 40])
def test_a_buffer_of_one_batch_is_that_batch_and_holds_no_more_than_it_serves(longer: int) -> None:
    """It is copied only where it is longer than the first one was, and so has tokens that are left out."""
    source = Numbered(8, longer)
    stream = Stream(source, buffer_bytes=1, batch_tokens=8, seed=0)
    stream.next()
    made, batch = [], source.batch
    source.batch = lambda index: made.append(batch(index)) or made[-1]  # type: ignore[method-assign]
    served = stream.next()
    assert torch.equal(served["a"].sort(0).values.flatten(), 1000 + torch.arange(8.0))
    for name, rows in stream._content.items():
        assert len(rows) == stream.block.most or longer == 8
        assert rows.untyped_storage().nbytes() == rows.nbytes
        assert (rows.data_ptr() == made[0][name].data_ptr()) == (longer == 8)
