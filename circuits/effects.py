"""Indirect effects of features and errors on a metric, and how faithful the circuits are that they pick.

Sparse feature circuits (Marks et al. 2024): dictionaries are spliced into the model with their errors, so that nothing
changes; a node is a feature, or an error, at one position. Its effect is what patching it alone does to the metric,
estimated from gradients through everything downstream; a circuit keeps some nodes and holds all others at their means.
Works on batches of prompts of one length whose tokens stand for the same at each position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from replacement import sites
from replacement.crosscoder import Crosscoder
from replacement.errors import InputError
from replacement.model import ReplacementModel
from replacement.sites import Place, Slot

Metric = Callable[[Float[Tensor, "batch pos vocab"]], Float[Tensor, " batch"]]
METHODS = ("attribution", "ig", "exact")


class Nodes(NamedTuple):
    """A value for every node, by slot: activations, effects, or whether it belongs to a circuit."""

    features: dict[Slot, Float[Tensor, "*batch pos n_features"]]
    errors: dict[Slot, Tensor]  # vectors [*batch, pos, d_model] as values, one number [pos] as an effect or member


Edit = Callable[[Slot, Tensor], Tensor]
"""Takes a slot and what stands there, gives what shall stand there."""


def spliced(
    model: ReplacementModel,
    tokens: Int[Tensor, "batch pos"],
    *,
    features: Edit | None = None,
    errors: Edit | None = None,
    leaves: Mapping[Slot, Tensor] | None = None,
) -> tuple[Float[Tensor, "batch pos vocab"], Nodes]:
    """Run the model with its dictionaries and their errors in place, edited as the run goes up; also what stood there.

    At a written slot the model's value x becomes x plus what the edits change: the features' writes and the error, both
    those of this run. Position 0 stays as it is. leaves: tensors that are added at written sites, to take gradients at.
    """
    if any(isinstance(dictionary, Crosscoder) for dictionary in model.coverage):
        raise InputError(f"spliced: {model.coverage.name} holds an acausal crosscoder; leave it out")
    model.require_own_precision("spliced dictionaries")
    run = _Spliced(model, features, errors, leaves or {})
    logits = model.bridge.run_with_hooks(tokens, fwd_hooks=run.hooks())
    return logits, run.values


class _Spliced:
    """The hooks of one run, and what they saw."""

    def __init__(
        self, model: ReplacementModel, features: Edit | None, errors: Edit | None, leaves: Mapping[Slot, Tensor]
    ) -> None:
        self.coverage, self.dtype, self.leaves = model.coverage, model.compute_dtype, leaves
        self.edit_features, self.edit_errors = features, errors
        self.values = Nodes({}, {})
        self.inputs: dict[Slot, Tensor] = {}  # what was read
        self.moved: dict[Slot, Tensor | float] = {}  # what edited features add at a slot, filled as the run goes up
        self.shifts: dict[int, Tensor] = {}  # by how much a block's middle was moved

    def hooks(self) -> list[sites.Hook]:
        """All reads before all writes, so that a site that is both is read as it was; but what an edited middle of the
        block does to its end is done before that is read.
        """
        hooks: list[sites.Hook] = []
        for layer in (slot.layer for slot in self.coverage.writes if slot.place is Place.MID):
            # the middle's hook feeds the MLP alone; the stream that goes by it changes as well
            hooks.append((sites.hook_name(layer, "hook_resid_post"), self._shifter(layer)))
        for slot, dictionary in self.coverage.at.items():
            hooks.append((sites.hook_name(slot.layer, dictionary.read), self._reader(slot)))
        for slot, site in self.coverage.writes.items():
            hooks.append((sites.hook_name(slot.layer, site), self._writer(slot)))
        return hooks

    def _reader(self, slot: Slot) -> Callable[..., None]:
        dictionary = self.coverage.at[slot]

        def hook(tensor: Tensor, hook: object) -> None:
            self.inputs[slot] = tensor.to(self.dtype)
            self.values.features[slot] = _without_first(dictionary.encode(self.inputs[slot]))
            if self.edit_features is None:
                return
            found = self.values.features[slot]
            change = _without_first(self.edit_features(slot, found) - found)
            for layer in dictionary.write_layers:
                written = Slot(layer, slot.place)
                self.moved[written] = self.moved.get(written, 0.0) + dictionary.decode(change, layer)

        return hook

    def _writer(self, slot: Slot) -> Callable[..., Tensor]:
        here = self.coverage.at.get(slot)

        def hook(tensor: Tensor, hook: object) -> Tensor:
            known = 0.0 if here is None else here.b_dec + here.skip(self.inputs[slot])
            for filed, writer in self.coverage.writers(slot):
                known = known + writer.decode(self.values.features[filed], slot.layer)
            error = self.values.errors[slot] = tensor - known
            new = tensor + self.moved.get(slot, 0.0)
            if self.edit_errors is not None:
                new = new + _without_first(self.edit_errors(slot, error) - error)
            if slot in self.leaves:
                new = new + self.leaves[slot]
            if slot.place is Place.MID:
                self.shifts[slot.layer] = new - tensor
            return new

        return hook

    def _shifter(self, layer: int) -> Callable[..., Tensor]:
        return lambda tensor, hook: tensor + self.shifts[layer]


def _without_first(values: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
    return torch.cat([torch.zeros_like(values[:, :1]), values[:, 1:]], 1)


def indirect_effects(
    model: ReplacementModel,
    clean: Int[Tensor, "batch pos"],
    patch: Int[Tensor, "batch pos"] | None,
    metric: Metric,
    *,
    method: str = "attribution",
    steps: int = 10,
) -> Nodes:
    """The mean effect on a metric of setting each node alone to its value on the patched prompt (Marks et al. 2024).

    `IE = m(x | do(a = a_patch)) - m(x)`, by position, averaged over pairs. method: "attribution" (attribution patching,
    `grad m . (a_patch - a)` at the clean prompt), "ig" (the gradient averaged over `steps` points between the two
    values of all nodes of a slot), or "exact" (one run a node: slow, for checks).

    patch: prompts of the same shape; None patches with zero. Raises InputError where the shapes differ, another method
    is asked for, or a crosscoder is acausal: its features read what comes after their writes.
    """
    _check(clean, patch, method)
    with torch.no_grad():
        logits, before = spliced(model, clean)
        after = _zero(before) if patch is None else spliced(model, patch)[1]
    if method == "exact":
        return _exact(model, clean, metric, before, after, metric(logits))
    shares = [0.0] if method == "attribution" else [(step + 0.5) / steps for step in range(steps)]
    if method == "attribution":
        at_sites = _gradients(model, clean, metric, list(model.coverage.writes))
        return _effects(model, before, after, dict.fromkeys(_slots(model), at_sites))
    found: dict[Slot, dict[Slot, Tensor]] = {}
    for slot in _slots(model):
        total: dict[Slot, Tensor] = {}
        for share in shares:
            way = _way(before, after, slot, share)
            for written, gradient in _gradients(model, clean, metric, _written(model, slot), *way).items():
                total[written] = total.get(written, torch.zeros_like(gradient)) + gradient / steps
        found[slot] = total
    return _effects(model, before, after, found)


def _check(clean: Tensor, patch: Tensor | None, method: str) -> None:
    if method not in METHODS:
        raise InputError(f"indirect_effects(method={method!r}): needs one of {', '.join(METHODS)}")
    if clean.ndim != 2 or (patch is not None and patch.shape != clean.shape):
        other = "" if patch is None else f" and {list(patch.shape)}"
        raise InputError(f"indirect_effects: prompts of shape {list(clean.shape)}{other}, needs two alike [batch, pos]")


def _slots(model: ReplacementModel) -> list[Slot]:
    return sorted({*model.coverage.at, *model.coverage.writes})


def _written(model: ReplacementModel, slot: Slot) -> list[Slot]:
    """Slots at which the features and the error of a slot stand."""
    layers = {slot.layer} if slot in model.coverage.writes else set()
    if slot in model.coverage.at:
        layers |= set(model.coverage.at[slot].write_layers)
    return [Slot(layer, slot.place) for layer in sorted(layers)]


def _zero(nodes: Nodes) -> Nodes:
    return Nodes(*({slot: torch.zeros_like(value) for slot, value in part.items()} for part in nodes))


def _way(before: Nodes, after: Nodes, slot: Slot, share: float) -> tuple[Edit, Edit]:
    """Edits that set the nodes of one slot to a point between their two values."""

    def edit(one: dict[Slot, Tensor], two: dict[Slot, Tensor]) -> Edit:
        def to(at: Slot, value: Tensor) -> Tensor:
            return one[at] + share * (two[at] - one[at]) if at == slot else value

        return to

    return edit(before.features, after.features), edit(before.errors, after.errors)


def _gradients(
    model: ReplacementModel,
    tokens: Int[Tensor, "batch pos"],
    metric: Metric,
    where: Sequence[Slot],
    features: Edit | None = None,
    errors: Edit | None = None,
) -> dict[Slot, Float[Tensor, "batch pos d_model"]]:
    """The metric's gradient at written sites, through all that the model does downstream."""
    width = model.weights.W_U.shape[0]
    with torch.enable_grad():
        leaves = {slot: torch.zeros(*tokens.shape, width, dtype=model.dtype, device=model.device) for slot in where}
        for leaf in leaves.values():
            leaf.requires_grad_()
        logits, _ = spliced(model, tokens, features=features, errors=errors, leaves=leaves)
        found = torch.autograd.grad(metric(logits).sum(), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def _effects(
    model: ReplacementModel, before: Nodes, after: Nodes, gradients: Mapping[Slot, Mapping[Slot, Tensor]]
) -> Nodes:
    """`grad . change` of every node, averaged over the batch."""
    features, errors = {}, {}
    with torch.no_grad():
        for slot, dictionary in model.coverage.at.items():
            every = torch.arange(dictionary.n_features, device=model.device)
            pulls = [
                gradients[slot][Slot(layer, slot.place)] @ dictionary.write_rows(every, layer).T
                for layer in dictionary.write_layers
            ]
            change = after.features[slot] - before.features[slot]
            features[slot] = (torch.stack(pulls).sum(0) * change).mean(0)
        for slot in model.coverage.writes:
            change = after.errors[slot] - before.errors[slot]
            errors[slot] = (gradients[slot][slot] * change).sum(-1).mean(0)
            errors[slot][0] = 0.0
    return Nodes(features, errors)


def _exact(model: ReplacementModel, clean: Tensor, metric: Metric, before: Nodes, after: Nodes, base: Tensor) -> Nodes:
    """One run a node."""
    effects = Nodes(
        {slot: torch.zeros(value.shape[1:]) for slot, value in before.features.items()},
        {slot: torch.zeros(value.shape[1]) for slot, value in before.errors.items()},
    )

    def run(kind: int, slot: Slot, index: list[int]) -> float:
        def edit(at: Slot, value: Tensor) -> Tensor:
            if at != slot:
                return value
            here = torch.zeros_like(value, dtype=torch.bool)
            at_position = here[:, index[0]]
            at_position[:, index[1:] or slice(None)] = True
            return torch.where(here, after[kind][slot], value)

        features, errors = (edit, None) if kind == 0 else (None, edit)
        return float((metric(spliced(model, clean, features=features, errors=errors)[0]) - base).mean())

    with torch.no_grad():
        for slot, value in before.features.items():
            for position, feature in ((value != after.features[slot]).any(0)).nonzero().tolist():
                effects.features[slot][position, feature] = run(0, slot, [position, feature])
        for slot, effect in effects.errors.items():
            for position in range(1, len(effect)):
                effect[position] = run(1, slot, [position])
    return effects


# ---- circuits


def strongest(effects: Nodes, n: int, *, errors: bool = True) -> Nodes:
    """The circuit of the n nodes with the largest absolute effect, as masks; errors: whether they may take part."""
    parts = [*effects.features.values(), *(effects.errors.values() if errors else ())]
    sizes = torch.cat([part.abs().flatten() for part in parts])
    chosen = torch.zeros(len(sizes), dtype=torch.bool)
    chosen[sizes.topk(min(n, int((sizes > 0).sum()))).indices.cpu()] = True
    pieces = iter(chosen.split([part.numel() for part in parts]))
    features = {slot: next(pieces).view(value.shape) for slot, value in effects.features.items()}
    members = {slot: torch.zeros(value.shape, dtype=torch.bool) for slot, value in effects.errors.items()}
    if errors:
        members = {slot: next(pieces) for slot in effects.errors}
    return Nodes(features, members)


def means(model: ReplacementModel, tokens: Int[Tensor, "batch pos"]) -> Nodes:
    """Every node's mean by position over prompts, what the nodes outside a circuit are held at."""
    with torch.no_grad():
        _, values = spliced(model, tokens)
        return Nodes(*({slot: value.mean(0) for slot, value in part.items()} for part in values))


def metric_of_circuit(
    model: ReplacementModel, tokens: Int[Tensor, "batch pos"], metric: Metric, circuit: Nodes, held: Nodes
) -> float:
    """The metric's mean over prompts with every node outside the circuit at its held value."""

    def keep(members: dict[Slot, Bool[Tensor, "*axes"]], values: dict[Slot, Tensor]) -> Edit:
        def edit(slot: Slot, value: Tensor) -> Tensor:
            member = members[slot].to(value.device)
            member = member if member.ndim == values[slot].ndim else member[:, None]
            return torch.where(member, value, values[slot])

        return edit

    with torch.no_grad():
        logits, _ = spliced(
            model, tokens, features=keep(circuit.features, held.features), errors=keep(circuit.errors, held.errors)
        )
        return float(metric(logits).mean())


class Faithfulness(NamedTuple):
    """How much of a metric a circuit gives, and how much is left without it."""

    nodes: int
    faithfulness: float  #: `F(C) = (m(C) - m(0)) / (m(M) - m(0))`
    completeness: float  #: `F(M \\ C)`: the rest of the model; small where the circuit misses nothing


def faithfulness(
    model: ReplacementModel, tokens: Int[Tensor, "batch pos"], metric: Metric, circuit: Nodes, held: Nodes
) -> Faithfulness:
    """`F(C) = (m(C) - m(0)) / (m(M) - m(0))` and F(M \\ C), with M the whole model and 0 the empty circuit."""

    def run(members: Nodes) -> float:
        return metric_of_circuit(model, tokens, metric, members, held)

    def like(value: Callable[[Tensor], Tensor]) -> Nodes:
        return Nodes(*({slot: value(member) for slot, member in part.items()} for part in circuit))

    empty, whole = run(like(torch.zeros_like)), run(like(torch.ones_like))
    size = sum(int(member.sum()) for part in circuit for member in part.values())
    span = whole - empty
    if span == 0:
        raise InputError("faithfulness: the metric is the same with all nodes and with none; nothing can be compared")
    return Faithfulness(size, (run(circuit) - empty) / span, (run(like(torch.logical_not)) - empty) / span)
