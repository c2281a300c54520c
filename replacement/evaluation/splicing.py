"""Dictionaries spliced into a language model: the model's sites overwritten by what dictionaries write there.

Works with any TransformerBridge and any dictionary whose sites are hooks of it. Knows hooks by name only, and nothing
of figures.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from replacement.crosscoder import Crosscoder
from replacement.dictionary import Dictionary, DictionarySet
from replacement.errors import InputError
from replacement.sites import hook_name
from replacement.starts import start_token, start_tokens
from replacement.substitution import Ablation, Replacement, Substitution, read_hooks, reads_ahead

Activations = Mapping[str, Float[Tensor, "*tokens width"]]
"""Full hook name -> activations at the same tokens."""
Encodings = Mapping[int, Float[Tensor, "*tokens n_features"]]
"""Layer under which a set files a dictionary -> its features' activations."""


class Pass(NamedTuple):
    """What one forward pass left behind."""

    logits: Float[Tensor, "batch pos vocab"]
    values: dict[str, Float[Tensor, "batch pos width"]]  # hook -> what stood there, before anything was overwritten


def written_hooks(dictionaries: Iterable[Dictionary]) -> tuple[str, ...]:
    """Full names of all hooks that dictionaries write, by layer."""
    found = {(layer, hook_name(layer, one.write)) for one in dictionaries for layer in one.write_layers}
    return tuple(name for _, name in sorted(found))


def encode(dictionaries: DictionarySet, activations: Activations) -> dict[int, Float[Tensor, "*tokens n_features"]]:
    """Features of every dictionary at the given activations of all hooks that are read."""
    return {layer: _encode(one, activations) for layer, one in sorted(dictionaries.by_layer.items())}


def reconstruct(
    dictionaries: DictionarySet, hook: str, activations: Activations, encodings: Encodings
) -> Float[Tensor, "*tokens width"]:
    """What all dictionaries together write at a hook: `sum_d a_d W_dec[hook] + b_dec (+ W_skip x)`.

    hook: one of `written_hooks(dictionaries)`. activations: at every hook that its writers read.
    """
    writers = [one for one in dictionaries if hook in written_hooks([one])]
    return sum((_written(one, hook, activations, encodings) for one in writers), torch.zeros(()))


def _encode(dictionary: Dictionary, activations: Activations) -> Float[Tensor, "*tokens n_features"]:
    x = [activations[name] for name in read_hooks(dictionary)]
    return dictionary.encode((x[0] if len(x) == 1 else torch.cat(x, -1)).to(dictionary.b_dec.dtype))


def _written(
    dictionary: Dictionary, hook: str, activations: Activations, encodings: Encodings
) -> Float[Tensor, "*tokens width"]:
    layer = next(layer for layer in dictionary.write_layers if hook_name(layer, dictionary.write) == hook)
    value = dictionary.decode(encodings[dictionary.layer], layer)
    if isinstance(dictionary, Crosscoder):
        return value + dictionary.b_dec[dictionary.part(layer)]
    if layer == dictionary.layer:
        x = activations[read_hooks(dictionary)[0]] if dictionary.W_skip is not None else None
        value = value + dictionary.b_dec + (0.0 if x is None else dictionary.skip(x.to(value.dtype)))
    return value


class Splice:
    """A model whose sites can be overwritten by dictionaries, one site or all of them.

    A dictionary reads what stands at its hooks in the very run that it writes into, so that what lower sites lost
    reaches it. One that reads a hook above the lowest it writes (a crosscoder of several parts) can't, and reads the
    original's run.
    """

    def __init__(self, bridge: Any, dictionaries: DictionarySet, *, keep_starts: bool = True) -> None:
        """Take a TransformerBridge and dictionaries that fit it.

        keep_starts: start tokens, the first of each row and others inside it, keep the model's own values, as
        dictionaries are not trained on them. Raises `InputError` for a hook that the model lacks, or a crosscoder of
        several models.
        """
        self.bridge, self.dictionaries, self.keep_starts = bridge, dictionaries, keep_starts
        self._start = None if bridge.tokenizer is None else start_token(bridge.tokenizer)
        parameter = next(bridge.parameters())
        self.device = parameter.device
        compute = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        for one in dictionaries:
            one.requires_grad_(False).to(device=self.device, dtype=compute)
            if isinstance(one, Crosscoder) and len(one.models) > 1:
                raise InputError(
                    f"dictionaries {dictionaries.name}: a crosscoder of models {', '.join(one.models)} can't be "
                    "spliced into one of them; evaluate it on cached activations"
                )
        self.reads = tuple(dict.fromkeys(name for one in dictionaries for name in read_hooks(one)))
        self.writes = written_hooks(dictionaries)
        for name in (*self.reads, *self.writes):
            if name not in bridge.hook_dict:
                raise InputError(
                    f"dictionaries {dictionaries.name}: read or write {name}, which is no hook of this model; "
                    "pass the model that they were trained on"
                )
        self._widths = {name: one.d_out for one in dictionaries for name in written_hooks([one])}
        for one in dictionaries:
            self._widths |= {name: one.d_in // len(read_hooks(one)) for name in read_hooks(one)}
        self._compute = compute
        self._from_original = any(reads_ahead(one) for one in dictionaries)

    def counted(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """Where dictionaries stand in for the model and figures are taken: all tokens but the start tokens kept."""
        ids = tokens.to(self.device)
        return ~start_tokens(ids, self._start) if self.keep_starts else torch.ones_like(ids, dtype=torch.bool)

    def original(self, tokens: Int[Tensor, "batch pos"], keep: Collection[str] = ()) -> Pass:
        """The model's own run, and what stood at the hooks in `keep`."""
        return self._run(tokens, keep)

    def replaced(
        self, tokens: Int[Tensor, "batch pos"], sites: Sequence[str] | None = None, keep: Collection[str] = ()
    ) -> Pass:
        """The run with written hooks (None: all of them) overwritten by the dictionaries, no error terms."""
        clean = None
        if self._from_original:
            found = self.original(tokens, self.reads).values
            clean = {name: value.to(self._compute) for name, value in found.items()}
        return self._run(tokens, keep, Substitution(self.dictionaries, only=sites, original=clean))

    def ablated(self, tokens: Int[Tensor, "batch pos"], sites: Sequence[str] | None = None) -> Pass:
        """The run with written hooks (None: all of them) overwritten by zero."""
        return self._run(tokens, (), Ablation(self.writes if sites is None else sites))

    @torch.no_grad()
    def _run(
        self, tokens: Int[Tensor, "batch pos"], keep: Collection[str], replacement: Replacement | None = None
    ) -> Pass:
        values: dict[str, Tensor] = {}
        replace = self.counted(tokens)[..., None]

        def hook_function(name: str) -> Callable[..., Tensor | None]:
            def function(tensor: Tensor, hook: object) -> Tensor | None:
                if tensor.ndim < 3:
                    raise InputError(f"site {name}: has shape {list(tensor.shape)}, needs [batch, pos, ...]")
                flat = tensor.flatten(2)  # heads side by side
                if (width := self._widths.get(name, flat.shape[2])) != flat.shape[2]:
                    raise InputError(
                        f"dictionaries {self.dictionaries.name}: read or write vectors of width {width} at {name}, "
                        f"where this model has {flat.shape[2]}; pass the model that they were trained on"
                    )
                if name in keep:
                    values[name] = flat
                if replacement is None:
                    return None
                replacement.read(name, flat.to(self._compute))
                if (new := replacement.write(name)) is None:
                    return None
                return torch.where(replace, new.to(tensor.dtype), flat).reshape(tensor.shape)

            return function

        names = {*keep} if replacement is None else {*keep, *self.reads, *self.writes}
        with warnings.catch_warnings():  # the bridge warns that edited norms round differently; that is meant here
            warnings.simplefilter("ignore", UserWarning)
            hooks = [(name, hook_function(name)) for name in sorted(names)]
            return Pass(self.bridge.run_with_hooks(tokens.to(self.device), fwd_hooks=hooks), values)
