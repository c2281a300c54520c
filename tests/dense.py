"""Dictionaries in training written again from their papers: dense products in float64, gradients by autograd alone.

What the trainer's sparse kernels, straight-through estimators and losses are held against. Shares with it the names of
parameters, and no function.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from replacement.training import Trainee, TrainingConfig
from replacement.training.kinds import Plan


class Fired(NamedTuple):
    """What one dictionary makes of a batch of scaled inputs."""

    activations: Tensor  # [tokens, n_features]
    penalty: Tensor  # [], with its weight
    gate: Tensor | None  # [tokens, n_features], of gated dictionaries


def leaves(trainee: Trainee) -> dict[str, Tensor]:
    """All parameters in float64, by name, as leaves of a graph of their own.

    A gated dictionary's magnitude bias is `b_mag`, also where its parameter is `shift = b_mag - exp(r_mag) b_enc`.
    """
    found = {name: p.detach().double() for name, p in trainee.named_parameters()}
    for name in [name for name in found if name.endswith("sparsity.shift")]:
        coder = name.removesuffix("sparsity.shift")
        found[name] = found[name] + found[f"{coder}sparsity.r_mag"].exp() * found[f"{coder}b_enc"]
    return {name: tensor.requires_grad_() for name, tensor in found.items()}


def coder_of(leaf: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """The leaves of one dictionary, without the beginnings of their names."""
    of = {name.removeprefix(f"coders.{index}."): t for name, t in leaf.items() if name.startswith(f"coders.{index}.")}
    own = {name.removeprefix("sparsity."): t for name, t in of.items()}
    return {("b_mag" if name == "shift" else name): t for name, t in own.items()}


def stepped(v: Tensor, threshold: Tensor, width: float) -> Tensor:
    """`[v > threshold]`; to gradients it is a ramp from 0 to 1 over `width`, its middle at the threshold
    (Rajamanoharan et al. 2024, with a box as kernel).
    """
    ramp = ((v - threshold) / width + 0.5).clamp(0, 1)
    return (v > threshold) + ramp - ramp.detach()


def jumped(v: Tensor, threshold: Tensor, width: float) -> Tensor:
    """`v [v > threshold]`, whose jump at the threshold is as high as the threshold."""
    step = stepped(v, threshold, width)
    return v * step.detach() + threshold.detach() * (step - step.detach())


def largest(v: Tensor, k: int) -> Tensor:
    """The k largest of each row, also where they are negative; zeros elsewhere."""
    return torch.where(v >= v.topk(k, dim=1).values[:, -1:], v, 0.0)


def first_weight(activations: Tensor, k: int) -> Tensor:
    """The weight of a penalty in the first step: 0.03, times `e^4.2` for every factor e of fires above 2 k a token."""
    too_many = ((activations > 0).sum() / len(activations) / (2 * k)).log().clamp(-1, 1)
    return 0.03 * (4.2 * too_many).exp()


def fired(config: TrainingConfig, of: Mapping[str, Tensor], x: Tensor, levels: Tensor | None = None) -> Fired:
    """One dictionary with the first step's penalty.

    of: its leaves. x: float64. levels: of batchtopk, the pre-activation above which each feature fires.
    """
    k, linear = config.k_of(0, 1), x @ of["W_enc"].T
    pre, norms = linear + of["b_enc"], of["W_dec"].flatten(1).norm(dim=1)
    none, each = torch.zeros((), dtype=x.dtype), 1 / (len(x) * k)
    if config.sparsity == "topk":
        return Fired(largest(pre, k), none, None)
    if config.sparsity == "batchtopk":
        assert levels is not None
        return Fired(torch.where(pre > levels, pre, 0.0), none, None)
    if config.sparsity == "relu":
        a = pre.relu()
        return Fired(a, first_weight(a, k) * (a * norms).sum() * each, None)
    if config.sparsity == "gated":
        a = torch.where(pre > 0, (of["r_mag"].exp() * linear + of["b_mag"]).relu(), 0.0)
        return Fired(a, first_weight(a, k) * (pre.relu() * norms.detach()).sum() * each, pre.relu())
    a = jumped(pre, of["threshold"], config.bandwidth)
    if config.penalty == "tanh":
        return Fired(a, first_weight(a, k) * (4 * a * norms).tanh().sum() * each, None)
    fires = stepped(pre, of["threshold"], config.bandwidth).sum(1).mean()
    return Fired(a, (fires / k - 1).square(), None)


def scales(sample: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What brings activations to norm sqrt(width) on average, site by site."""
    return {name: t.shape[1] ** 0.5 / t.double().norm(dim=1).mean() for name, t in sample.items()}


def losses(
    config: TrainingConfig,
    planned: list[Plan],
    leaf: Mapping[str, Tensor],
    scaled: Mapping[str, Tensor],
    levels: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Reconstruction and penalty of a batch of scaled activations.

    `sum over sites of the mean of |y - y_p|^2 over tokens, widths and prefixes p`, and for gates alone the same with
    everything frozen but the gates.
    """
    written = list(dict.fromkeys(name for plan in planned for name in plan.writes))
    sizes = (*config.prefixes, config.width)
    out = {name: [leaf[f"b_dec.{i}"] for _ in sizes] for i, name in enumerate(written)}
    alone = {name: leaf[f"b_dec.{i}"].detach() for i, name in enumerate(written)}
    penalty = torch.zeros((), dtype=torch.float64)
    for index, plan in enumerate(planned):
        of, x = coder_of(leaf, index), torch.cat([scaled[name] for name in plan.reads], 1)
        one = fired(config, of, x, levels[index] if levels else None)
        penalty = penalty + one.penalty
        for j, name in enumerate(plan.writes):
            skip = x @ of["W_skip"].T if plan.skip and j == 0 else torch.zeros_like(scaled[name])
            parts = [one.activations[:, :p] @ of["W_dec"][:p, j] for p in sizes]
            out[name] = [before + part + skip for before, part in zip(out[name], parts, strict=True)]
            if one.gate is not None:
                alone[name] = alone[name] + one.gate @ of["W_dec"][:, j].detach() + skip.detach()
    total = torch.zeros((), dtype=torch.float64)
    for name in written:
        total = total + torch.stack([(scaled[name] - each).square().mean() for each in out[name]]).mean()
        if config.sparsity == "gated":
            total = total + (scaled[name] - alone[name]).square().mean()
    return total, penalty
