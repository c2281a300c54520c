"""Dictionary folders: what is saved is what is loaded, by outputs; damaged and hostile folders are refused in one
line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from circuits import attribute
from replacement import ReplacementModel, formats, stored
from replacement.dictionary import DictionarySet
from replacement.errors import InputError
from replacement.finite import all_finite
from tests.tiny import ENCODERS, PROMPT, random_set

CFG = SimpleNamespace(n_layers=3, d_model=24)
KINDS = ("transcoder", "skip_transcoder", "cross_layer_transcoder")
ACTIVATIONS = ("relu", "topk", "batchtopk", "jumprelu")


def outputs(dictionaries, x):
    """Everything a set computes: activations, writes at every layer, biases and skips."""
    for dictionary in dictionaries:
        activations = dictionary.encode(x)
        yield activations
        for layer in dictionary.write_layers:
            yield dictionary.decode(activations, layer)
        yield dictionary.b_dec + dictionary.skip(x)


def assert_same_outputs(one, other):
    x = torch.randn(11, CFG.d_model, generator=torch.Generator().manual_seed(0))
    for a, b in zip(outputs(one, x), outputs(other, x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_native_round_trip_keeps_the_outputs(kind, activation, tmp_path):
    dictionaries = random_set("llama", kind, activation, CFG)
    formats.save(dictionaries, tmp_path / "set", metadata={"seed": 3})
    loaded = formats.load(tmp_path / "set")
    assert_same_outputs(dictionaries, loaded)
    assert loaded.metadata == {"seed": 3}
    assert [(d.layer, d.kind, d.read, d.write) for d in loaded] == [
        (d.layer, d.kind, d.read, d.write) for d in dictionaries
    ]


def test_saving_twice_gives_the_same_bytes_and_labels_come_back(tmp_path):
    dictionaries = replace(
        random_set("llama", "transcoder", "jumprelu", CFG), labels={1: {3: "Texas", 20: "say Austin"}}
    )
    for name in ("a", "b"):
        formats.save(dictionaries, tmp_path / name, dtype="float16")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["config.json", "labels.json", "layer_0.safetensors", "layer_1.safetensors", "layer_2.safetensors"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    assert formats.load(tmp_path / "a").label(1, 20) == "say Austin"
    assert formats.load(tmp_path / "a").label(1, 21) == ""


@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu"])
@pytest.mark.parametrize("kind", KINDS)
def test_circuit_tracer_folders_give_the_same_outputs(kind, activation, tmp_path):
    """Also TopK sets, which the format's own loader reloads as ReLU."""
    dictionaries = random_set("llama", kind, activation, CFG)
    write_circuit_tracer(dictionaries, tmp_path)
    loaded = formats.load(tmp_path)
    assert_same_outputs(dictionaries, loaded)
    assert {d.read for d in loaded} == {"mlp.hook_in"}


def write_circuit_tracer(dictionaries, folder):
    """A set in the other tool's layout, written out by hand from its description."""
    cross = next(iter(dictionaries)).kind == "cross_layer_transcoder"
    config = {"model_kind": "cross_layer_transcoder" if cross else "transcoder_set", "model_name": "tiny"}
    config |= {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out", "scan": "tiny/scan"}
    for d in dictionaries:
        if hasattr(d.activation, "k"):
            config["topk"] = d.activation.k
        threshold = getattr(d.activation, "threshold", None)
        tensors = {name: getattr(d, name).detach().clone() for name in ("W_enc", "b_enc", "b_dec")}
        if cross:
            tensors = {f"{name}_{d.layer}": value for name, value in tensors.items()}
            if threshold is not None:
                tensors[f"threshold_{d.layer}"] = threshold
            save_file(tensors, folder / f"W_enc_{d.layer}.safetensors")
            save_file({f"W_dec_{d.layer}": d.W_dec.detach().clone()}, folder / f"W_dec_{d.layer}.safetensors")
            continue
        tensors["W_dec"] = d.W_dec.detach().clone()
        if d.W_skip is not None:
            tensors["W_skip"] = d.W_skip.detach().clone()
        if threshold is not None:
            tensors["activation_function.threshold"] = threshold
        save_file(tensors, folder / f"layer_{d.layer}.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def _edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def _edit_tensors(folder, change):
    tensors = load_file(folder / "layer_1.safetensors")
    change(tensors)
    save_file(tensors, folder / "layer_1.safetensors")


def _truncate(folder):
    path = folder / "layer_1.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def _poison(tensors):
    tensors["W_dec"][3, 3] = float("nan")


DAMAGE = {
    "a file cut short": (_truncate, r"layer_1\.safetensors: not a readable safetensors file"),
    "a missing file": (lambda f: (f / "layer_1.safetensors").unlink(), r"layer_1\.safetensors: no such file"),
    "NaN": (lambda f: _edit_tensors(f, _poison), r"tensor 'W_dec' has values that are not finite"),
    "a missing tensor": (
        lambda f: _edit_tensors(f, lambda t: t.pop("b_dec")),
        r"lacks the tensor b_dec; it has 'W_dec'",
    ),
    "another shape": (
        lambda f: _edit_tensors(f, lambda t: t.update(b_enc=torch.zeros(7))),
        r"transcoder of layer 1: b_enc has shape \[7\], needs \[30\]",
    ),
    "too many axes": (
        lambda f: _edit_tensors(f, lambda t: t.update(W_dec=torch.zeros(2, 2, 2))),
        r"tensor W_dec has shape \[2, 2, 2\], needs 2 axes",
    ),
    "integers": (
        lambda f: _edit_tensors(f, lambda t: t.update(b_dec=torch.zeros(24, dtype=torch.int64))),
        r"tensor 'b_dec' is torch\.int64, needs floating point",
    ),
    "a path out of the folder": (
        lambda f: _edit_config(f, lambda c: c["dictionaries"][1].update(file="../layer_1.safetensors")),
        r"must lie in the folder itself",
    ),
    "another version": (lambda f: _edit_config(f, lambda c: c.update(version=9)), r"version 9, this release reads 1"),
    "an unknown kind": (
        lambda f: _edit_config(f, lambda c: c["dictionaries"][0].update(kind="magic")),
        r"kind 'magic' is not known; known: transcoder, skip_transcoder, sae",
    ),
    "an unknown activation": (
        lambda f: _edit_config(f, lambda c: c["dictionaries"][0].update(activation={"name": "swish"})),
        r"activation 'swish' is not known",
    ),
    "a missing field": (
        lambda f: _edit_config(f, lambda c: c["dictionaries"][0].pop("read")),
        r"an entry of `dictionaries` lacks one of",
    ),
    "JSON cut short": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text()[:-40]),
        r"config\.json: not readable JSON",
    ),
    "labels that are a list": (
        lambda f: (f / "labels.json").write_text('{"0": ["x"]}'),
        r"labels\.json: needs layer -> feature -> words",
    ),
    "a threshold of another width": (
        lambda f: (
            _edit_tensors(f, lambda t: t.update(threshold=torch.zeros(30, 1))),
            _edit_config(f, lambda c: c["dictionaries"][1].update(activation={"name": "jumprelu"})),
        ),
        r"transcoder of layer 1: threshold has shape \[30, 1\], needs \[30\]",
    ),
    "a k that is no number": (
        lambda f: _edit_config(f, lambda c: c["dictionaries"][0].update(activation={"name": "topk", "k": "x"})),
        r"TopK\(k='x'\): needs a whole number of features a token, at least 1",
    ),
    "a tensor that would be left out": (
        lambda f: _edit_tensors(f, lambda t: t.update(b_gate=torch.zeros(30))),
        r"holds the tensor 'b_gate', which is not known here",
    ),
    "one layer twice": (
        lambda f: _edit_config(f, lambda c: c["dictionaries"][1].update(layer=0)),
        r"lists two dictionaries for layer 0",
    ),
    "true as a layer": (
        lambda f: _edit_config(f, lambda c: c["dictionaries"][1].update(layer=True)),
        r"an entry of `dictionaries` lacks one of",
    ),
    "metadata that are a list": (
        lambda f: _edit_config(f, lambda c: c.update(metadata=[1])),
        r"an object as `metadata`",
    ),
    "a file name of two lines": (
        lambda f: _edit_config(f, lambda c: c["dictionaries"][1].update(file="a\nb")),
        r"must lie in the folder itself",
    ),
    "a number of 5,000 digits": (
        lambda f: (f / "config.json").write_text('{"format": "circuits-dictionaries", "version": ' + "1" * 5000 + "}"),
        r"config\.json: not readable JSON",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), r"no known format; a folder needs config\.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_are_refused_in_one_line(damage, tmp_path):
    formats.save(random_set("llama", "transcoder", "relu", CFG), tmp_path)
    change, message = DAMAGE[damage]
    change(tmp_path)
    with pytest.raises(InputError, match=message) as raised:
        formats.load(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("model_kind: [1", "not readable YAML"),
        ("just text", "needs a mapping"),
        ("!!python/object/apply:os.system ['true']", "not readable YAML"),
        ("{model_kind: transcoder_set, feature_input_hook: x}", "lacks feature_output_hook"),
        ("{model_kind: x, feature_input_hook: a, feature_output_hook: b}", "model_kind is 'x', needs one of"),
        ("{model_kind: transcoder_set, feature_input_hook: a, feature_output_hook: b}", r"lacks layer_0\.safetensors"),
        ("{model_kind: [x], feature_input_hook: a, feature_output_hook: b}", r"model_kind is \['x'\], needs one of"),
        ("[" * 10_000, "not readable YAML"),
        ("made: 2001-99-99", "not readable YAML"),
    ],
)
def test_bad_yaml_is_refused_in_one_line(config, message, tmp_path):
    (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(InputError, match=message) as raised:
        formats.load(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("transcoder", {"topk": 0}, r"TopK\(k=0\): needs a whole number"),
        ("transcoder", {"k": [3]}, r"TopK\(k=\[3\]\): needs a whole number"),
        (
            "transcoder",
            {"activation": "topk"},
            "says activation 'topk', but with its k and the file's tensors it is relu",
        ),
        ("transcoder", {"activation": "gelu"}, "says activation 'gelu'"),
        ("cross_layer_transcoder", {"activation": "jump_relu"}, "says activation 'jump_relu', but .* it is relu"),
    ],
)
def test_an_activation_that_is_not_the_configs_is_refused(kind, changes, message, tmp_path):
    """Otherwise such sets would be read as ReLU, in silence."""
    write_circuit_tracer(random_set("llama", kind, "relu", CFG), tmp_path)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text()) | changes
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=message):
        formats.load(tmp_path)


def test_a_cross_layer_skip_is_refused_not_left_out(tmp_path):
    write_circuit_tracer(random_set("llama", "cross_layer_transcoder", "relu", CFG), tmp_path)
    tensors = load_file(tmp_path / "W_enc_1.safetensors")
    save_file(tensors | {"W_skip_1": torch.eye(24)}, tmp_path / "W_enc_1.safetensors")
    with pytest.raises(InputError, match=r"W_enc_1\.safetensors: holds the tensor 'W_skip_1'"):
        formats.load(tmp_path)


def test_thresholds_with_a_leading_axis_are_read(tmp_path):
    dictionaries = random_set("llama", "cross_layer_transcoder", "jumprelu", CFG)
    write_circuit_tracer(dictionaries, tmp_path)
    tensors = load_file(tmp_path / "W_enc_1.safetensors")
    save_file(tensors | {"threshold_1": tensors["threshold_1"][None]}, tmp_path / "W_enc_1.safetensors")
    assert_same_outputs(dictionaries, formats.load(tmp_path))


def test_one_layer_is_written_at_one_site():
    """A cross-layer transcoder that writes one layer before and after the post-norm would be added up wrongly."""
    made = random_set("gemma2", "cross_layer_transcoder", "relu", CFG)
    made.by_layer[1].write = "hook_mlp_out"
    with pytest.raises(InputError, match=r"layer 1 is written at hook_mlp_out and mlp\.hook_out, needs one site"):
        DictionarySet(made.by_layer, "mixed")


def test_eight_bit_floats_are_read(tmp_path):
    formats.save(random_set("llama", "transcoder", "relu", CFG), tmp_path)
    _edit_tensors(tmp_path, lambda t: t.update({k: v.to(torch.float8_e4m3fn) for k, v in t.items()}))
    assert formats.load(tmp_path).by_layer[1].W_enc.dtype == torch.float32


def test_find_names_what_there_is(tmp_path):
    formats.save(random_set("llama", "transcoder", "relu", CFG), tmp_path / "dictionaries" / "mine")
    assert formats.find(None, tmp_path, "m").name == formats.find("mine", tmp_path, "m").name == "mine"
    with pytest.raises(InputError, match="no such folder; pass a folder, a hub id, or one of: mine, neurons"):
        formats.find("./nowhere", tmp_path, "m")
    shutil.rmtree(tmp_path / "dictionaries")
    with pytest.raises(InputError, match="comes with no dictionaries"):
        formats.find(None, tmp_path, "m")


@pytest.mark.parametrize("kind", [*KINDS, *ENCODERS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_stay_as_stored_and_their_rows_are_converted(kind, dtype, tiny_model, tmp_path):
    """All of a set may be more than there is memory: nothing copies it on the way from the file to a trace."""
    formats.save(random_set("llama", kind, "relu", CFG), tmp_path, dtype=dtype)
    loaded, whole = (formats.load(tmp_path) for _ in range(2))
    kept = [(rows.data_ptr(), rows.dtype) for d in loaded for rows in (d.W_enc, d.W_dec)]
    model = ReplacementModel(tiny_model("llama", "neurons").bridge, loaded, name="llama")
    assert [(rows.data_ptr(), rows.dtype) for d in model.dictionaries for rows in (d.W_enc, d.W_dec)] == kept
    assert {own for _, own in kept} == {getattr(torch, dtype)}
    for dictionary in whole:
        dictionary.to(torch.float64)
    usual = ReplacementModel(tiny_model("llama", "neurons").bridge, whole, name="llama")
    edges = [attribute(each, PROMPT).dense_adjacency() for each in (model, usual)]
    np.testing.assert_array_equal(*edges)


@pytest.mark.parametrize("kind", ["transcoder", *ENCODERS])
def test_rows_converted_a_few_at_a_time_encode_alike(kind, monkeypatch):
    """Activations and their gradients are those of rows that were converted all at once."""
    monkeypatch.setattr(stored, "CONVERTED_AT_ONCE", 7 * CFG.d_model)
    (short, *_), (whole, *_) = (random_set("llama", kind, "relu", CFG) for _ in range(2))
    short.W_enc.data = short.W_enc.to(torch.bfloat16)
    whole.W_enc.data = short.W_enc.float()
    x = torch.randn(2, 5, CFG.d_model, generator=torch.Generator().manual_seed(0))
    results = []
    for dictionary in (short, whole):
        leaf = x.clone().requires_grad_()
        encoded = dictionary.encode(leaf)
        encoded.sin().sum().backward()
        results.append((encoded.detach(), leaf.grad))
    for found, expected in zip(*results, strict=True):
        assert expected.any()
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_converted_a_few_at_a_time_write_alike(kind, monkeypatch):
    """At every layer, what is written is that of rows that were converted all at once."""
    monkeypatch.setattr(stored, "CONVERTED_AT_ONCE", 7 * CFG.d_model)
    (short, *_), (whole, *_) = (random_set("llama", kind, "relu", CFG) for _ in range(2))
    short.W_dec.data = short.W_dec.to(torch.bfloat16)
    whole.W_dec.data = short.W_dec.float()
    activations = torch.rand(2, 5, short.n_features, generator=torch.Generator().manual_seed(0))
    for layer in short.write_layers:
        expected = whole.decode(activations, layer)
        assert expected.any()
        torch.testing.assert_close(short.decode(activations, layer), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_number_that_is_not_finite_is_found(dtype, bad):
    """Wherever it stands, beside others too."""
    assert all_finite(torch.zeros(0, 3, dtype=dtype)) and all_finite(torch.tensor(torch.finfo(dtype).max, dtype=dtype))
    for place in range(70):
        values = torch.linspace(-3, 3, 70, dtype=dtype)
        assert all_finite(values)
        values[place] = bad
        assert not all_finite(values) and not all_finite(values.view(7, 10).T)
        values[place - 1] = torch.nan
        assert not all_finite(values)
