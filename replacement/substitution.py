"""Dictionaries in a model's place, with no error terms: what is read and what is written instead, hook by hook.

Whoever runs a model calls `read` and `write` as it comes by the hooks. Knows nothing of how the model is run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from replacement.crosscoder import Crosscoder
from replacement.dictionary import Dictionary, DictionarySet
from replacement.sites import hook_name


class Replacement(Protocol):
    """What is put in a model's place at some of its hooks, called in the order in which the model comes by them."""

    def read(self, name: str, x: Float[Tensor, "*batch width"]) -> None:
        """Take note of the activations at a hook that is read."""
        ...

    def write(self, name: str) -> Float[Tensor, "*batch width"] | None:
        """What a written hook is to hold instead; None to leave it as it is."""
        ...


def read_hooks(dictionary: Dictionary) -> tuple[str, ...]:
    """Full names of the hooks that a dictionary reads, side by side where there are several."""
    return dictionary.parts if isinstance(dictionary, Crosscoder) else (hook_name(dictionary.layer, dictionary.read),)


def reads_ahead(dictionary: Dictionary) -> bool:
    """Whether a dictionary reads hooks that come after one that it writes: an acausal crosscoder of several parts."""
    return len(read_hooks(dictionary)) > 1


class Substitution:
    """A set of dictionaries as a `Replacement`, for one forward pass.

    A written hook holds `sum over its dictionaries of a W_dec + b_dec (+ W_skip x)`. A dictionary that `reads_ahead`
    needs `original`, the activations of a pass in which nothing was replaced.
    """

    def __init__(
        self,
        dictionaries: DictionarySet,
        *,
        only: Collection[str] | None = None,
        original: Mapping[str, Float[Tensor, "*batch width"]] | None = None,
    ) -> None:
        """only: the written hooks that are replaced; None for all."""
        self.only = only
        self._readers: dict[str, Dictionary] = {}
        self._waiting: dict[str, Tensor] = {}
        for dictionary in dictionaries:
            if reads_ahead(dictionary):
                assert isinstance(dictionary, Crosscoder)
                assert original is not None, "a crosscoder needs the original's activations"
                parts = dictionary(torch.cat([original[name] for name in dictionary.parts], -1))
                for index, name in enumerate(dictionary.parts):
                    self._waiting[name] = parts[..., index, :]
            else:
                self._readers[read_hooks(dictionary)[0]] = dictionary

    def read(self, name: str, x: Float[Tensor, "*batch width"]) -> None:
        if (dictionary := self._readers.get(name)) is None:
            return
        activations = dictionary.encode(x)
        for layer in dictionary.write_layers:
            written = hook_name(layer, dictionary.write)
            if self.only is not None and written not in self.only:
                continue
            out = dictionary.decode(activations, layer)
            if layer == dictionary.layer:
                out = out + dictionary.b_dec + dictionary.skip(x)
            self._waiting[written] = self._waiting[written] + out if written in self._waiting else out

    def write(self, name: str) -> Float[Tensor, "*batch width"] | None:
        if self.only is not None and name not in self.only:
            return None
        return self._waiting.get(name)


class Ablation:
    """Zeros in place of written hooks."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = names
        self._like: Tensor | None = None

    def read(self, name: str, x: Float[Tensor, "*batch width"]) -> None:
        self._like = x

    def write(self, name: str) -> Float[Tensor, "*batch width"] | None:
        assert self._like is not None, "nothing was read before"
        return torch.zeros_like(self._like) if name in self.names else None
