"""Activations of a language model at many sites from one forward pass a batch, without the tokens that mislead.

Left out by default: the first position and every start token, and tokens at which the residual stream is of very high
norm (a few tokens of most models hold constant, huge activations that would dominate every loss). It is the stream that
is looked at, not the sites: what an MLP writes varies a lot between tokens that all matter. A token that is left out is
left out at all sites, so that row i is the same token everywhere. Knows nothing of dictionaries.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from replacement.errors import InputError
from replacement.finite import all_finite
from replacement.sites import hook_name
from replacement.starts import start_token, start_tokens
from replacement.training.data.tokens import TokenSource

_SAMPLES = 64


class TokenCounts(NamedTuple):
    """What became of the tokens of all batches asked for so far."""

    kept: int = 0
    starts: int = 0  #: first positions and start tokens that were left out
    high_norm: int = 0  #: tokens left out because of their norm


class Harvest(NamedTuple):
    """One batch before anything is dropped."""

    activations: dict[str, Float[Tensor, "tokens width"]]
    starts: Bool[Tensor, " tokens"]  #: first positions and start tokens, where they are to be dropped
    high: Bool[Tensor, " tokens"]  #: other tokens of very high norm


class BridgeActivations:
    """A TransformerBridge's activations by batch number; a source for training and for `write_activations`.

    The forward pass ends as soon as the last wanted site is there: no later layer is computed, and no logits.
    """

    def __init__(
        self,
        bridge: Any,
        tokens: TokenSource,
        *,
        sites: Sequence[str],
        documents: int,
        drop_bos: bool = True,
        drop_norm: float | None = 10.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Take a bridge and its tokens.

        sites: full hook names, such as `blocks.3.mlp.hook_in`.
        documents: rows of tokens of one batch.
        drop_bos: whether the first position and all start tokens are left out.
        drop_norm: a token is left out where the norm of its residual stream, after any block that has a site in it, is
            more than this many times the median of its batch there; None keeps all.
        dtype: of the activations that `batch` returns.
        Raises `InputError` for a site that the model does not have.
        """
        if not sites or len(set(sites)) != len(sites):
            raise InputError(f"BridgeActivations(sites={tuple(sites)}): needs at least one site, each once")
        if documents < 1:
            raise InputError(f"BridgeActivations(documents={documents}): needs at least 1")
        if drop_norm is not None and not drop_norm > 1:
            raise InputError(f"BridgeActivations(drop_norm={drop_norm}): needs a number above 1, or None to keep all")
        require_sites(bridge, sites)
        self.bridge, self.tokens, self.sites, self.documents = bridge, tokens, tuple(sites), documents
        self.drop_bos, self.drop_norm, self.dtype = drop_bos, drop_norm, dtype
        self.counts = TokenCounts()
        self._start = None if bridge.tokenizer is None else start_token(bridge.tokenizer)
        known = bridge.hook_dict
        self._streams: tuple[str, ...] = ()
        if drop_norm is not None:
            self._streams = tuple(dict.fromkeys(_stream(site) if _stream(site) in known else site for site in sites))

    def batch(self, index: int) -> dict[str, Float[Tensor, "tokens width"]]:
        """The index-th batch, site by site.

        Raises `InputError` for activations that are not finite, or when no token is left.
        """
        harvest = self.harvest(index)
        self.counts = _count(self.counts, harvest, self.tokens, index)
        return _kept(harvest, harvest.starts | harvest.high, self.dtype)

    def harvest(self, index: int) -> Harvest:
        """The index-th batch with all its tokens, and which of them the filters would drop."""
        ids = self.tokens.batch(index, self.documents).to(next(self.bridge.parameters()).device)
        found, norms = forward(self.bridge, ids, self.sites, norms_of=self._streams)
        activations = {name: part.flatten(0, 1).flatten(1) for name, part in found.items()}
        for name, part in activations.items():
            require_finite(part, site=name, index=index)
        starts = self._starts(ids)
        return Harvest(activations, starts, self._high(norms, starts, index))

    @property
    def fingerprint(self) -> str:
        """Changes whenever the activations do: a hash of the model's weights (sampled), tokens, sites and filters."""
        return self._digest(str(self.dtype))

    @property
    def origin(self) -> str:
        """The same, whatever the precision that they are given in."""
        return self._digest()

    def _digest(self, *more: str) -> str:
        digest = hashlib.sha256()
        for name, parameter in self.bridge.named_parameters():
            flat = parameter.detach().flatten()
            sample = flat[:: max(1, flat.numel() // _SAMPLES)].double().cpu()
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + sample.numpy().tobytes())
        filters = (self.drop_bos, self.drop_norm)
        settings = (self.tokens.fingerprint, self.sites, self.documents, filters, *more)
        digest.update(json.dumps(settings).encode())
        return digest.hexdigest()

    def _starts(self, ids: Int64[Tensor, "documents pos"]) -> Bool[Tensor, " tokens"]:
        found = start_tokens(ids, self._start) if self.drop_bos else torch.zeros_like(ids, dtype=torch.bool)
        return found.flatten()

    def _high(
        self, norms: Mapping[str, Float[Tensor, "documents pos"]], starts: Bool[Tensor, " tokens"], index: int
    ) -> Bool[Tensor, " tokens"]:
        """Tokens other than start tokens whose norm is too high somewhere; a few may even overflow."""
        high = torch.zeros_like(starts)
        if self.drop_norm is None or starts.all():
            return high
        for name, found in norms.items():
            norm = found.flatten()
            median = norm[~starts].median()  # NaN where any norm is: no norm is above that
            if not median.isfinite():
                raise InputError(
                    f"norms of {name}, batch {index}: are not finite (NaN or inf); load the model in float32, or look "
                    "at its weights"
                )
            high |= norm > self.drop_norm * median
        return high & ~starts


class JointActivations:
    """Several models' activations at the same tokens, for crosscoders that compare models.

    A site is called `name:site`; a token that any model's filters drop is dropped for all.
    """

    def __init__(self, parts: Mapping[str, BridgeActivations]) -> None:
        """Take each model's source by name; raises `InputError` unless all read the same tokens."""
        sources = list(parts.values())
        if len({(part.tokens.fingerprint, part.documents) for part in sources}) != 1:
            raise InputError(
                f"JointActivations({', '.join(parts)}): needs the same tokens and number of documents for all models"
            )
        self.parts = dict(parts)
        self.sites = tuple(f"{name}:{site}" for name, part in parts.items() for site in part.sites)
        self.counts = TokenCounts()

    def batch(self, index: int) -> dict[str, Float[Tensor, "tokens width"]]:
        """The index-th batch of all models; raises `InputError` as theirs do."""
        found = {name: part.harvest(index) for name, part in self.parts.items()}
        starts = torch.stack([one.starts.cpu() for one in found.values()]).any(0)
        high = torch.stack([one.high.cpu() for one in found.values()]).any(0) & ~starts
        first = next(iter(self.parts.values()))
        self.counts = _count(self.counts, Harvest({}, starts, high), first.tokens, index)
        return {
            f"{name}:{site}": part
            for name, one in found.items()
            for site, part in _kept(one, starts | high, self.parts[name].dtype).items()
        }

    @property
    def fingerprint(self) -> str:
        """Changes whenever any model's activations do."""
        return _hash_of([[name, part.fingerprint] for name, part in self.parts.items()])

    @property
    def origin(self) -> str:
        """The same, whatever the precision that they are given in."""
        return _hash_of([[name, part.origin] for name, part in self.parts.items()])


def _hash_of(words: Sequence[Sequence[str]]) -> str:
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def _count(counts: TokenCounts, harvest: Harvest, tokens: TokenSource, index: int) -> TokenCounts:
    """The counts after a batch; raises `InputError` when it has no token left."""
    starts, high = int(harvest.starts.sum()), int(harvest.high.sum())
    kept = len(harvest.starts) - starts - high
    if not kept:
        raise InputError(
            f"BridgeActivations(drop_bos, drop_norm): no token of batch {index} is left of {len(harvest.starts)} "
            f"({starts} start tokens, {high} of high norm); pass longer rows than {tokens.context}, or drop_norm=None"
        )
    return TokenCounts(counts.kept + kept, counts.starts + starts, counts.high_norm + high)


def _kept(
    harvest: Harvest, dropped: Bool[Tensor, " tokens"], dtype: torch.dtype
) -> dict[str, Float[Tensor, "tokens width"]]:
    if not dropped.any():
        return {name: part.to(dtype) for name, part in harvest.activations.items()}
    return {name: part[(~dropped).to(part.device)].to(dtype) for name, part in harvest.activations.items()}


def _stream(site: str) -> str:
    """The residual stream after the block that a site is in; a site outside of blocks stands for itself."""
    parts = site.split(".")
    return hook_name(int(parts[1]), "hook_resid_post") if parts[0] == "blocks" else site


class _EnoughError(Exception):
    """All wanted sites are there."""


class Pass(NamedTuple):
    """What one forward pass left behind."""

    activations: dict[str, Float[Tensor, "batch pos *width"]]
    norms: dict[str, Float[Tensor, "batch pos"]]  #: of each token's vector


def forward(
    bridge: Any, tokens: Int64[Tensor, "batch pos"], sites: Sequence[str], *, norms_of: Sequence[str] = ()
) -> Pass:
    """What one forward pass leaves at the sites, stopping once the last one is there.

    norms_of: sites of which only the norms are kept. Raises `InputError` for a site that holds no vector a token, or is
    never reached.
    """
    found, norms = dict[str, Tensor](), dict[str, Tensor]()

    def keep(into: dict[str, Tensor], name: str, change: Callable[[Tensor], Tensor]) -> Callable[..., None]:
        def hook(tensor: Tensor, hook: object) -> None:
            into[name] = change(tensor.detach())
            if len(found) == len(sites) and len(norms) == len(norms_of):
                raise _EnoughError

        return hook

    hooks = [(name, keep(found, name, lambda x: x)) for name in sites]
    hooks += [(name, keep(norms, name, lambda x: x.float().flatten(2).norm(dim=2))) for name in norms_of]
    try:
        with torch.no_grad():
            bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type=None, use_cache=False)
    except _EnoughError:
        pass
    except ValueError as error:  # hooks that are behind a switch of the bridge
        raise InputError(f"sites: {' '.join(str(error).split())}") from error
    for name in (*sites, *norms_of):
        if name not in found and name not in norms:
            raise InputError(f"site {name!r}: is never reached in this model's forward pass; pass another")
    for name in sites:
        if found[name].ndim < 3 or found[name].shape[:2] != tokens.shape:
            raise InputError(f"site {name!r}: needs a vector a token, got {list(found[name].shape)}; pass another")
    return Pass({name: found[name] for name in sites}, norms)


def require_sites(bridge: Any, sites: Sequence[str]) -> None:
    """Raise `InputError`, with near names, for a site that the model does not have."""
    known = bridge.hook_dict
    for name in sites:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"near: {', '.join(near)}" if near else "its sites look like blocks.0.mlp.hook_in"
            raise InputError(f"site {name!r}: the model {bridge.cfg.model_name} does not have it; {hint}")


def require_finite(values: Tensor, *, site: str, index: int) -> None:
    """Raise `InputError` where activations are NaN or infinite."""
    if not all_finite(values):
        raise InputError(
            f"activations of {site}, batch {index}: are not finite (NaN or inf); load the model in float32, "
            "or look at its weights"
        )
