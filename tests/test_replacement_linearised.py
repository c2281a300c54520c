"""Each rule's map of an MLP, and attention's gradient, are what `torch.autograd` makes of the model's own modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jvp, vjp

from replacement.linearised import MLP_RULES, Linearisation, attention_gradients, linear_mlp
from replacement.neurons import neurons
from tests.tiny import FAMILIES, PROMPT

STEPS = 3


@pytest.mark.parametrize("rule", [rule for rule in MLP_RULES if rule != "stop"])  # where nothing passes is no map
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rule_is_autograd_of_the_models_own_mlp(tiny_model, monkeypatch, family, rule):
    """The gradient there for the Jacobian, its mean over the way from zero for IG, with held ratios for RelP."""
    bridge = tiny_model(family).bridge
    mlp = bridge.blocks[1].mlp.original_component
    own = neurons(bridge, torch.float64, layers=[1]).by_layer[1]
    x, along, gradient = torch.randn(3, 5, own.d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = linear_mlp(own, x, Linearisation(mlp=rule, steps=STEPS))
    share, points = 1.0, [x]
    if rule == "ig":
        points = [(step + 0.5) / STEPS * x for step in range(STEPS)]
    if rule == "relp":
        _hold_ratios(monkeypatch, mlp)
        share = 1.0 if own.W_gate is None else 0.5  # of a product, half to each factor

    def run(value: Tensor) -> Tensor:
        return mlp(value[None])[0]

    pushed = share * torch.stack([jvp(run, at, along)[1] for at in points]).mean(0)
    pulled = share * torch.stack([vjp(run, at, gradient)[1] for at in points]).mean(0)
    torch.testing.assert_close(found.forward(along), pushed)
    torch.testing.assert_close(found.transpose(gradient, torch.arange(5)), pulled)


def _hold_ratios(monkeypatch: pytest.MonkeyPatch, mlp: Any) -> None:
    """Make the module's `act(z)` into `z` times a constant."""
    (name,) = [name for name in ("act_fn", "act") if hasattr(mlp, name)]
    plain = getattr(mlp, name)
    monkeypatch.setitem(mlp._modules, name, _Held(plain))


class _Held(torch.nn.Module):
    def __init__(self, plain: Any) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, z: Tensor) -> Tensor:
        return z * (self.plain(z) / z).detach()


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_moves_what_a_small_step_moves(tiny_model, family):
    """`J x` is the slope of the model's own attention, and `J^T` its transpose."""
    model = tiny_model(family)
    forward = model.local(PROMPT).forward
    found = attention_gradients(model.bridge, forward, model.weights.blocks)[1]
    along, gradient = torch.randn(2, *found.x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    pushed, pulled = found.forward(along), found.transpose(gradient[None])[0]
    assert float((pushed * gradient).sum()) == pytest.approx(float((pulled * along).sum()))
    assert pushed.norm() > 0
