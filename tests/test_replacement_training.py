"""Laws of the transcoder trainer: the sparse kernels equal dense ones, runs resume exactly, scales fold in, training
works.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from replacement.errors import InputError
from replacement.training import (
    Activations,
    EndToEndConfig,
    TokenBatch,
    TrainedLayer,
    TrainingConfig,
    train,
    train_end_to_end,
)
from replacement.training.clusters import cluster_detectors
from replacement.training.reconstruction import learning_rate_factor
from replacement.training.source import ShuffledBlocks
from replacement.training.sparse import decode_active, preselect, select

D_MODEL, N_LAYERS = 16, 2


class ToyMLPs:
    """Two fixed random MLPs on clustered inputs, as a source of activations."""

    tokens = 96

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.up = torch.randn(N_LAYERS, D_MODEL, 4 * D_MODEL, generator=generator) / D_MODEL**0.5
        self.down = torch.randn(N_LAYERS, 4 * D_MODEL, D_MODEL, generator=generator) / (4 * D_MODEL) ** 0.5
        self.centres = torch.randn(20, D_MODEL, generator=generator)

    def run(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x @ self.up[layer]) @ self.down[layer]

    def batch(self, index: int) -> Activations:
        generator = torch.Generator().manual_seed(100 + index)
        which = torch.randint(20, (N_LAYERS, self.tokens), generator=generator)
        inputs = self.centres[which] + 0.1 * torch.randn(N_LAYERS, self.tokens, D_MODEL, generator=generator)
        return Activations(inputs, torch.stack([self.run(layer, inputs[layer]) for layer in range(N_LAYERS)]))


def toy_config(**changes: object) -> TrainingConfig:
    settings = {
        "n_features": 64,
        "k": 4,
        "tokens": 64 * 60,
        "batch_tokens": 64,
        "block_batches": 4,
        "warmup_steps": 5,
        "dead_after": 640,
    }
    return TrainingConfig(**{**settings, **changes})  # type: ignore[arg-type]


def dense_prefixes(x, W_enc, b_enc, W_dec, active, prefixes):
    """The three-line meaning of `decode_active`."""
    mask = torch.zeros(active.n_tokens, active.n_features, dtype=x.dtype)
    mask[active.token, active.feature] = 1
    values = (x @ W_enc.T + b_enc) * mask
    return torch.stack([values[:, :p] @ W_dec[:p] for p in prefixes], 1)


@pytest.mark.parametrize("mkl", [True, False])
@pytest.mark.parametrize("prefixes", [(24,), (8, 24), (3, 10, 24)])
def test_sparse_decoding_equals_dense_with_all_gradients(
    prefixes: tuple[int, ...], mkl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels are an optimisation: outputs and every gradient agree with plain matrix products in float64."""
    if not mkl:
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    torch.manual_seed(0)
    tensors = [torch.randn(*s, dtype=torch.float64) for s in ((11, 5), (24, 5), (24,), (24, 7))]
    x, W_enc, b_enc, _ = tensors
    active = select(preselect(x, W_enc, b_enc), 0.7)
    sides = []
    for decode in (lambda *a: decode_active(*a)[0], dense_prefixes):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = decode(*leaves, active, prefixes)
        (out * torch.arange(out.numel(), dtype=out.dtype).view_as(out).cos()).sum().backward()
        sides.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for fast, plain in zip(*sides, strict=True):
        torch.testing.assert_close(fast, plain)


def test_selection_is_the_comparison_with_the_threshold() -> None:
    """Comparing bits as integers is the same as comparing positive floats; entries come ordered by token, then
    feature.
    """
    pre = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    level = torch.tensor(0.8).bfloat16()
    active = select(pre, 0.8)
    assert torch.equal(torch.stack([active.token, active.feature], 1), (pre > level).nonzero())


def test_a_resumed_run_equals_an_unbroken_one(tmp_path) -> None:
    """Stopping and going on changes no bit: batches, samples and learning rates are functions of the step."""
    config, source = toy_config(skip=True, prefixes=(16,)), ToyMLPs()
    whole = train(source, config=config, show_progress=False)
    path = tmp_path / "run.safetensors"
    train(source, config=config, checkpoint=path, checkpoint_every=7, stop_after=23, show_progress=False)
    resumed = train(source, config=config, checkpoint=path, show_progress=False)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert not list(tmp_path.glob("*.part"))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path) -> None:
    """Going on with other settings would give a run that no config describes."""
    path, source = tmp_path / "run.safetensors", ToyMLPs()
    train(source, config=toy_config(), checkpoint=path, stop_after=2, show_progress=False)
    with pytest.raises(InputError, match="made with other settings; delete it to start over"):
        train(source, config=toy_config(k=5), checkpoint=path, show_progress=False)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        train(source, config=toy_config(), checkpoint=path, show_progress=False)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("prefixes", [(), (16, 32)])
def test_training_explains_the_mlps_at_the_wanted_sparsity(skip: bool, prefixes: tuple[int, ...]) -> None:
    """On clustered toy data FVU falls below 0.2 with at most the configured number of active features."""
    source = ToyMLPs()
    layers = train(source, config=toy_config(skip=skip, prefixes=prefixes, tokens=64 * 300), show_progress=False)
    inputs, outputs = source.batch(10_000)
    for layer, x, y in zip(layers, inputs, outputs, strict=True):
        transcoder = layer.dictionary(read="mlp.hook_in", write="mlp.hook_out")
        fvu = (transcoder(x) - y).square().sum() / (y - y.mean(0)).square().sum()
        assert fvu < 0.2
        assert 1 < (transcoder.encode(x) > 0).sum(1).float().mean() < 5


def test_scales_are_folded_into_the_weights() -> None:
    """The exported transcoder on raw activations equals the trained layer on scaled ones, divided by the output
    scale."""
    source = ToyMLPs()
    inputs, outputs = source.batch(0)
    layer = TrainedLayer(inputs[0], 3 * outputs[0], config=toy_config(skip=True), layer=0, n_layers=1)
    nn.init.normal_(layer.W_skip)
    layer.calibrate(inputs[0])
    scaled = layer(inputs[0] * layer.input_scale, generator=torch.Generator().manual_seed(0), memory=1.0)
    wanted = scaled.outputs[:, -1] / layer.output_scale
    got = layer.dictionary(read="mlp.hook_in", write="mlp.hook_out")(inputs[0])
    same = (got - wanted).abs().amax(1) < 1e-4 * wanted.abs().max()
    assert same.float().mean() > 0.9  # the choice in bfloat16 may differ where a pre-activation lies at the threshold


def test_dead_features_come_back_through_the_auxiliary_loss() -> None:
    """AuxK moves only dead features, towards what the live ones missed."""
    inputs, outputs = ToyMLPs().batch(0)
    layer = TrainedLayer(inputs[0], outputs[0], config=toy_config(), layer=0, n_layers=1)
    layer.since_fired[:10] = 1e6
    layer.aux_loss(inputs[0] * layer.input_scale, outputs[0], torch.Generator().manual_seed(0)).backward()
    moved = layer.W_dec.grad.abs().sum(1) > 0
    assert moved[:10].any() and not moved[10:].any()


def test_a_floor_keeps_faint_firing_out() -> None:
    """No feature of the exported transcoder fires below the given share of its usual peak."""
    source = ToyMLPs()
    layers = train(source, config=toy_config(floor=0.4, tokens=64 * 100), show_progress=False)
    for layer, x in zip(layers, source.batch(500).inputs, strict=True):
        activations = layer.dictionary(read="mlp.hook_in", write="mlp.hook_out").encode(x)
        least = torch.where(activations > 0, activations, torch.inf).amin(0)
        floors = 0.4 * layer.peak * layer.W_dec.detach().norm(dim=1)
        assert (least >= floors).all()


def test_features_start_as_detectors_of_clusters() -> None:
    """On data with 20 clusters every cluster has a coarse feature that fires at its tokens and at few others."""
    source = ToyMLPs()
    inputs, outputs = (torch.cat([source.batch(i)[side][0] for i in range(10)]) for side in (0, 1))
    sets = cluster_detectors(inputs, outputs, sizes=[20, 40], generator=torch.Generator().manual_seed(0))
    assert [len(each.W_enc) for each in sets] == [20, 40]
    which = torch.cdist(inputs, source.centres).argmin(1)
    fires = inputs @ sets[0].W_enc.T + sets[0].b_enc > 0
    member = F.one_hot(which, 20).float()
    hits = member.T @ fires.float()
    f1 = 2 * hits / (fires.sum(0) + member.sum(0)[:, None])
    assert (f1.amax(1) > 0.9).float().mean() > 0.7


def test_shuffled_blocks_serve_every_token_once_in_any_order() -> None:
    """Batch n is a function of n: the second block's tokens come whole, whatever was asked before."""
    source = ToyMLPs()
    blocks = ShuffledBlocks(source, block_batches=2, batch_tokens=48, seed=3)
    served = torch.cat([blocks.batch(i).inputs[0] for i in range(4, 8)])
    wanted = torch.cat([source.batch(i).inputs[0] for i in (2, 3)])
    assert torch.equal(served.sort(0).values, wanted.sort(0).values)
    assert torch.equal(
        blocks.batch(5).inputs, ShuffledBlocks(source, block_batches=2, batch_tokens=48, seed=3).batch(5).inputs
    )


def test_the_learning_rate_rises_stays_and_falls() -> None:
    config = toy_config(decay_fraction=0.5)
    factors = [learning_rate_factor(step, config) for step in range(config.steps)]
    assert factors[0] == pytest.approx(1 / 5) and factors[10] == 1 and factors[-1] < 0.05
    assert all(a >= b for a, b in pairwise(factors[5:]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_features": 30}, "multiple of 8"),
        ({"prefixes": (32, 16)}, "ascending sizes"),
        ({"prefixes": (64,)}, "leave n_features itself out"),
        ({"k": 0}, "between 1 and n_features"),
        ({"tokens": 3}, "less than one batch"),
    ],
)
def test_contradictory_settings_are_named(changes: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        toy_config(**changes)


class ToyModel:
    """A residual stream of two MLPs between a fixed embedding and unembedding."""

    def __init__(self) -> None:
        self.mlps = ToyMLPs()
        generator = torch.Generator().manual_seed(5)
        self.embed = torch.randn(12, D_MODEL, generator=generator)
        self.unembed = torch.randn(D_MODEL, 12, generator=generator)

    def replaced(self, tokens, where, mlp):
        x = self.embed[tokens]
        for layer in range(N_LAYERS):
            x = x + mlp(layer, x)
        return x[where] @ self.unembed

    def original(self, tokens, where):
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def mlp(layer: int, x: torch.Tensor) -> torch.Tensor:
            y = self.mlps.run(layer, x)
            seen.append((x.flatten(0, 1), y.flatten(0, 1)))
            return y

        logits = self.replaced(tokens, where, mlp)
        return logits, Activations(*(torch.stack(side) for side in zip(*seen, strict=True)))


class ToyModelSource:
    tokens = 64

    def __init__(self, model: ToyModel) -> None:
        self.model = model

    def batch(self, index: int) -> Activations:
        tokens = torch.randint(12, (4, 16), generator=torch.Generator().manual_seed(index))
        return self.model.original(tokens, tokens >= 0)[1]


def test_end_to_end_training_brings_the_replaced_model_to_the_original() -> None:
    """KL(original || replaced) falls to less than half of what the reconstruction stage left."""
    model = ToyModel()
    layers = train(ToyModelSource(model), config=toy_config(tokens=64 * 20, k=2), show_progress=False)
    tokens = torch.randint(12, (8, 16), generator=torch.Generator().manual_seed(77))

    def divergence() -> float:
        transcoders = [layer.dictionary(read="mlp.hook_in", write="mlp.hook_out") for layer in layers]
        with torch.no_grad():
            got, wanted = (
                model.replaced(tokens, tokens >= 0, lambda layer, x: transcoders[layer](x)),
                model.original(tokens, tokens >= 0)[0],
            )
        return F.kl_div(got.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean").item()

    def batch(index: int) -> TokenBatch:
        drawn = torch.randint(12, (8, 16), generator=torch.Generator().manual_seed(1000 + index))
        return TokenBatch(drawn, drawn > 6)

    before = divergence()
    train_end_to_end(model, layers, batch, config=EndToEndConfig(steps=150, learning_rate=5e-3), show_progress=False)
    assert divergence() < before / 2


def test_a_stage_can_widen_one_layer_and_leave_the_others() -> None:
    """Only the listed layers move; widening ends their floor and changes k."""
    model = ToyModel()
    config = toy_config(tokens=64 * 10, k=2, floor=0.3)
    layers = train(ToyModelSource(model), config=config, show_progress=False)
    before = {name: tensor.detach().clone() for name, tensor in layers.named_parameters()}

    def batch(index: int) -> TokenBatch:
        drawn = torch.randint(12, (8, 16), generator=torch.Generator().manual_seed(index))
        return TokenBatch(drawn, drawn > 6)

    stage = EndToEndConfig(steps=3, layers=(1,), widen=0.2, k=5, input_noise=0.1)
    train_end_to_end(model, layers, batch, config=stage, show_progress=False)
    moved = {name for name, tensor in layers.named_parameters() if not torch.equal(tensor, before[name])}
    assert moved and all(name.startswith("1.") for name in moved)
    assert (layers[0].floor, layers[0].k, layers[1].floor, layers[1].k) == (0.3, 2, 0.0, 5)


def test_a_resumed_end_to_end_stage_equals_an_unbroken_one(tmp_path) -> None:
    model = ToyModel()

    def batch(index: int) -> TokenBatch:
        drawn = torch.randint(12, (8, 16), generator=torch.Generator().manual_seed(index))
        return TokenBatch(drawn, drawn > 6)

    stage = EndToEndConfig(steps=8, widen=0.1, input_noise=0.1)
    ends = []
    for breaks in ((), (3,)):
        layers = train(ToyModelSource(model), config=toy_config(tokens=64 * 5, k=2), show_progress=False)
        path = tmp_path / f"{len(breaks)}.safetensors"
        for stop in (*breaks, None):
            train_end_to_end(model, layers, batch, config=stage, checkpoint=path, stop_after=stop, show_progress=False)
            if stop is not None:
                layers = train(ToyModelSource(model), config=toy_config(tokens=64 * 5, k=2), show_progress=False)
        ends.append({name: tensor.clone() for name, tensor in layers.state_dict().items()})
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name
