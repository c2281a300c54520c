"""The local replacement model of one prompt: active features, errors, and all else that its residual stream holds.

What stands at a written site is `sum_i a_i d_i + b_dec (+ W_skip x) + error`; with the linear path between, the model's
logits on this prompt are reproduced exactly. Position 0 follows the field's convention: it carries no features and no
errors, and what is written there is one source of its own, `bos`. Speaks of slots, features, decoder rows and errors;
knows nothing of graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from replacement.coverage import Coverage, replaces_what_it_reads
from replacement.crosscoder import Crosscoder
from replacement.dictionary import Dictionary
from replacement.features import Features, Targets, Writes
from replacement.linear import LinearPath, Skip, apply_norm
from replacement.linearised import Linearisation, LinearMLP, attention_gradients, linear_mlp
from replacement.neurons import Neurons
from replacement.sites import WRITES, ForwardPass, ModelWeights, Place, Slot

OwnNeurons = Callable[[Sequence[int]], Mapping[int, Neurons]]
"""Gives the neurons of the MLPs of some layers."""
RESIDUAL = (Place.PRE, Place.MID, Place.POST)


class LocalModel:
    """A prompt's frozen linear model; built by `ReplacementModel.local`."""

    features: Features
    slots: tuple[Slot, ...]  # where errors are written, in the order of computation
    errors: Float[Tensor, "slots pos d_model"]  # at each slot's site
    bos: Float[Tensor, "slots d_model"]  # what is written at position 0 beyond b_dec and skip
    trace_bos: bool

    def __init__(
        self,
        weights: ModelWeights,
        forward: ForwardPass,
        coverage: Coverage,
        *,
        trace_bos: bool,
        linearisation: Linearisation,
        own_neurons: OwnNeurons,
        bridge: Any,
    ) -> None:
        """own_neurons, bridge: the language model's, for MLPs and attention that are passed through."""
        self.forward, self.coverage, self.trace_bos, self.linearisation = forward, coverage, trace_bos, linearisation
        skips = {d.layer: Skip(d.W_skip.detach(), d.read, d.write) for d in coverage if d.W_skip is not None}
        self.n_layers, self.n_positions = len(weights.blocks), forward.tokens.shape[0]
        gradient = linearisation.attention == "gradient"
        self.path = LinearPath(
            weights,
            forward,
            skips=skips,
            written=coverage.writes,
            mlps=self._linear_mlps(own_neurons),
            attentions=attention_gradients(bridge, forward, weights.blocks) if gradient else None,
        )
        self.features = self._encode()
        self.slots = self._error_slots()
        self.errors, self.bos = self._errors()

    def write_site(self, slot: Slot) -> str:
        """The site at which a slot is written: the dictionaries' own, else the raw output of attention or MLP."""
        return self.coverage.writes.get(slot, _RAW[slot.place])

    @cached_property
    def linearised(self) -> list[int]:
        """Layers whose MLP is linearised: nobody replaces it, or what replaces its output reads it too."""
        writers = {layer: self.coverage.writers(Slot(layer, Place.MLP)) for layer in range(self.n_layers)}
        return [layer for layer, found in writers.items() if not found or replaces_what_it_reads(found[0][1])]

    def _linear_mlps(self, own_neurons: OwnNeurons) -> dict[int, LinearMLP]:
        rule = self.linearisation
        if not self.linearised or rule.mlp == "stop":
            return {}
        blocks = self.forward.blocks
        return {
            layer: linear_mlp(neurons, blocks[layer].at["mlp.hook_in"], rule)
            for layer, neurons in own_neurons(self.linearised).items()
        }

    def _encode(self) -> Features:
        parts = []
        encoded: dict[Dictionary, Tensor] = {}
        for slot, dictionary in self.coverage.at.items():
            if (activations := encoded.get(dictionary)) is None:
                activations = dictionary.encode(self.read(dictionary))
                if not self.trace_bos:
                    activations[0] = 0
            if isinstance(dictionary, Crosscoder):  # it stands at further slots
                encoded[dictionary] = activations
            position, feature = activations.nonzero(as_tuple=True)  # sorted by position, then feature
            layer, place = (torch.full_like(position, int(value)) for value in slot)
            parts.append(Features(layer, place, position, feature, activations[position, feature]))
        if not parts:
            empty = torch.zeros(0, dtype=torch.long, device=self.forward.tokens.device)
            return Features(empty, empty, empty, empty, empty.to(self.forward.embedding.dtype))
        return Features(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def read(self, dictionary: Dictionary) -> Float[Tensor, "pos d_in"]:
        """What a dictionary reads, the parts of a crosscoder side by side."""
        layers = dictionary.part_layers if isinstance(dictionary, Crosscoder) else (dictionary.layer,)
        return torch.cat([self.forward.blocks[layer].at[dictionary.read] for layer in layers], -1)

    def filed_at(self, slot: Slot) -> Bool[Tensor, " n"]:
        """Which active features stand at a slot."""
        return (self.features.layer == slot.layer) & (self.features.place == int(slot.place))

    # ---- what is written

    def _error_slots(self) -> tuple[Slot, ...]:
        """Slots that dictionaries write, and those where a linearisation misses something."""
        slots = set(self.coverage.writes)
        if self.linearisation.mlp != "relp":
            slots |= {Slot(layer, Place.MLP) for layer in range(self.n_layers)}
        if self.linearisation.attention == "gradient":
            slots |= {Slot(layer, Place.ATTENTION) for layer in range(self.n_layers)}
        return tuple(sorted(slots))

    def _errors(self) -> tuple[Tensor, Tensor]:
        """What stands at each slot's site, less all that is known of it."""
        errors = self.forward.embedding.new_zeros(len(self.slots), self.n_positions, self.forward.embedding.shape[1])
        for error, slot in zip(errors, self.slots, strict=True):
            error += self.forward.blocks[slot.layer].at[self.write_site(slot)]
            if slot in self.coverage.writes:
                error -= self.output_bias(slot) + self.skip(slot)
                for writes in self.writes[slot]:
                    error.index_add_(0, writes.position, writes.vectors(), alpha=-1)
            else:
                error -= self._linear_part(slot)
        bos = torch.zeros_like(errors[:, 0])
        if not self.trace_bos:  # the whole of position 0 is one source: features and what they miss
            bos = errors[:, 0].clone()
            errors[:, 0] = 0
        return errors, bos

    def _linear_part(self, slot: Slot) -> Float[Tensor, "pos d_model"]:
        """What a linearised MLP or attention gives at its raw output on the prompt."""
        if slot.place is Place.MLP:
            mlp, x = self.path.mlps.get(slot.layer), self.forward.blocks[slot.layer].at["mlp.hook_in"]
            return torch.zeros_like(x) if mlp is None else mlp.forward(x) + mlp.constant
        assert self.path.attentions is not None, "frozen attention misses nothing"
        attention = self.path.attentions[slot.layer]
        return attention.forward(attention.x.detach()) + attention.constant

    def skip(self, slot: Slot) -> Tensor | float:
        """What a skip connection writes at a slot on the prompt."""
        dictionary = self.coverage.at.get(slot)
        if dictionary is None or dictionary.W_skip is None:
            return 0.0
        return dictionary.skip(self.forward.blocks[slot.layer].at[dictionary.read])

    @cached_property
    def writes(self) -> dict[Slot, list[Writes]]:
        """What the active features write, by slot and dictionary."""
        return {
            slot: [self._writes(filed, writer, slot.layer) for filed, writer in self.coverage.writers(slot)]
            for slot in self.coverage.writes
        }

    def _writes(self, filed: Slot, writer: Dictionary, layer: int) -> Writes:
        index = self.filed_at(filed).nonzero()[:, 0]
        of = slice(int(index[0]), int(index[-1]) + 1) if len(index) else slice(0, 0)  # one slot's stand together
        table = self.features
        return Writes(of.start, table.position[of], table.feature[of], table.activation[of], writer, layer)

    def output_bias(self, slot: Slot) -> Float[Tensor, "pos d_model"]:
        """`b_dec` of the dictionary that stands at a slot, at its write site; zero where none does."""
        zero, dictionary = torch.zeros_like(self.forward.embedding), self.coverage.at.get(slot)
        if dictionary is None:
            return zero
        if isinstance(dictionary, Crosscoder):
            return zero + dictionary.b_dec[dictionary.part(slot.layer)]
        return zero + dictionary.b_dec

    @cached_property
    def constants(self) -> dict[Slot, Float[Tensor, "pos d_model"]]:
        """What does not depend on any source, in the stream, by slot: biases through skips, norms and attention."""
        return {
            slot: self._constant(slot)
            for layer in range(self.n_layers)
            for slot in (Slot(layer, place) for place in Place)
            if slot.place not in RESIDUAL or slot in self.coverage.writes
        }

    def _constant(self, slot: Slot) -> Float[Tensor, "pos d_model"]:
        path, (layer, place) = self.path, slot
        zero = torch.zeros_like(self.forward.embedding)
        if place in RESIDUAL:
            return self.output_bias(slot)
        if slot not in self.coverage.writes and place is Place.ATTENTION:
            return path.attention(layer, zero)
        if slot not in self.coverage.writes:
            return path.write(layer, "mlp.hook_out", path.mlp(layer, zero))
        skip = path.skip(layer, zero) if place is Place.MLP else zero
        return path.write(layer, self.write_site(slot), self.output_bias(slot) + skip)

    # ---- what is read

    def feature_targets(self, index: Int[Tensor, " n"]) -> list[Targets]:
        """Pre-activations of the listed features, all of one slot, as targets; one object for each site they read.

        A feature's value is the sum over sites. Of an acausal crosscoder's feature, which stands at every layer that it
        writes, only reads up to its own layer are traced; those of later layers are part of the bias.
        """
        slot = Slot(int(self.features.layer[index[0]]), Place(int(self.features.place[index[0]])))
        assert self.filed_at(slot)[index].all()
        dictionary, positions = self.coverage.at[slot], self.features.position[index]
        x = self.read(dictionary)[positions]
        rows, biases = dictionary.encoder_rows(self.features.feature[index], x)
        if not isinstance(dictionary, Crosscoder):
            return [Targets(slot.layer, dictionary.read, positions, rows, biases, replaces_what_it_reads(dictionary))]
        parts, reads = rows.unflatten(1, (len(dictionary.parts), -1)), x.unflatten(1, (len(dictionary.parts), -1))
        later = torch.tensor([layer > slot.layer for layer in dictionary.part_layers], device=rows.device)
        biases = biases + (parts * reads)[:, later].sum((1, 2))
        return [
            Targets(
                layer,
                dictionary.read,
                positions,
                parts[:, part],
                biases if layer == slot.layer else torch.zeros_like(biases),
                True,
            )
            for part, layer in enumerate(dictionary.part_layers)
            if layer <= slot.layer
        ]

    def read_constant(self, layer: int, site: str, *, written: bool) -> Float[Tensor, "pos d_model"]:
        """What stands at a read site beyond what the sweep from there finds: biases on the way to the site.

        At the output of a linearised MLP or attention, also what the linearisation misses.
        """
        if not written:
            bias = self.path.weights.blocks[layer].ln2.bias
            return torch.zeros_like(self.forward.embedding) + (0.0 if bias is None or site != "mlp.hook_in" else bias)
        at, place = self.forward.blocks[layer].at, WRITES[site]
        if place in RESIDUAL:
            return torch.zeros_like(self.forward.embedding)
        stream = at["hook_resid_pre" if place is Place.ATTENTION or self.path.weights.parallel else "hook_resid_mid"]
        return at[site] - self._linear_at(layer, site, stream, written=True)

    def _linear_at(self, layer: int, site: str, stream: Tensor, *, written: bool) -> Float[Tensor, "pos d_model"]:
        """The linear part of what a residual stream (where attention or MLP reads it) puts at a read site."""
        if not written:
            return self.path.read(layer, site, stream, bias=False)
        if WRITES[site] in RESIDUAL:
            return stream
        part = self.path.raw_attention if WRITES[site] is Place.ATTENTION else self.path.mlp
        out = part(layer, stream, bias=False)
        behind = _RAW[WRITES[site]]
        return out if site == behind else self.path.write(layer, behind, out, bias=False)

    # ---- forwards

    def carry(
        self,
        added: Callable[[Slot], Float[Tensor, "*n pos d_model"] | None],
        embedding: Float[Tensor, "*n pos d_model"] | None = None,
    ) -> Iterator[Float[Tensor, "*n pos d_model"]]:
        """What writes at sites, or a change of the embeddings, do to the linear stream; no feature takes note.

        added: gives what is written at a slot, None for nothing; asked for each slot when it is reached. Yields the
        change where attention reads, layer by layer, and at last that at the last norm's input; without the leading
        axis as long as nothing is written.
        """
        path = self.path
        stream = torch.zeros_like(self.forward.embedding) if embedding is None else embedding

        def passed(slot: Slot, value: Tensor, x: Tensor) -> Tensor:
            if slot in self.coverage.writes:
                value = torch.zeros_like(x)
                if slot.place is Place.MLP and slot.layer in path.skips:
                    skip = path.skip(slot.layer, x, bias=False)
                    value = path.write(slot.layer, self.write_site(slot), skip, bias=False)
            if (more := added(slot)) is not None:
                value = value + path.write(slot.layer, self.write_site(slot), more, bias=False)
            return value

        for layer in range(self.n_layers):
            stream = passed(Slot(layer, Place.PRE), stream, stream)
            yield stream
            attention = passed(Slot(layer, Place.ATTENTION), path.attention(layer, stream, bias=False), stream)
            middle = path.middle(layer, stream, attention)
            if not path.weights.parallel:
                middle = passed(Slot(layer, Place.MID), middle, middle)
            raw = path.mlp(layer, middle, bias=False)
            mlp = passed(Slot(layer, Place.MLP), path.write(layer, "mlp.hook_out", raw, bias=False), middle)
            stream = (stream + attention if path.weights.parallel else middle) + mlp
            stream = passed(Slot(layer, Place.POST), stream, stream)
        yield stream

    def logits(self) -> Float[Tensor, "pos vocab"]:
        """The logits of the local model, every feature recomputed from its encoder row on the linear stream.

        They equal the language model's: the errors see to it.
        """
        path, weights = self.path, self.path.weights
        stream = self.forward.embedding
        if self.forward.position_embedding is not None:
            stream = stream + self.forward.position_embedding
        activation = torch.zeros_like(self.features.activation)
        for layer in range(self.n_layers):
            stream = self._pass(Slot(layer, Place.PRE), stream, stream, activation)
            attention = path.attention(layer, stream)
            attention = self._pass(Slot(layer, Place.ATTENTION), attention, stream, activation)
            middle = path.middle(layer, stream, attention)
            if not weights.parallel:
                middle = self._pass(Slot(layer, Place.MID), middle, middle, activation)
            mlp = self._pass(
                Slot(layer, Place.MLP), path.write(layer, "mlp.hook_out", path.mlp(layer, middle)), middle, activation
            )
            stream = (stream + attention if weights.parallel else middle) + mlp
            stream = self._pass(Slot(layer, Place.POST), stream, stream, activation)
        final = apply_norm(weights.ln_final, self.forward.ln_final_scale, stream)
        return soft_cap(final @ weights.W_U + weights.b_U, weights.logit_soft_cap)

    def _pass(self, slot: Slot, value: Tensor, x: Tensor, activation: Tensor) -> Float[Tensor, "pos d_model"]:
        """What a slot gives to the stream: `value` itself, what its dictionaries write instead, errors."""
        if slot not in self.slots:
            return value
        missed = self.errors[self.slots.index(slot)].clone()
        missed[0] += self.bos[self.slots.index(slot)]
        site, path = self.write_site(slot), self.path
        if slot not in self.coverage.writes:
            return value + path.write(slot.layer, site, missed, bias=False)
        self._recompute(slot, x, activation)
        missed = missed + self.output_bias(slot)
        if slot.place is Place.MLP:
            missed = missed + path.skip(slot.layer, x)
        for writes in self.writes[slot]:
            now = writes._replace(activation=activation[writes.first : writes.first + len(writes.feature)])
            missed.index_add_(0, now.position, now.vectors())
        return path.write(slot.layer, site, missed)

    def _recompute(self, slot: Slot, stream: Tensor, activation: Tensor) -> None:
        """Activations of a slot's features from the linear stream, written into `activation`."""
        index = self.filed_at(slot).nonzero()[:, 0]
        if not len(index):
            return
        total = torch.zeros_like(activation[index])
        for targets in self.feature_targets(index):
            layer, site, written = targets.layer, targets.site, targets.written
            if layer == slot.layer:
                x = self._linear_at(layer, site, stream, written=written)
                x = x + self.read_constant(layer, site, written=written)
            else:  # an earlier part of a crosscoder
                x = self.forward.blocks[layer].at[site]
            total = total + (targets.rows * x[targets.positions]).sum(-1) + targets.biases
        activation[index] = total


_RAW = {Place.ATTENTION: "attn.hook_out", Place.MLP: "mlp.hook_out"} | dict.fromkeys(RESIDUAL, "")


def soft_cap(logits: Float[Tensor, "*axes vocab"], cap: float | None) -> Float[Tensor, "*axes vocab"]:
    """`cap * tanh(logits / cap)`, or the logits as they are (Gemma 2)."""
    return logits if cap is None else cap * torch.tanh(logits / cap)
