"""Laws of the trainer: runs resume exactly, scales fold in, training explains MLPs and keeps the replaced model."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from replacement.dictionary import DictionarySet
from replacement.errors import InputError
from replacement.substitution import Substitution
from replacement.training import (
    Activations,
    EndToEndConfig,
    TokenBatch,
    Trainee,
    TrainingConfig,
    plans,
    starts,
    train,
    train_end_to_end,
)
from replacement.training.clusters import cluster_detectors
from replacement.training.kinds import MLP_IN, MLP_OUT, hook
from replacement.training.reconstruction import learning_rate_factor

D_MODEL, N_LAYERS = 16, 2


def by_hook(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Activations:
    """Inputs and outputs of MLPs, layer by layer, under their hooks."""
    named = (
        (hook(i, site), t) for i, pair in enumerate(pairs) for site, t in zip((MLP_IN, MLP_OUT), pair, strict=True)
    )
    return dict(named)


class ToyMLPs:
    """Two fixed random MLPs on clustered inputs, as a source of activations."""

    tokens = 96
    sites = tuple(hook(layer, site) for layer in range(N_LAYERS) for site in (MLP_IN, MLP_OUT))

    def __init__(self, device: torch.device | str = "cpu") -> None:
        generator = torch.Generator().manual_seed(0)
        up = torch.randn(N_LAYERS, D_MODEL, 4 * D_MODEL, generator=generator) / D_MODEL**0.5
        down = torch.randn(N_LAYERS, 4 * D_MODEL, D_MODEL, generator=generator) / (4 * D_MODEL) ** 0.5
        self.up, self.down = up.to(device), down.to(device)
        self.centres = torch.randn(20, D_MODEL, generator=generator)

    def run(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x @ self.up[layer]) @ self.down[layer]

    def batch(self, index: int) -> Activations:
        generator = torch.Generator().manual_seed(100 + index)
        which = torch.randint(20, (N_LAYERS, self.tokens), generator=generator)
        inputs = self.centres[which] + 0.1 * torch.randn(N_LAYERS, self.tokens, D_MODEL, generator=generator)
        return by_hook((x, self.run(layer, x)) for layer, x in enumerate(inputs))


def toy_config(**changes: object) -> TrainingConfig:
    settings = {
        "n_features": 64,
        "k": 4,
        "tokens": 64 * 60,
        "batch_tokens": 64,
        "buffer_bytes": 4 * ToyMLPs.tokens * 2 * N_LAYERS * D_MODEL * 4,
        "warmup_steps": 5,
        "start": "clusters" if changes.get("sparsity", "batchtopk") == "batchtopk" else "shared_clusters",
        "dead_after": 640,
    }
    return TrainingConfig(**{**settings, **changes})  # type: ignore[arg-type]


def trained(source, config: TrainingConfig, **options: object) -> Trainee:
    return train(source, plans(config, N_LAYERS), config=config, show_progress=False, **options)  # type: ignore[arg-type]


def test_a_resumed_run_equals_an_unbroken_one(tmp_path, monkeypatch) -> None:
    """Stopping and going on changes no bit: batches, samples and learning rates are functions of the step. Nor does it
    look for clusters again."""
    config, source = toy_config(kind="skip_transcoder", prefixes=(16,)), ToyMLPs()
    whole = trained(source, config)
    path = tmp_path / "run.safetensors"
    trained(source, config, checkpoint=path, checkpoint_every=7, stop_after=23)
    monkeypatch.setattr(starts, "cluster_detectors", None)
    resumed = trained(source, config, checkpoint=path)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert not list(tmp_path.glob("*.part"))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path) -> None:
    """Going on with other settings would give a run that no config describes."""
    path, source = tmp_path / "run.safetensors", ToyMLPs()
    trained(source, toy_config(), checkpoint=path, stop_after=2)
    with pytest.raises(InputError, match=r"made with other settings \(k 4 there, 5 here\); delete it to start over"):
        trained(source, toy_config(k=5), checkpoint=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        trained(source, toy_config(), checkpoint=path)


@pytest.mark.parametrize("kind", ["transcoder", "skip_transcoder"])
@pytest.mark.parametrize("prefixes", [(), (16, 32)])
def test_training_explains_the_mlps_at_the_wanted_sparsity(kind: str, prefixes: tuple[int, ...]) -> None:
    """On clustered toy data FVU falls below 0.2 with at most the configured number of active features."""
    source = ToyMLPs()
    trainee = trained(source, toy_config(kind=kind, prefixes=prefixes, tokens=64 * 300))
    batch = source.batch(10_000)
    for layer, transcoder in enumerate(trainee.dictionaries()):
        x, y = batch[hook(layer, MLP_IN)], batch[hook(layer, MLP_OUT)]
        fvu = (transcoder(x) - y).square().sum() / (y - y.mean(0)).square().sum()
        assert fvu < 0.2
        assert 1 < (transcoder.encode(x) > 0).sum(1).float().mean() < 5


def toy_trainee(**changes: object) -> tuple[Trainee, Activations]:
    """An untrained trainee on the toy's first batch, its outputs three times as large."""
    batch = {name: 3 * tensor if name.endswith("out") else tensor for name, tensor in ToyMLPs().batch(0).items()}
    config = toy_config(**changes)
    return Trainee(plans(config, N_LAYERS), batch, config), batch


@pytest.mark.parametrize("longest", [1e-3, 1e3])
def test_gradients_are_scaled_down_to_the_longest_and_never_up(longest: float) -> None:
    trainee, batch = toy_trainee(kind="skip_transcoder")
    trainee(batch, generator=torch.Generator().manual_seed(0), memory=0.0).reconstruction.backward()
    before = nn.utils.parameters_to_vector(p.grad for p in trainee.parameters())
    trainee.settle_gradients(longest=longest)
    after = nn.utils.parameters_to_vector(p.grad for p in trainee.parameters())
    torch.testing.assert_close(after, before * min(1.0, longest / float(before.norm())))


def test_activations_are_scaled_where_they_lie_only_if_they_may_be_overwritten() -> None:
    trainee, batch = toy_trainee()
    given = {name: tensor.clone() for name, tensor in batch.items()}
    apart = trainee.scaled(given)
    for name in trainee.sites:
        assert torch.equal(given[name], batch[name])
        torch.testing.assert_close(apart[name], batch[name] * trainee.scale_of(name))
    for name, tensor in trainee.scaled(given, in_place=True).items():
        assert torch.equal(tensor, apart[name]) and tensor.data_ptr() == given[name].data_ptr()


def test_scales_are_folded_into_the_weights() -> None:
    """The exported transcoder on raw activations equals the trained one on scaled ones, divided by the output scale."""
    trainee, batch = toy_trainee(kind="skip_transcoder")
    coder = next(iter(trainee))
    assert coder.W_skip is not None
    nn.init.normal_(coder.W_skip)
    trainee.calibrate(batch)
    x = trainee.read(coder, batch)
    one = coder(x, generator=torch.Generator().manual_seed(0), memory=1.0)
    out = hook(0, MLP_OUT)
    wanted = (one.parts[:, -1, 0] + trainee.bias(out) + coder.skip(x)) / trainee.scale_of(out)
    got = trainee.dictionaries()[0](batch[hook(0, MLP_IN)])
    same = (got - wanted).abs().amax(1) < 1e-4 * wanted.abs().max()
    assert same.float().mean() > 0.9  # the choice in bfloat16 may differ where a pre-activation lies at the threshold


def test_a_floor_keeps_faint_firing_out() -> None:
    """No feature of the exported transcoder fires below the given share of its usual peak."""
    source = ToyMLPs()
    trainee = trained(source, toy_config(floor=0.4, tokens=64 * 100))
    batch = source.batch(500)
    for coder, dictionary in zip(trainee, trainee.dictionaries(), strict=True):
        activations = dictionary.encode(batch[hook(dictionary.layer, MLP_IN)])
        least = torch.where(activations > 0, activations, torch.inf).amin(0)
        assert (least >= 0.4 * coder.sparsity.peak * coder.encoder().norms.detach()).all()


def test_features_start_as_detectors_of_clusters() -> None:
    """On data with 20 clusters every cluster has a coarse feature that fires at its tokens and at few others."""
    source = ToyMLPs()
    inputs, outputs = (torch.cat([source.batch(i)[hook(0, site)] for i in range(10)]) for site in (MLP_IN, MLP_OUT))
    sets = cluster_detectors(inputs, outputs, sizes=[20, 40], generator=torch.Generator().manual_seed(0))
    assert [len(each.W_enc) for each in sets] == [20, 40]
    which = torch.cdist(inputs, source.centres).argmin(1)
    fires = inputs @ sets[0].W_enc.T + sets[0].b_enc > 0
    member = F.one_hot(which, 20).float()
    hits = member.T @ fires.float()
    f1 = 2 * hits / (fires.sum(0) + member.sum(0)[:, None])
    assert (f1.amax(1) > 0.9).float().mean() > 0.7


def test_the_learning_rate_rises_stays_and_falls() -> None:
    config = toy_config(decay_fraction=0.5)
    factors = [learning_rate_factor(step, config) for step in range(config.steps)]
    assert factors[0] == pytest.approx(1 / 5) and factors[10] == 1 and factors[-1] < 0.05
    assert all(a >= b for a, b in pairwise(factors[5:]))


class ToyModel:
    """A residual stream of two MLPs between a fixed embedding and unembedding."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.mlps = ToyMLPs(device)
        generator = torch.Generator().manual_seed(5)
        self.embed = torch.randn(12, D_MODEL, generator=generator).to(device)
        self.unembed = torch.randn(D_MODEL, 12, generator=generator).to(device)

    def replaced(self, tokens, where, replacement):
        x = self.embed[tokens]
        for layer in range(N_LAYERS):
            replacement.read(hook(layer, MLP_IN), x)
            y = replacement.write(hook(layer, MLP_OUT))
            x = x + (self.mlps.run(layer, x) if y is None else y)
        return x[where] @ self.unembed

    def original(self, tokens, where):
        listener = Listener(self.mlps)
        return self.replaced(tokens, where, listener), by_hook(listener.seen)


class Listener:
    """Replaces nothing, and keeps what it hears."""

    def __init__(self, mlps: ToyMLPs) -> None:
        self.mlps, self.seen = mlps, []

    def read(self, name, x):
        self.seen.append((x.flatten(0, 1), self.mlps.run(len(self.seen), x).flatten(0, 1)))

    def write(self, name):
        return None


class ToyModelSource:
    sites = ToyMLPs.sites

    def __init__(self, model: ToyModel) -> None:
        self.model = model

    def batch(self, index: int) -> Activations:
        tokens = torch.randint(12, (4, 16), generator=torch.Generator().manual_seed(index))
        return self.model.original(tokens, tokens >= 0)[1]


@pytest.mark.parametrize("bridging", [0.0, 1.0])
def test_end_to_end_training_brings_the_replaced_model_to_the_original(bridging: float) -> None:
    """KL(original || replaced) falls to less than half of what the reconstruction stage left."""
    model = ToyModel()
    config = EndToEndConfig(steps=150, learning_rate=5e-3, bridging_weight=bridging)
    trainee = trained(ToyModelSource(model), toy_config(tokens=64 * 20, k=2))
    tokens = torch.randint(12, (8, 16), generator=torch.Generator().manual_seed(77))

    def divergence() -> float:
        found = DictionarySet({d.layer: d for d in trainee.dictionaries()}, "toy")
        with torch.no_grad():
            got, wanted = (
                model.replaced(tokens, tokens >= 0, Substitution(found)),
                model.original(tokens, tokens >= 0)[0],
            )
        return F.kl_div(got.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean").item()

    def batch(index: int) -> TokenBatch:
        drawn = torch.randint(12, (8, 16), generator=torch.Generator().manual_seed(1000 + index))
        return TokenBatch(drawn, drawn > 6)

    before = divergence()
    train_end_to_end(model, trainee, batch, config=config, show_progress=False)
    assert divergence() < before / 2


@pytest.mark.parametrize("sparsity", ["batchtopk", "relu"])
def test_bridging_moves_thresholds_and_controllers_once_a_step(sparsity: str) -> None:
    """The half replaced pass sees the same tokens again: what runs along with the steps is as without it."""
    model, states = ToyModel(), []

    def batch(index: int) -> TokenBatch:
        drawn = torch.randint(12, (8, 16), generator=torch.Generator().manual_seed(index))
        return TokenBatch(drawn, drawn > 6)

    for weight in (0.0, 1.0):
        trainee = trained(ToyModelSource(model), toy_config(tokens=64 * 5, k=2, sparsity=sparsity))
        config = EndToEndConfig(steps=1, bridging_weight=weight)
        train_end_to_end(model, trainee, batch, config=config, show_progress=False)
        states.append(dict(trainee.named_buffers()))
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@pytest.mark.parametrize("kind", ["transcoder", "clt"])
def test_bridging_keeps_errors_beside_the_originals_activations_small(kind: str) -> None:
    """They are what a graph's error nodes hold: KL alone lets them grow, and the term takes back most of it."""
    model = ToyModel()
    tokens = torch.randint(12, (8, 16), generator=torch.Generator().manual_seed(77))
    activations = model.original(tokens, tokens >= 0)[1]

    def batch(index: int) -> TokenBatch:
        drawn = torch.randint(12, (8, 16), generator=torch.Generator().manual_seed(1000 + index))
        return TokenBatch(drawn, drawn > 6)

    missed = dict[float | None, float]()
    for weight in (None, 0.0, 1.0):
        trainee = trained(ToyModelSource(model), toy_config(kind=kind, tokens=64 * 60, n_features=8, k=1, dead="none"))
        if weight is not None:
            config = EndToEndConfig(steps=100, learning_rate=5e-3, kl_weight=10.0, bridging_weight=weight)
            train_end_to_end(model, trainee, batch, config=config, show_progress=False)
        with torch.no_grad():
            losses = trainee(activations, generator=torch.Generator().manual_seed(0), memory=1.0)
        missed[weight] = losses.fvu.mean().item()
    grown, kept = (missed[weight] - missed[None] for weight in (0.0, 1.0))
    assert grown > 0.5 * missed[None] and kept < grown / 4


@pytest.mark.parametrize("kind", ["transcoder", "clt"])
def test_dead_features_are_revived_end_to_end_in_every_layer(kind: str) -> None:
    """AuxK reaches those that write to several layers too: without it, what never fires would never move."""
    model = ToyModel()
    trainee = trained(ToyModelSource(model), toy_config(kind=kind, tokens=64 * 5, k=2))
    for coder in trainee:
        coder.since_fired[:10] = 1e6
        with torch.no_grad():
            coder.W_dec[:10] *= 1e-6  # writes too little to be chosen
    before = [coder.W_dec[:10].detach().clone() for coder in trainee]

    def batch(index: int) -> TokenBatch:
        drawn = torch.randint(12, (8, 16), generator=torch.Generator().manual_seed(index))
        return TokenBatch(drawn, drawn > 6)

    train_end_to_end(model, trainee, batch, config=EndToEndConfig(steps=1), show_progress=False)
    for coder, rows in zip(trainee, before, strict=True):
        assert coder.is_dead()[:10].all() and not torch.equal(coder.W_dec[:10], rows)


def test_a_stage_can_widen_one_layer_and_leave_the_others() -> None:
    """Only the listed layers move; widening ends their floor and changes k."""
    model = ToyModel()
    config = toy_config(tokens=64 * 10, k=2, floor=0.3)
    trainee = trained(ToyModelSource(model), config)
    before = {name: tensor.detach().clone() for name, tensor in trainee.named_parameters()}

    def batch(index: int) -> TokenBatch:
        drawn = torch.randint(12, (8, 16), generator=torch.Generator().manual_seed(index))
        return TokenBatch(drawn, drawn > 6)

    stage = EndToEndConfig(steps=3, layers=(1,), widen=0.2, k=5, input_noise=0.1)
    train_end_to_end(model, trainee, batch, config=stage, show_progress=False)
    moved = {name for name, tensor in trainee.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved and all(name.startswith(("coders.1.", "b_dec.1")) for name in moved)
    assert [(coder.sparsity.floor, coder.sparsity.k) for coder in trainee] == [(0.3, 2), (0.0, 5)]


def test_a_resumed_end_to_end_stage_equals_an_unbroken_one(tmp_path) -> None:
    model = ToyModel()

    def batch(index: int) -> TokenBatch:
        drawn = torch.randint(12, (8, 16), generator=torch.Generator().manual_seed(index))
        return TokenBatch(drawn, drawn > 6)

    stage = EndToEndConfig(steps=8, widen=0.1, input_noise=0.1)
    ends = []
    for breaks in ((), (3,)):
        trainee = trained(ToyModelSource(model), toy_config(tokens=64 * 5, k=2))
        path = tmp_path / f"{len(breaks)}.safetensors"
        for stop in (*breaks, None):
            train_end_to_end(model, trainee, batch, config=stage, checkpoint=path, stop_after=stop, show_progress=False)
            if stop is not None:
                trainee = trained(ToyModelSource(model), toy_config(tokens=64 * 5, k=2))
        ends.append({name: tensor.clone() for name, tensor in trainee.state_dict().items()})
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name
