"""Laws of every kind and sparsity that is trained, over the whole table."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from replacement import formats
from replacement.dictionary import DictionarySet
from replacement.errors import InputError
from replacement.training import Activations, EndToEndConfig, Trainee, TrainingConfig, plans, train
from replacement.training.config import KINDS, PENALISED, SPARSITIES
from replacement.training.kinds import Plan, sites
from replacement.training.sparsity import topk

WIDTH, TRUE_FEATURES, N_LAYERS, ACTIVE = 32, 64, 2, 4


class Planted:
    """Activations made of known directions: at every site the same few of 64 features fire, each site has its own
    directions.
    """

    tokens = 1024

    def __init__(self, planned: list[Plan]) -> None:
        generator = torch.Generator().manual_seed(7)
        self.sites = sites(planned)
        self.directions = {
            name: F.normalize(torch.randn(TRUE_FEATURES, WIDTH, generator=generator), dim=1) for name in self.sites
        }

    def batch(self, index: int) -> Activations:
        generator = torch.Generator().manual_seed(1000 + index)
        fires = torch.rand(self.tokens, TRUE_FEATURES, generator=generator) < ACTIVE / TRUE_FEATURES
        values = fires * (0.5 + torch.rand(self.tokens, TRUE_FEATURES, generator=generator))
        return {name: values @ directions for name, directions in self.directions.items()}


def config(kind: str = "sae", sparsity: str = "batchtopk", *, steps: int = 60, **changes: object) -> TrainingConfig:
    settings: dict[str, object] = {
        "kind": kind,
        "sparsity": sparsity,
        "n_features": 112,
        "k": ACTIVE,
        "tokens": 512 * steps,
        "batch_tokens": 512,
        "buffer_bytes": 2_000_000,
        "dead_after": 10_000,
        "learning_rate": 5e-3,
    }
    return TrainingConfig(**{**settings, **changes})  # type: ignore[arg-type]


def start(given: TrainingConfig) -> tuple[Trainee, Planted]:
    planned = plans(given, N_LAYERS)
    source = Planted(planned)
    return Trainee(planned, source.batch(0), given), source


TABLE = [(kind, sparsity) for kind in KINDS for sparsity in SPARSITIES]


@pytest.mark.parametrize(("kind", "sparsity"), TABLE)
def test_what_is_exported_is_what_was_trained(kind: str, sparsity: str, tmp_path) -> None:
    """The stored and reloaded dictionaries write, on raw activations, what the trainee wrote on scaled ones."""
    given = config(kind, sparsity, steps=12)
    trainee = train(
        planted := Planted(plans(given, N_LAYERS)), plans(given, N_LAYERS), config=given, show_progress=False
    )
    batch = planted.batch(50)
    with torch.no_grad():
        errors = trainee(batch, generator=torch.Generator().manual_seed(0), memory=1.0).errors
    found = DictionarySet({d.layer: d for d in trainee.dictionaries()}, "trained")
    formats.save(found, tmp_path)
    with torch.no_grad():
        written = write_all(formats.load(tmp_path), batch)
    for name in trainee.written:
        wanted = batch[name] - errors[name] / trainee.scale_of(name)
        same = (written[name] - wanted).abs().amax(1) < 1e-3 * wanted.abs().max()
        assert same.float().mean() > 0.85  # a choice in bfloat16 may differ where a pre-activation is at its threshold


def write_all(dictionaries: DictionarySet, batch: Activations) -> dict[str, Tensor]:
    """What a set writes at every hook, given all activations."""
    from replacement.substitution import Substitution

    substitution = Substitution(dictionaries, original=batch)
    for name in batch:
        substitution.read(name, batch[name])
    out = {name: substitution.write(name) for name in batch}
    return {name: tensor for name, tensor in out.items() if tensor is not None}


@pytest.mark.parametrize("kind", ["skip_transcoder", "clt"])
def test_every_dictionary_can_have_a_width_of_its_own(kind: str) -> None:
    """As k can; each starts and is trained as it would be with that width for all."""
    given = config(kind, n_features=(112, 48), k=(4, 2), prefixes=(24,), start="clusters", steps=12)
    planned = plans(given, N_LAYERS)
    found = train(Planted(planned), planned, config=given, show_progress=False).dictionaries()
    assert [dictionary.n_features for dictionary in found] == [112, 48]
    source = Planted(planned)
    alone = Trainee(planned, source.batch(0), given.of(1, 2))
    mixed = Trainee(planned, source.batch(0), given)
    for (name, a), (_, b) in zip(list(mixed)[1].named_parameters(), list(alone)[1].named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("kind", "sparsity"), TABLE)
def test_features_are_affine_on_the_active_set(kind: str, sparsity: str) -> None:
    """An active feature of the exported dictionary is `w . x + b`, and w is its gradient (autograd)."""
    trainee, planted = start(config(kind, sparsity))
    trainee.calibrate(planted.batch(1))
    for coder, dictionary in zip(trainee, trainee.dictionaries(), strict=True):
        x = torch.cat([planted.batch(2)[name][:3] for name in coder.plan.reads], 1).requires_grad_()
        activations = dictionary.encode(x)
        token, feature = (activations != 0).nonzero()[:20].unbind(1)
        assert len(token)
        w, b = dictionary.encoder_rows(feature, x[token])
        torch.testing.assert_close((w * x[token]).sum(1) + b, activations[token, feature])
        for i, (t, f) in enumerate(zip(token.tolist(), feature.tolist(), strict=True)):
            (gradient,) = torch.autograd.grad(activations[t, f], x, retain_graph=True)
            torch.testing.assert_close(gradient[t], w[i])


@pytest.mark.parametrize("kind", ["sae", "transcoder", "crosscoder"])
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_planted_features_are_recovered(kind: str, sparsity: str) -> None:
    """At least 90 % of the features that the data is made of have a feature whose decoder row has cosine >= 0.95.

    Left out: kinds in which several dictionaries can write one feature's part, so that no row need be the whole, and
    skip transcoders, whose skip alone explains data that is linear.
    """
    remedy = "resample" if sparsity == "jumprelu" else "auxk"
    given = config(kind, sparsity, start="samples", steps=600, dead=remedy, dead_after=30_000)
    planned = plans(given, N_LAYERS)[:1]
    source = Planted(planned)
    trainee = train(source, planned, config=given, show_progress=False)
    rows = trainee.dictionaries()[0].W_dec.detach().flatten(1)
    truth = torch.cat([source.directions[name] for name in planned[0].writes], 1)
    cosine = F.normalize(rows, dim=1) @ F.normalize(truth, dim=1).T
    assert (cosine.amax(0) >= 0.95).float().mean() >= 0.9


@pytest.mark.parametrize("penalty", ["tanh", "quadratic"])
@pytest.mark.parametrize("sparsity", PENALISED)
def test_penalties_reach_the_wanted_l0(sparsity: str, penalty: str) -> None:
    """The controller brings every penalty to k features a token, within 10 %, over the last tenth of the run."""
    if penalty == "quadratic" and sparsity != "jumprelu":
        pytest.skip("the quadratic penalty belongs to jumprelu")
    l0: list[float] = []
    given = config(sparsity=sparsity, penalty=penalty, steps=500)
    planned = plans(given, N_LAYERS)
    train(Planted(planned), planned, config=given, show_progress=False, listeners=[lambda record: l0.append(record.l0)])
    assert sum(l0[-50:]) / 50 == pytest.approx(ACTIVE, rel=0.1)


@pytest.mark.parametrize(
    ("sparsity", "remedy", "least"),
    [("relu", "auxk", 30), ("gated", "auxk", 20), ("jumprelu", "auxk", 12), ("batchtopk", "preactivation", 20)],
)
def test_buried_features_come_back(sparsity: str, remedy: str, least: int) -> None:
    """60 of 112 features are pushed below 0 at every token; without a remedy 8, 2, 2 and 1 of them fire again."""
    given = config(sparsity=sparsity, dead=remedy, steps=300, dead_after=2000, layers=(0,))
    planned = plans(given, N_LAYERS)
    trainee = Trainee(planned, (source := Planted(planned)).batch(0), given)
    (coder,) = trainee
    with torch.no_grad():
        coder.b_enc[:60] -= 4.0
    coder.since_fired[:60] = 1e6
    optimizer = torch.optim.Adam(trainee.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(300):
        batch = {name: tensor[:512] for name, tensor in source.batch(step + 1).items()}
        losses = trainee(batch, generator=generator, memory=0.9)
        optimizer.zero_grad()
        (losses.reconstruction + losses.penalty + given.dead_weight * losses.dead).backward()
        trainee.settle_gradients(longest=1.0)
        optimizer.step()
    assert (~coder.is_dead())[:60].sum() >= least


@pytest.mark.parametrize("penalty", ["tanh", "quadratic"])
def test_a_threshold_that_a_step_took_below_zero_still_learns(penalty: str) -> None:
    """It fires wherever it is positive, and gets a gradient from the tokens near there, instead of none for good."""
    trainee, planted = start(config(sparsity="jumprelu", penalty=penalty))
    coder = next(iter(trainee))
    with torch.no_grad():
        coder.sparsity.threshold[:20] = -1.0
    losses = trainee(planted.batch(1), generator=torch.Generator().manual_seed(0), memory=1.0)
    (losses.reconstruction + losses.penalty).backward()
    assert coder.sparsity.threshold.grad[:20].count_nonzero() > 10
    assert (coder.sparsity.export(coder.encoder()).activation.threshold > 0).all()


def test_the_weight_of_a_penalty_stays_bounded() -> None:
    """Where k is out of reach for long, the weight is back in use soon after k is in reach again."""
    penalised = next(iter(start(config(sparsity="relu"))[0])).sparsity
    for fires, bound in ((1e6, 100.0), (0.0, 1e-5)):
        for _ in range(2000):
            penalised.controlled(torch.tensor(fires))
        assert penalised.log_weight.exp().item() == pytest.approx(bound, rel=1e-3)


def test_a_small_weight_is_soon_back() -> None:
    """However long too few features fired, it is of use again a few steps after too many do."""
    penalised = next(iter(start(config(sparsity="relu"))[0])).sparsity
    for fires, steps in ((0.5, 100), (2.0, 15)):
        for _ in range(steps):
            penalised.controlled(fires * penalised.wanted())
    assert penalised.log_weight.exp() > penalised.slow_below


def test_what_gated_features_write_teaches_nothing_to_the_gates_bias() -> None:
    """The magnitude is `exp(r_mag) W_enc x + b_mag`, as in the paper: activations and gradients are those of the
    formula, and the gate's bias gets none."""
    trainee, planted = start(config(sparsity="gated"))
    coder = next(iter(trainee))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (coder.sparsity.r_mag, coder.sparsity.b_mag):
            parameter.add_(0.2 * torch.randn(112, generator=generator))
    x = trainee.read(coder, planted.batch(1))
    active = coder.sparsity.select(x, coder.encoder(), generator=generator, memory=1.0)
    at = (active.token, active.feature)
    values = coder.scheme.values(x, coder.W_enc, coder.b_enc, active)
    magnitude = coder.sparsity.r_mag.exp() * (x @ coder.W_enc.T) + coder.sparsity.b_mag
    weight = torch.randn(len(values), generator=generator)
    leaves = (coder.W_enc, coder.sparsity.r_mag, coder.sparsity.b_mag, coder.b_enc)
    sides = []
    for activations in (coder.sparsity.activations(values, active, coder.b_enc), magnitude.relu()[at] * (values > 0)):
        grads = torch.autograd.grad(activations @ weight, leaves, allow_unused=True)
        sides.append([activations.detach(), *(torch.zeros(112) if grad is None else grad for grad in grads)])
    assert not sides[1][-1].any()
    for fast, plain in zip(*sides, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_features_fire_above_their_level(sparsity: str) -> None:
    """What a remedy pulls a dead feature up to, and lifts a new one by, is where it fires: a gated one also needs a
    positive magnitude."""
    if sparsity == "topk":
        pytest.skip("which of its features fire depends on the others")
    trainee, planted = start(config(sparsity=sparsity))
    coder = next(iter(trainee))
    if sparsity == "gated":
        with torch.no_grad():
            coder.sparsity.b_mag[:60].sub_(0.5)
            coder.sparsity.r_mag[:30].add_(0.5)
    x = trainee.read(coder, planted.batch(1))
    found = coder(x, generator=torch.Generator().manual_seed(0), memory=0.0)
    fires = torch.zeros(len(x), 112, dtype=torch.bool)
    fires[found.active.token, found.active.feature] = found.activations > 0
    pre, levels = F.linear(x, coder.W_enc, coder.b_enc), coder.sparsity.levels(coder.encoder())
    clear = (pre - levels).abs() > 0.05
    assert torch.equal(fires[clear], (pre > levels)[clear]) and clear.float().mean() > 0.8


def test_gated_features_start_again_and_open_further_as_they_began() -> None:
    """Gate and magnitude alike: a new feature's are equal, and widening moves both."""
    trainee, planted = start(config(sparsity="gated", dead="resample"))
    coder = next(iter(trainee))
    assert torch.equal(coder.sparsity.b_mag, coder.b_enc)
    with torch.no_grad():
        coder.sparsity.b_mag.sub_(0.5)
        coder.sparsity.r_mag.add_(0.3)
    coder.since_fired[:10] = 1e6
    x = trainee.read(coder, planted.batch(1))
    coder.resample(
        x,
        torch.randn(len(x), 1, WIDTH, generator=torch.Generator().manual_seed(1)),
        optimizer=torch.optim.Adam(coder.parameters()),
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(coder.sparsity.b_mag[:10], coder.b_enc[:10]) and not coder.sparsity.r_mag[:10].any()
    before = coder.sparsity.levels(coder.encoder())
    coder.reopen(widen=0.25, k=None)
    torch.testing.assert_close(coder.sparsity.levels(coder.encoder()), before)


@pytest.mark.parametrize("floor", [0.0, 0.3])
@pytest.mark.parametrize("before", [0.0, 0.5, 100.0])
def test_the_running_threshold_is_found_a_few_tokens_at_a_time(before: float, floor: float, monkeypatch) -> None:
    """It is the k * tokens-th largest of all that is written, with no matrix of all in memory."""
    trainee, planted = start(config(floor=floor))
    coder = next(iter(trainee))
    x, held = trainee.read(coder, planted.batch(1)), []
    pre, rows = F.linear(x, coder.W_enc, coder.b_enc).detach(), coder.sparsity._rows
    coder.sparsity.peak.fill_(1.0)
    written = torch.where(pre > floor, pre * coder.encoder().norms.detach(), 0.0).flatten()
    linear = coder.scheme.dense
    monkeypatch.setattr(coder.scheme, "dense", lambda x, *rest: held.append(len(x)) or linear(x, *rest))
    monkeypatch.setattr(topk, "_CHUNK", 100 * 112)
    coder.sparsity.threshold.fill_(before)
    coder.calibrate(x)
    assert coder.sparsity.threshold == written.sort(descending=True).values[ACTIVE * len(x) - 1]
    assert max(held) == 100 < rows


def test_layers_and_models_that_do_not_fit_are_named() -> None:
    with pytest.raises(InputError, match="the model has layers 0 to 1"):
        plans(config(layers=(0, 5)), N_LAYERS)
    with pytest.raises(InputError, match="3 numbers for 2 dictionaries"):
        plans(config(n_features=(64, 64, 64)), N_LAYERS)
    with pytest.raises(InputError, match="layers without a gap"):
        plans(config("clt", layers=(0, 2)), 3)
    with pytest.raises(InputError, match="several models need kind='crosscoder'"):
        plans(config("sae"), N_LAYERS, models=("base", "tuned"))


def test_a_crosscoder_over_two_models_reads_both() -> None:
    """Its parts are the sites of both models, and each is written by rows of its own."""
    given = config("crosscoder", layers=(1,))
    planned = plans(given, N_LAYERS, models=("base", "tuned"))
    assert planned[0].reads == ("base:blocks.1.hook_resid_post", "tuned:blocks.1.hook_resid_post")
    found = train(Planted(planned), planned, config=given, show_progress=False).dictionaries()[0]
    features = torch.arange(5)
    for index, model in enumerate(("base", "tuned")):
        assert torch.equal(found.W_dec[features, found.part(1, model)], found.W_dec[features, index])  # type: ignore[attr-defined]


def test_activations_that_are_not_finite_stop_a_run_with_the_site_and_the_step(tmp_path) -> None:
    """What was trained before stays in the checkpoint."""
    given = config(steps=8)
    planned = plans(given, N_LAYERS)

    class Broken(Planted):
        def batch(self, index: int) -> Activations:
            found = dict(super().batch(index))
            if index >= 12:
                found[self.sites[1]] = found[self.sites[1]] * float("nan")
            return found

    small = TrainingConfig.from_mapping({**vars(given), "buffer_bytes": 4 * 2 * 1024 * WIDTH * N_LAYERS // 2})
    path = tmp_path / "run.safetensors"
    with pytest.raises(InputError, match=r"blocks\.1\.hook_resid_post are not finite \(NaN or inf\) at step"):
        longer = TrainingConfig.from_mapping({**vars(small), "tokens": 512 * 100})
        train(Broken(planned), planned, config=longer, checkpoint=path, checkpoint_every=2, show_progress=False)
    assert path.exists()


def test_unknown_settings_are_named() -> None:
    with pytest.raises(InputError, match="does not know n_feature; known: balance_weight, bandwidth"):
        TrainingConfig.from_mapping({"n_feature": 8})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["learning_rate", "dead_weight", "balance_weight", "bandwidth", "betas"])
def test_settings_that_are_not_finite_are_named(name: str, value: float) -> None:
    """NaN is neither above nor below a bound, and infinity is above all: both used to reach the first step."""
    given = (0.9, value) if name == "betas" else value
    with pytest.raises(InputError, match=rf"TrainingConfig\({name}=.*(nan|inf).*\): must be finite") as error:
        config(**{name: given})  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"EndToEndConfig\(kl_weight=.*\): must be finite"):
        EndToEndConfig(kl_weight=value)


@pytest.mark.parametrize("begin", ["random", "samples"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_start_overshoots_on_tokens_that_are_much_alike(kind: str, begin: str) -> None:
    """Features sampled from few clusters nearly coincide; k of them at full length would overshoot k times."""

    class Alike(Planted):
        def batch(self, index: int) -> Activations:
            generator = torch.Generator().manual_seed(1000 + index)
            which = torch.randint(4, (self.tokens,), generator=generator)
            noise = 0.1 * torch.randn(self.tokens, WIDTH, generator=generator)
            return {name: 3 * directions[which] + noise for name, directions in self.directions.items()}

    given = config(kind, k=16, start=begin)
    source = Alike(plans(given, N_LAYERS))
    trainee = Trainee(plans(given, N_LAYERS), source.batch(0), given)
    with torch.no_grad():
        found = trainee(source.batch(1), generator=torch.Generator().manual_seed(0), memory=0.0)
    assert found.fvu.max() < 10
