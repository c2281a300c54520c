"""The transposed sweep: gradients pulled back through a prompt's frozen linear maps, for many targets at once.

Gradients at all positions are held as [prefix, d_model, batch], targets last: every step is then a product of one
weight matrix with what stands at each position, or of an attention pattern with what a head carries, and next to
nothing is permuted or copied on the way. Norm weights are folded into attention's maps, norm scales into its patterns.
Shortcuts, all exact:

- a target starts at one position, and until the first attention on its way nothing leaves it: one vector a target;
- that first attention needs each head's map once a target, not once a position: `sum_h A_h[q, k] W_V_h W_O_h^T g`;
- so the second one's output maps need be applied to these few vectors only, where nothing has changed them (`Spread`);
- what the first block writes is carried up to the values of the second one's attention (`Sweep.widened`);
- what the embeddings write through the first block's attention is a table, so that no gradient goes through it.

Knows nothing of features; who consumes a sweep says what is written where.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from replacement.columns import product, through_mlp, transpose_norm_at_all
from replacement.linear import Entry, LinearPath
from replacement.sites import ModelWeights, Norm, Place, Slot

KEYS = 256  #: keys of an attention pattern that are multiplied at once; later queries only, half the work when many
TABLE_BYTES = 64 * 2**20  #: what the table of the first block may take; beyond, gradients go through like anywhere


class AttentionMaps(NamedTuple):
    """Attention's output and value maps of one block, norm weights folded in, as gradients take them."""

    out: Float[Tensor, "heads*d_head d_model"]
    value: Float[Tensor, "d_model kv_heads*d_head"]


class Transposed:
    """A language model's attention maps for sweeps, made when first asked for; they belong to no prompt."""

    def __init__(self, weights: ModelWeights) -> None:
        self._weights = weights
        self._maps: dict[tuple[int, torch.dtype], AttentionMaps] = {}

    def maps(self, layer: int, dtype: torch.dtype) -> AttentionMaps:
        """The maps of a block, in the precision of the products."""
        if (layer, dtype) not in self._maps:
            block = self._weights.blocks[layer]
            out = block.W_O.flatten(0, 1)
            if (norm := block.ln1_post) is not None:
                out = _centered(norm, out, 1) * norm.weight
            value = block.W_V.permute(1, 0, 2).flatten(1)
            value = _centered(block.ln1, value * block.ln1.weight[:, None], 0)
            self._maps[layer, dtype] = AttentionMaps(out.to(dtype), value.contiguous().to(dtype))
        return self._maps[layer, dtype]


class Pulled(NamedTuple):
    """Gradients in the residual stream at one slot, where what is written there is added or stands."""

    slot: Slot | None  # None: the embeddings, or what is left of their way, see `by_table`
    gradient: Tensor  # [prefix, d_model, batch]
    alone: bool  # whether it is [d_model, batch] instead, at each target's own position
    wide: bool = False  # whether it is [prefix, d_model + kv_heads*d_head, batch], to be read by `Sweep.widened`
    by_table: bool = False  # the way of the embeddings through the first attention is still to be taken, by the table
    beside: Tensor | None = None  # of a parallel block then: what reaches the embeddings past attention


class Group(NamedTuple):
    """Neighbouring targets of one position."""

    position: int
    columns: slice


class Spread(NamedTuple):
    """Gradients just after the first attention on their way, in few vectors a target: `sum_h shares[k, h] vectors[h]`
    at key k, and what went past attention at the target's own position."""

    vectors: Float[Tensor, "heads d_model batch"]
    own: Float[Tensor, "d_model batch"] | None
    shares: list[Float[Tensor, "keys heads"]]  # by group
    groups: list[Group]

    def write(self, into: Float[Tensor, "prefix width batch"]) -> None:
        """The gradients at all positions."""
        for (position, columns), share in zip(self.groups, self.shares, strict=True):
            moved = share @ self.vectors[:, :, columns].reshape(len(self.vectors), -1)
            into[: position + 1, :, columns] = moved.view(position + 1, into.shape[1], -1)
            into[position + 1 :, :, columns] = 0.0
            if self.own is not None:
                into[position, :, columns] += self.own[:, columns]


class Sweep:
    """Pulls gradients back through one prompt's linear path. Its working arrays are reused: use what it yields at
    once."""

    def __init__(
        self, path: LinearPath, transposed: Transposed, products: torch.dtype, *, widens: bool, room: int
    ) -> None:
        """products: the precision of matrix products through attention; sums are kept in the path's own.

        widens: whether who consumes the sweep can read wide gradients in the first block. room: bytes for the table of
        the first block and its wide form.
        """
        self.path, self.transposed, self.products = path, transposed, products
        self.parallel, self.room = path.weights.parallel, room
        first_mlp = 0 in path.skips or 0 in path.mlps
        self._widens = widens and products == path.forward.embedding.dtype and not self.parallel and not first_mlp
        self._work: dict[tuple[str, torch.dtype], Tensor] = {}

    # ---- the way down

    def pull(self, entry: Entry, groups: list[Group]) -> Iterator[Pulled]:
        """Gradients at every slot from the entry down to the embeddings, or to a slot that lets none by.

        entry: targets sorted by position, `groups` the runs of equal ones. Every slot is yielded, whether or not
        anything is written there. Only positions up to the last target's are carried.
        """
        state, first = entry.gradient.T.clone(memory_format=torch.contiguous_format), entry.first
        alone, wide, spread = True, False, None
        for layer in range(-1 if first is None else first.layer, -1, -1):
            to_pre: Tensor | None = None
            for place in reversed(Place):
                slot = Slot(layer, place)
                assert first is not None
                if slot > first or (place is Place.MID and self.parallel):
                    continue
                only_attention = entry.only_attention and slot == first
                if not only_attention:
                    yield Pulled(slot, state, alone, wide)
                if place is Place.MLP and (through := self._mlp(layer, state, entry.positions, alone)) is not None:
                    spread = None
                    if self.parallel:
                        to_pre = through
                    else:
                        state = state.add_(through)
                elif place is Place.ATTENTION:
                    if layer == 0 and not only_attention and self.table is not None:
                        yield Pulled(None, state, alone, wide, True, to_pre)
                        return
                    passes = only_attention or slot not in self.path.written
                    if passes and alone:
                        state, spread = self._spread(layer, entry, groups, state, only_attention)
                        state, alone = _at_positions(to_pre, groups, state), False
                        spread = spread if to_pre is None else None
                    elif passes:
                        wide = layer == 1 and self._widens and self.table is not None
                        state, spread = self._attend(layer, state, to_pre, spread, wide), None
                    elif to_pre is not None:
                        state = state.add_(to_pre)
                elif place in (Place.PRE, Place.MID, Place.POST) and slot in self.path.written:
                    return
        yield Pulled(None, state, alone, wide)

    def widened(self, vectors: Float[Tensor, "*axes d_model"]) -> Float[Tensor, "*axes wide"]:
        """What is written in the first block, as the second block's attention finds it beside the stream itself.

        Few things are written so low. To carry them to the values of attention is less than to pull every gradient
        from there to the stream.
        """
        value = self.transposed.maps(1, self.products).value
        wide = vectors.new_empty(vectors.shape[:-1].numel(), sum(value.shape))
        stream, moved = wide.tensor_split([len(value)], 1)
        stream.copy_(vectors.reshape(stream.shape))
        torch.mm(stream, value, out=moved)
        return wide.view(*vectors.shape[:-1], wide.shape[1])

    # ---- attention

    def _columns(self, prefix: int, batch: int) -> Tensor:
        """Room for the stream and, beside it, for what any attention's values give: [prefix, widest, batch]."""
        blocks = self.path.weights.blocks
        widest = max(block.W_V.shape[0] * block.W_V.shape[2] for block in blocks)
        return self._take("stream", (prefix, self.path.forward.embedding.shape[1] + widest, batch))

    def _spread(
        self, layer: int, entry: Entry, groups: list[Group], x: Float[Tensor, "d_model batch"], only_attention: bool
    ) -> tuple[Float[Tensor, "prefix d_model batch"], Spread | None]:
        """From one vector a target to all positions, by the first attention on the way and around it."""
        prefix = groups[-1].position + 1
        stream = self._columns(prefix, x.shape[1])[:, : len(x)]
        if self.path.attentions is not None:
            stream.zero_()
            stream[entry.positions, :, torch.arange(x.shape[1], device=x.device)] = x.T
            self._full_gradient(layer, stream, raw=only_attention)
            return stream, None
        patterns = (
            self._pattern(layer, slice(position, position + 1), slice(0, position + 1), raw=only_attention)
            for position, _ in groups
        )
        shares = [pattern[:, 0].T for pattern in patterns]
        by_head = self._head_maps(layer, x, raw=only_attention)
        spread = Spread(by_head, None if only_attention else x, shares, groups)
        spread.write(stream)
        return stream, spread

    def _head_maps(
        self, layer: int, x: Float[Tensor, "d_model batch"], *, raw: bool
    ) -> Float[Tensor, "heads d_model batch"]:
        """`W_V_h W_O_h^T g` of every head; raw: g lies before a post-norm, which is then no part of the map."""
        out, value = self.transposed.maps(layer, self.products)
        block = self.path.weights.blocks[layer]
        if raw:
            out = block.W_O.flatten(0, 1).to(self.products)
        kv_heads, _, d_head = block.W_V.shape
        carried = (out @ x.to(self.products)).view(kv_heads, -1, d_head, x.shape[1])
        values = value.view(len(value), kv_heads, d_head).transpose(0, 1)
        return torch.matmul(values[:, None], carried).flatten(0, 1).to(x.dtype)

    def _attend(
        self, layer: int, stream: Tensor, to_pre: Tensor | None, spread: Spread | None, wide: bool
    ) -> Float[Tensor, "prefix width batch"]:
        """From the stream after attention to the stream before it, in place.

        spread: what the stream was made of, where nothing has changed it since. wide: leave what attention's values
        give beside the stream.
        """
        if self.path.attentions is not None:
            self._full_gradient(layer, stream, raw=False)
            return stream if to_pre is None else stream.add_(to_pre)
        prefix, width, batch = stream.shape
        out, value = self.transposed.maps(layer, self.products)
        heads = self._take("heads", (prefix, len(out), batch), self.products)
        if spread is not None and len(spread.vectors) < prefix:
            carried = torch.matmul(out, spread.vectors.to(self.products))
            own = None if spread.own is None else out @ spread.own.to(self.products)
            shares = [share.to(self.products) for share in spread.shares]
            Spread(carried, own, shares, spread.groups).write(heads)
        else:
            product(out, stream.to(self.products), heads)
        columns = self._columns(prefix, batch)[:, : width + value.shape[1]]
        if self.products == stream.dtype:
            self._mix(layer, heads, columns[:, width:])
            if not wide:
                product(value, columns[:, width:], stream, add=True)
        else:
            mixed = self._take("mixed", (prefix, value.shape[1], batch), self.products)
            self._mix(layer, heads, mixed)
            stream.add_(product(value, mixed, stream.new_empty(stream.shape, dtype=self.products)))
        return columns if wide else stream if to_pre is None else stream.add_(to_pre)

    def _mix(self, layer: int, heads: Tensor, mixed: Float[Tensor, "prefix kv_heads*d_head batch"]) -> None:
        """From gradients at what heads carried to queries to those at what they took from keys, into `mixed`."""
        prefix, _, batch = heads.shape
        kv_heads, _, d_head = self.path.weights.blocks[layer].W_V.shape
        carried = heads.view(prefix, kv_heads, -1, d_head * batch)
        by_key = mixed.view(prefix, kv_heads, d_head * batch)
        for start in range(0, prefix, KEYS):
            keys, queries = slice(start, min(start + KEYS, prefix)), slice(start, prefix)
            pattern = self._pattern(layer, queries, keys).unflatten(0, (kv_heads, -1)).to(self.products)
            into = by_key[keys].transpose(0, 1)
            for j in range(pattern.shape[1]):  # the heads that share keys and values
                of_head = pattern[:, j].transpose(1, 2), carried[queries, :, j].transpose(0, 1)
                if j == 0:
                    torch.bmm(*of_head, out=into)
                else:
                    into.baddbmm_(*of_head)

    def _pattern(
        self, layer: int, queries: slice, keys: slice, *, raw: bool = False
    ) -> Float[Tensor, "heads query key"]:
        """Attention's pattern with the norms' scales in it; raw: without a post-norm's."""
        block = self.path.forward.blocks[layer]
        pattern = block.pattern[:, queries, keys] / block.ln1_scale[keys, 0]
        if block.ln1_post_scale is not None and not raw:
            pattern /= block.ln1_post_scale[queries]
        return pattern

    def _full_gradient(self, layer: int, stream: Tensor, *, raw: bool) -> None:
        """Attention with its queries and keys, where that was asked for, in place.

        raw: what is given lies at attention's output, before a post-norm, and nothing goes around attention.
        """
        path, prefix = self.path, len(stream)
        assert path.attentions is not None
        at_out = stream.permute(2, 0, 1).contiguous()
        at_out = at_out if raw else path.transpose_write(layer, "attn.hook_out", at_out)
        at_norm = path.attentions[layer].transpose(at_out).permute(1, 2, 0)
        norm, scale = path.weights.blocks[layer].ln1, path.forward.blocks[layer].ln1_scale[:prefix]
        through = transpose_norm_at_all(norm, scale, at_norm)
        if raw:
            stream.copy_(through)
        else:
            stream.add_(through)

    # ---- MLPs

    def _mlp(self, layer: int, state: Tensor, positions: Int[Tensor, " batch"], alone: bool) -> Tensor | None:
        """From the stream after an MLP to where it reads, by a skip connection or the linearised MLP; None: nothing
        passes."""
        path = self.path
        if alone:
            through = path.mlp_step(layer, state.T, positions)
            return None if isinstance(through, float) else through.T
        skip, mlp = path.skips.get(layer), path.mlps.get(layer)
        if skip is not None:
            gradient = self._at_write(layer, skip.write, state)
            gradient = torch.matmul(skip.W_skip.T, gradient)
            return self._from_read(layer, skip.read, gradient)
        if mlp is not None and Slot(layer, Place.MLP) not in path.written:
            return self._from_read(layer, "mlp.hook_in", through_mlp(mlp, self._at_write(layer, "mlp.hook_out", state)))
        return None

    def _at_write(self, layer: int, site: str, stream: Tensor) -> Tensor:
        found = self.path.write_norm(layer, site)
        return stream if found is None else transpose_norm_at_all(found[0], found[1][: len(stream)], stream)

    def _from_read(self, layer: int, site: str, gradient: Tensor) -> Tensor:
        if site == "hook_resid_mid":
            return gradient
        norm, scale = self.path.weights.blocks[layer].ln2, self.path.forward.blocks[layer].ln2_scale[: len(gradient)]
        if site == "ln2.hook_normalized":
            norm = norm._replace(weight=torch.ones_like(norm.weight))
        return transpose_norm_at_all(norm, scale, gradient)

    # ---- the first block

    @cached_property
    def table(self) -> Float[Tensor, "query key d_model"] | None:
        """What each key's embedding adds to each query's stream after the first attention, itself included.

        None where something else is written or read below, or where it would be too large.
        """
        path, embedding = self.path, self.path.forward.embedding
        size = embedding.numel() * len(embedding) * embedding.element_size()
        most = min(TABLE_BYTES, self.room // 3)  # the wide form is twice as large, or less
        below = {Slot(0, Place.PRE), Slot(0, Place.ATTENTION)}
        if path.attentions is not None or below & path.written.keys() or size > most:
            return None
        out, value = self.transposed.maps(0, embedding.dtype)
        kv_heads, _, d_head = path.weights.blocks[0].W_V.shape
        values = (embedding @ value).view(len(embedding), kv_heads, 1, d_head)
        written = torch.matmul(values.permute(1, 2, 0, 3), out.view(kv_heads, -1, d_head, out.shape[1]))
        everywhere = slice(0, len(embedding))
        table = torch.einsum("hqk,hkd->qkd", self._pattern(0, everywhere, everywhere), written.flatten(0, 1))
        table.diagonal(dim1=0, dim2=1).add_(embedding.T)
        return table

    @cached_property
    def wide_table(self) -> Float[Tensor, "query key wide"]:
        """The table's wide form, of which the table itself is a part from then on."""
        assert self.table is not None
        wide = self.widened(self.table)
        self.table = wide[..., : self.table.shape[-1]]
        return wide

    # ---- memory

    def _take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """A working array, the same memory at each call: fresh pages cost more than a small product.

        The first axis is the prefix; room is made for the whole prompt, as arrays that grow leave holes behind.
        """
        like = self.path.forward.embedding
        dtype, size = dtype or like.dtype, torch.Size(shape).numel()
        if (found := self._work.get((name, dtype))) is None or len(found) < size:
            whole = torch.Size((len(like), *shape[1:])).numel()
            found = self._work[name, dtype] = like.new_empty(whole, dtype=dtype)
        return found[:size].view(shape)


def _at_positions(added: Tensor | None, groups: list[Group], stream: Tensor) -> Tensor:
    """Add to a stream what stands at each target's own position."""
    if added is not None:
        for position, columns in groups:
            stream[position, :, columns] += added[:, columns]
    return stream


def _centered(norm: Norm, matrix: Tensor, dim: int) -> Tensor:
    return matrix - matrix.mean(dim, keepdim=True) if norm.center else matrix
