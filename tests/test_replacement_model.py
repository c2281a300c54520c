"""Loading a model with its dictionaries, and the tokens of a prompt: what fits works, what does not is said in one
line."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import OPTConfig

from replacement import ReplacementModel, formats
from replacement.dictionary import DictionarySet
from replacement.errors import InputError
from tests.tiny import CONTEXT, FAMILIES, PROMPT, random_set, save_tiny_model

CFG = SimpleNamespace(n_layers=3, d_model=24)


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A model folder of one's own, with a set of dictionaries in it."""
    copy = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    formats.save(random_set("llama", "skip_transcoder", "relu", CFG), copy / "dictionaries" / "mine")
    return copy


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_a_folder_loads_with_the_set_inside_it(folder, dtype):
    model = ReplacementModel.load(folder, dtype=dtype)
    assert model.dtype == getattr(torch, dtype)
    assert model.local(PROMPT).logits().shape == (8, 60)
    assert len(model.dictionaries) == model.n_layers == 3


def test_neurons_need_no_dictionaries(folder):
    assert ReplacementModel.load(folder, dictionaries="neurons").local(PROMPT).errors.abs().max() < 1e-5


def test_neurons_beside_a_set_take_the_mlps_that_it_leaves(folder):
    """Where it leaves none, what was asked for would be dropped in silence."""
    whole = random_set("llama", "skip_transcoder", "relu", CFG)
    formats.save(DictionarySet({1: whole.by_layer[1]}, "one"), folder / "dictionaries" / "one")
    model = ReplacementModel.load(folder, dictionaries=["one", "neurons"])
    assert [one.kind for one in model.coverage] == ["neurons", "skip_transcoder", "neurons"]
    message = r"^load\(dictionaries='neurons'\): every MLP is replaced by mine; leave 'neurons' out$"
    with pytest.raises(InputError, match=message):
        ReplacementModel.load(folder, dictionaries=["neurons", "mine"])


def test_text_gets_bos_unless_it_brings_one(tiny_model):
    model = tiny_model()
    assert model.tokenize("w3 w4").tolist() == model.tokenize("<bos> w3 w4").tolist() == [1, 3, 4]
    assert model.tokenize(torch.tensor([3, 4])).tolist() == [3, 4]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt: is empty"),
        (" \n ", "prompt: is empty"),
        (torch.tensor([], dtype=torch.long), "prompt: is empty"),
        ("w3 w333", r"prompt: 'w333' is not in the vocabulary of llama; near: w33"),
        ("w3 " * CONTEXT, f"has {CONTEXT + 1} tokens .with BOS., llama takes at most {CONTEXT}"),
        (torch.tensor([1, 60]), "token ids must be in 0 to 59, got 1 to 60"),
        (torch.tensor([-1, 6]), "token ids must be in 0 to 59, got -1 to 6"),
        (torch.zeros(2, 3, dtype=torch.long), r"needs a string or a 1-D tensor of token ids, got \[2, 3\]"),
        ([1, 3], "prompt: needs a string or a 1-D tensor of token ids, got a list"),
        (None, "prompt: needs a string or a 1-D tensor of token ids, got a NoneType"),
        (torch.zeros(3), r"needs a string or a 1-D tensor of token ids, got \[3\] torch.float32"),
    ],
)
def test_bad_prompts_are_refused_in_one_line(tiny_model, prompt, message):
    with pytest.raises(InputError, match=message) as raised:
        tiny_model().tokenize(prompt)
    assert "\n" not in str(raised.value)


def _poison(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _lose(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def _deep(folder):
    (folder / "config.json").write_text("[" * 100_000)


def _code(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}, "model_type": "evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("open('ran', 'w')\nclass Config: ...\nclass Model: ...\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_poison, "model.layers.1.mlp.up_proj.weight has values that are not finite"),
        (_lose, "its file lacks weights, among them model.layers.1.mlp.up_proj.weight"),
        (_pickle, "cannot be loaded"),
        (_truncate, "cannot be loaded"),
        (_deep, "cannot be loaded"),
        (_code, "cannot be loaded"),
        (lambda f: (f / "config.json").unlink(), "cannot be loaded"),
    ],
)
def test_damaged_or_hostile_models_are_refused_in_one_line(folder, damage, message, monkeypatch):
    monkeypatch.chdir(folder)
    damage(folder)
    with pytest.raises(InputError, match=message) as raised:
        ReplacementModel.load(folder)
    assert "\n" not in str(raised.value)
    assert not (folder / "ran").exists(), "code that came with the model was run"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "./nowhere"}, "model './nowhere': no such directory"),
        ({"model": "/nowhere/at/all"}, "model '/nowhere/at/all': no such directory"),
        ({"dtype": "int8"}, r"load\(dtype='int8'\): needs one of float32, float64"),
        ({"device": "cuda:99"}, "device 'cuda:99': is not available here"),
        ({"device": "toaster"}, "device 'toaster': is not available here"),
        ({"dictionaries": "./nowhere"}, "dictionaries './nowhere': no such folder"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(folder, arguments, message):
    with pytest.raises(InputError, match=message) as raised:
        ReplacementModel.load(**({"model": folder} | arguments))
    assert "\n" not in str(raised.value)


def _site(made):
    made.by_layer[1].read = "attn.hook_q"
    return made


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: random_set("llama", "transcoder", "relu", SimpleNamespace(n_layers=5, d_model=24)), "reaches layer 3"),
        (
            lambda: random_set("llama", "transcoder", "relu", SimpleNamespace(n_layers=3, d_model=16)),
            "layer 0: reads vectors of width 16, m has d_model 24",
        ),
        (
            lambda: _site(random_set("llama", "transcoder", "relu", CFG)),
            "read site 'attn.hook_q' is not known; known: mlp.hook_in, ln2.hook_normalized, hook_resid_mid",
        ),
    ],
)
def test_dictionaries_that_do_not_fit_say_what_was_expected(tiny_model, make, message):
    with pytest.raises(InputError, match=message):
        ReplacementModel(tiny_model().bridge, make(), name="m")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_reference_engine_refuses_half_precision(tiny_model, dtype):
    """Its gradients would be rounded, and hooks in another dtype stop the model in the middle."""
    model = tiny_model("llama", "transcoder", "relu", dtype)
    assert model.engine(model.local(PROMPT), "linear")
    with pytest.raises(InputError, match=f"engine 'autograd': needs a model in .*llama is in {dtype}; load it"):
        model.engine(model.local(PROMPT), "autograd")


def test_an_architecture_without_a_batch_axis_is_refused(tmp_path, monkeypatch):
    """OPT's MLP sees all positions flattened, so its second norm's scale has no batch."""
    config = OPTConfig(vocab_size=60, hidden_size=24, num_hidden_layers=3, ffn_dim=40, max_position_embeddings=32,
                       num_attention_heads=4, word_embed_proj_dim=24, pad_token_id=0)  # fmt: skip
    monkeypatch.setitem(FAMILIES, "opt", lambda: config)
    model = ReplacementModel.load(save_tiny_model("opt", tmp_path), dictionaries="neurons")
    with pytest.raises(InputError, match="the linear path does not know this architecture"):
        model.local(PROMPT)


def test_resid_mid_needs_sequential_blocks(tiny_model):
    with pytest.raises(InputError, match="reads hook_resid_mid, which neox does not have"):
        ReplacementModel(tiny_model("neox").bridge, random_set("qwen3", "transcoder", "relu", CFG), name="neox")
