"""Laws of switch and Kronecker encoders in training: what they choose, their gradients, and what they become."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from replacement import formats
from replacement.dictionary import DictionarySet
from replacement.encoding import Kronecker, Route, Switch
from replacement.errors import InputError
from replacement.training import Activations, Trainee, TrainingConfig, plans, schemes, train
from replacement.training.config import KINDS
from replacement.training.sparse import ActiveSet, dense_pairs, encode_pairs, pairs_above, pairs_top
from replacement.training.sparse.pairs import multiply
from tests.test_replacement_training_kinds import ACTIVE, N_LAYERS, Planted, config, start, write_all

ENCODERS = {"switch": {"experts": 4}, "kronecker": {"pairs": (2, 4)}}
TABLE = [(encoder, sparsity) for encoder in ENCODERS for sparsity in ("batchtopk", "topk")]


def given(encoder: str, sparsity: str = "batchtopk", kind: str = "sae", **changes: object) -> TrainingConfig:
    return config(kind, sparsity, encoder=encoder, **{**ENCODERS[encoder], **changes})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("encoder", "sparsity"), TABLE)
def test_what_is_exported_is_what_was_trained(kind: str, encoder: str, sparsity: str, tmp_path) -> None:
    """Of every kind: stored and reloaded dictionaries write, on raw activations, what the trainee wrote."""
    settings = given(encoder, sparsity, kind, steps=12)
    planned = plans(settings, N_LAYERS)
    trainee = train(planted := Planted(planned), planned, config=settings, show_progress=False)
    batch = planted.batch(50)
    with torch.no_grad():
        errors = trainee(batch, generator=torch.Generator().manual_seed(0), memory=1.0).errors
    formats.save(DictionarySet({d.layer: d for d in trainee.dictionaries()}, "trained"), tmp_path)
    with torch.no_grad():
        written = write_all(formats.load(tmp_path), batch)
    for name in trainee.written:
        wanted = batch[name] - errors[name] / trainee.scale_of(name)
        same = (written[name] - wanted).abs().amax(1) < 1e-3 * wanted.abs().max()
        assert same.float().mean() > 0.9  # a choice in bfloat16 may differ where a pre-activation lies at its threshold


@pytest.mark.parametrize(("encoder", "sparsity"), TABLE)
def test_features_are_affine_on_the_active_set(encoder: str, sparsity: str, monkeypatch) -> None:
    """An active feature of the exported dictionary is `w . x + b`, and w its gradient: of a switch, router held."""
    trainee, planted = start(given(encoder, sparsity))
    trainee.calibrate(planted.batch(1))
    for coder, dictionary in zip(trainee, trainee.dictionaries(), strict=True):
        x = torch.cat([planted.batch(2)[name][:8] for name in coder.plan.reads], 1).double().requires_grad_()
        dictionary = dictionary.double()
        token, feature = (dictionary.encode(x) != 0).nonzero()[:20].unbind(1)
        assert len(token)
        w, b = dictionary.encoder_rows(feature, x[token])
        if isinstance(dictionary.encoding, Switch):
            held = Route(*(each.detach() for each in dictionary.encoding.route(x)))
            monkeypatch.setattr(dictionary.encoding, "route", lambda x, held=held: held)
        activations = dictionary.encode(x)
        torch.testing.assert_close((w * x[token]).sum(1) + b, activations[token, feature])
        for i, (t, f) in enumerate(zip(token.tolist(), feature.tolist(), strict=True)):
            (gradient,) = torch.autograd.grad(activations[t, f], x, retain_graph=True)
            torch.testing.assert_close(gradient[t], w[i])


@pytest.mark.parametrize(("encoder", "sparsity"), TABLE)
def test_gradients_equal_those_of_the_dense_map(encoder: str, sparsity: str) -> None:
    """The loss of a skip transcoder, written densely with plain autograd, has the same gradients, router's included."""
    trainee, planted = start(given(encoder, sparsity, "skip_transcoder", dead_weight=0.0))
    batch = planted.batch(3)
    trainee(batch, generator=torch.Generator().manual_seed(0), memory=0.0)  # sets running thresholds
    losses = trainee(batch, generator=torch.Generator().manual_seed(0), memory=1.0)
    names, parameters = zip(*trainee.named_parameters(), strict=True)
    fast = torch.autograd.grad(losses.reconstruction + losses.penalty, parameters)
    total = torch.zeros(())
    for coder in trainee:
        x = trainee.read(coder, batch)
        active = coder.sparsity.select(x, coder.encoder(), generator=torch.Generator().manual_seed(0), memory=1.0)
        chosen = torch.zeros(len(x), 112).index_put((active.token, active.feature), torch.ones(()))
        pre = F.linear(x, coder.W_enc, coder.b_enc)
        if encoder == "switch":
            p = coder.scheme.map.probabilities(x)
            pre = pre * p.amax(1, keepdim=True)
            assert torch.equal(active.feature // 28, p.argmax(1)[active.token])
            share = F.one_hot(p.argmax(1), 4).float().mean(0)
            total = total + 0.03 * 4 * (share * p.mean(0)).sum()
        else:
            by_head = pre.view(len(x), 6, 14)
            product = by_head[:, :2, None].relu() * by_head[:, None, 2:].relu()  # [tokens, m, n, heads]
            product = product.permute(0, 3, 1, 2).flatten(1)
            pre = product.clamp_min(1e-30).sqrt() * (product > 0)
        name = coder.plan.writes[0]
        out = (pre * chosen) @ coder.W_dec[:, 0] + trainee.bias(name) + coder.skip(x)
        total = total + (batch[name] * trainee.scale_of(name) - out).pow(2).mean()
    for name, a, b in zip(names, fast, torch.autograd.grad(total, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=lambda words, name=name: f"{name}: {words}")


class Grouped(Planted):
    """Tokens of four groups; in each group 16 of the 64 known directions fire, and no others."""

    def batch(self, index: int) -> Activations:
        generator = torch.Generator().manual_seed(1000 + index)
        group = torch.randint(4, (self.tokens, 1), generator=generator)
        fires = torch.rand(self.tokens, 64, generator=generator) < ACTIVE / 16
        values = fires * (torch.arange(64) // 16 == group) * (0.5 + torch.rand(self.tokens, 64, generator=generator))
        return {name: values @ directions for name, directions in self.directions.items()}


@pytest.mark.parametrize(("encoder", "sparsity"), TABLE)
def test_planted_features_are_recovered(encoder: str, sparsity: str) -> None:
    """As linear encoders do: 90 % of the directions have a decoder row of cosine >= 0.95.

    For a switch where tokens are of groups with features of their own, for which it is made; and for pairs (1, 2),
    since features that share both their rows with others are found together or not at all.
    """
    source_of, changes = Planted, {"pairs": (1, 2), "learning_rate": 1e-2}
    if encoder == "switch":
        source_of, changes = Grouped, {"balance_weight": 0.3, "learning_rate": 1e-2}
    settings = given(encoder, sparsity, start="samples", steps=600, dead_after=30_000, **changes)
    planned = plans(settings, N_LAYERS)[:1]
    source = source_of(planned)
    (dictionary,) = train(source, planned, config=settings, show_progress=False).dictionaries()
    truth = source.directions[planned[0].writes[0]]
    cosine = F.normalize(dictionary.W_dec.detach(), dim=1) @ truth.T
    assert (cosine.amax(0) >= 0.95).float().mean() >= 0.9


def kronecker(n_tokens: int, heads: int, seed: int = 0):
    form, generator = Kronecker(3, 4), torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, 6, generator=generator)
    return form, x, torch.randn(heads * 7, 6, generator=generator), torch.randn(heads * 7, generator=generator) - 0.5


@pytest.mark.parametrize("heads", [2, 40])
def test_pairs_are_chosen_as_from_all_products(heads: int) -> None:
    """Ruling out whole heads loses none of the k largest, and none above its level but within bfloat16 of it."""
    form, x, W_enc, b_enc = kronecker(50, heads)
    p, q = form.all_pairs(F.linear(x, W_enc, b_enc).relu())
    strength = (p * q).flatten(1).sqrt()
    top = pairs_top(x, W_enc, b_enc, 5, form)
    expected = [row.topk(5).indices[row.topk(5).values > 0].sort().values for row in strength]
    assert torch.equal(top.feature, torch.cat(expected))
    levels = torch.rand(strength.shape[1], generator=torch.Generator().manual_seed(1)) + 0.5
    above = pairs_above(x, W_enc, b_enc, levels, form)
    found = torch.zeros_like(strength, dtype=torch.bool)
    found[above.token, above.feature] = True
    clear = (strength - levels).abs() > 0.05
    assert torch.equal(found[clear], (strength > levels)[clear]) and found.any() and clear.float().mean() > 0.8


def test_values_of_pairs_pass_gradcheck() -> None:
    """From two rows each, against finite differences; both ways of computing them agree."""
    form, *tensors = kronecker(4, 3)
    x, W_enc, b_enc = (t.double().requires_grad_() for t in tensors)
    active: ActiveSet = pairs_top(x, W_enc, b_enc, 3, form)
    assert torch.autograd.gradcheck(lambda *a: encode_pairs(*a, active, form), (x, W_enc, b_enc))
    dense = dense_pairs(x, W_enc, b_enc, None, form)
    torch.testing.assert_close(encode_pairs(x, W_enc, b_enc, active, form), dense[active.token, active.feature])
    some = torch.tensor([5, 1, 30])
    torch.testing.assert_close(dense_pairs(x, W_enc, b_enc, some, form), dense[:, some])


@pytest.mark.parametrize("sparsity", ["batchtopk", "topk"])
def test_large_heads_train(sparsity: str) -> None:
    """A row takes part in many pairs that fire: more pairs than a token has rows."""
    settings = given("kronecker", sparsity, pairs=(8, 14), k=40, steps=4)
    planned = plans(settings, N_LAYERS)[:1]
    trainee = train(source := Planted(planned), planned, config=settings, show_progress=False)
    coder = next(iter(trainee))
    found = coder(trainee.read(coder, source.batch(3)), generator=torch.Generator().manual_seed(0), memory=1.0)
    assert 2 * len(found.active.token) > len(coder.W_enc) * found.active.n_tokens


def test_the_slope_of_a_product_stays_bounded() -> None:
    """The root's slope has no bound where a factor nears zero; a step must not be thrown by it."""
    p = torch.tensor([1e-12, -1.0, 0.0], requires_grad=True)
    multiply(p, torch.ones(3)).sum().backward()
    assert p.grad.tolist() == [100.0, 0.0, 0.0]


def test_experts_are_used_evenly_with_the_balance_loss() -> None:
    """The busiest expert takes less than with a balance weight of zero, and less than twice its share."""
    busiest = []
    for weight in (0.0, 0.3):
        settings = given("switch", steps=300, balance_weight=weight)
        planned = plans(settings, N_LAYERS)[:1]
        source = Planted(planned)
        (coder,) = trainee = train(source, planned, config=settings, show_progress=False)
        expert = coder.scheme.map.route(trainee.read(coder, source.batch(77))).expert
        busiest.append(torch.bincount(expert, minlength=4).max().item() / len(expert))
    assert busiest[1] < min(0.5, busiest[0] + 0.02)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder": "moe"}, "needs one of linear, switch, kronecker"),
        ({"encoder": "switch", "sparsity": "relu"}, "takes sparsity batchtopk or topk"),
        ({"encoder": "kronecker", "start": "clusters"}, "takes start random or samples"),
        ({"encoder": "switch", "dead": "resample"}, "takes dead auxk or none"),
        ({"encoder": "switch", "experts": 5}, "needs a divisor of n_features = 112"),
        ({"encoder": "switch", "sparsity": "topk", "experts": 56, "k": 3}, "an expert has 2 features"),
        ({"encoder": "switch", "experts": 28, "k": 5}, "an expert has 4 features; needs k of at most that"),
        ({"encoder": "switch", "prefixes": (8,)}, "experts have no order to nest by"),
        ({"encoder": "kronecker", "pairs": (3, 4)}, "needs two numbers whose product divides 112"),
        ({"encoder": "switch", "balance_weight": -1.0}, "must not be negative"),
    ],
)
def test_what_an_encoder_cannot_be_combined_with_is_named(changes: dict, words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        dataclasses.replace(config(), **changes)
    assert "\n" not in str(error.value)


def test_stored_encoders_that_do_not_fit_are_named(tmp_path) -> None:
    """A router without its entry in the config would be left out in silence, and outputs would change."""
    trainee, _ = start(given("switch"))
    formats.save(DictionarySet({d.layer: d for d in trainee.dictionaries()}, "trained"), tmp_path)
    config_path = tmp_path / "config.json"
    text = config_path.read_text()
    config_path.write_text(text.replace('"switch"', '"linear"'))
    with pytest.raises(InputError, match="holds W_router, which a linear encoder does not use"):
        formats.load(tmp_path)
    config_path.write_text(text.replace('"switch"', '"maze"'))
    with pytest.raises(InputError, match="encoder 'maze' is not known; known: linear, switch, kronecker"):
        formats.load(tmp_path)
    config_path.write_text(text.replace('"switch"', '"kronecker"'))
    with pytest.raises(InputError, match=r"kronecker\(m=0\): needs a whole number of rows a head"):
        formats.load(tmp_path)


def test_an_untrained_switch_starts_as_wide_as_a_linear_encoder() -> None:
    """Decoder rows make up for the router's low probabilities at the start: FVU is not that of writing nothing."""
    fvu = {}
    for encoder in ("linear", "switch"):
        settings = given("switch") if encoder == "switch" else config()
        planned = plans(settings, N_LAYERS)
        source = Planted(planned)
        trainee = Trainee(planned, source.batch(0), settings)
        with torch.no_grad():
            trainee(source.batch(1), generator=torch.Generator().manual_seed(0), memory=0.0)
            fvu[encoder] = trainee(source.batch(1), generator=torch.Generator().manual_seed(0), memory=1.0).fvu.mean()
    assert fvu["switch"] < fvu["linear"] + 0.3


def test_a_switch_multiplies_the_rows_of_one_expert_a_token_and_pairs_have_fewer_rows(monkeypatch) -> None:
    """What they are for: a quarter of the products with 4 experts, 6 rows for 8 features with pairs 2 x 4."""
    trainee, planted = start(given("switch"))
    coder, multiplied = next(iter(trainee)), []
    whole = schemes.select_above
    monkeypatch.setattr(
        schemes, "select_above", lambda x, W, *rest: multiplied.append(len(x) * len(W)) or whole(x, W, *rest)
    )
    x = trainee.read(coder, planted.batch(1))
    coder(x, generator=torch.Generator().manual_seed(0), memory=0.0)
    assert sum(multiplied) == len(x) * 112 / 4
    assert next(iter(start(given("kronecker"))[0])).W_enc.shape[0] == 112 * 6 / 8


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_resumed_run_equals_an_unbroken_one(encoder: str, tmp_path) -> None:
    """Routers are part of the checkpoint; nothing of the new encoders lives outside of it."""
    settings, ends = given(encoder, steps=8), []
    planned = plans(settings, N_LAYERS)
    source, path = Planted(planned), tmp_path / "run.safetensors"
    train(source, planned, config=settings, checkpoint=path, stop_after=3, show_progress=False)
    for checkpoint in (path, None):
        trainee = train(source, planned, config=settings, checkpoint=checkpoint, show_progress=False)
        ends.append(trainee.state_dict())
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
