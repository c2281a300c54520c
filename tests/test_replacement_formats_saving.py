"""Saving a set: files are safetensors, all of them appear or none, and what they can't hold is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save as library_bytes

from replacement import formats
from replacement.errors import InputError
from tests.tiny import random_set

CFG = SimpleNamespace(n_layers=3, d_model=24)
KINDS = ("transcoder", "skip_transcoder", "cross_layer_transcoder")


def test_saving_over_a_set_leaves_none_of_its_labels(tmp_path):
    made = random_set("llama", "transcoder", "relu", CFG)
    formats.save(replace(made, labels={1: {3: "Texas"}}), tmp_path)
    formats.save(made, tmp_path)
    assert formats.load(tmp_path).label(1, 3) == ""


def test_a_dtype_that_cannot_hold_the_weights_is_refused(tmp_path):
    made = random_set("llama", "transcoder", "relu", CFG)
    with pytest.raises(InputError, match=r"save\(dtype='int8'\): needs one of float32, float16"):
        formats.save(made, tmp_path / "x", dtype="int8")
    made.by_layer[0].W_dec.data[0, 0] = 1e6
    with pytest.raises(InputError, match=r"save: W_dec of layer 0 has values that are not finite in torch.float16"):
        formats.save(made, tmp_path / "x", dtype="float16")


def test_thresholds_are_stored_as_precise_as_they_are(tmp_path):
    made = random_set("llama", "transcoder", "jumprelu", CFG)
    made.by_layer[0].double()
    made.by_layer[0].activation.threshold += 1e-12
    formats.save(made, tmp_path, dtype="float64")
    stored = formats.load(tmp_path).by_layer[0].activation.threshold
    torch.testing.assert_close(stored, made.by_layer[0].activation.threshold, rtol=0, atol=0)


@pytest.mark.parametrize(("call", "number"), [("replace", 1), ("replace", 2), ("fsync", 3)])
def test_a_failed_save_leaves_the_old_folder_whole(call, number, tmp_path, monkeypatch):
    """Also where a later file is the one that can't be written, and where the first can't be renamed."""
    folder = tmp_path / "set"
    formats.save(replace(random_set("llama", "transcoder", "relu", CFG), labels={1: {3: "Texas"}}), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    calls, usual = [], getattr(os, call)

    def full_disk(*of):
        calls.append(of)
        if len(calls) == number:
            raise OSError(28, "No space left on device")
        return usual(*of)

    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(InputError, match=r"save\(.*set\): cannot be written \(No space left on device\); make room"):
        formats.save(random_set("llama", "skip_transcoder", "relu", CFG), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("renames", [0, 1, 4, 5])
def test_a_save_that_is_killed_leaves_the_old_set_or_none(renames, tmp_path):
    """Or all of the new one; never files of both that are read as one set."""
    sets = [random_set("llama", kind, "relu", CFG) for kind in ("transcoder", "skip_transcoder")]
    for kind, made in zip(("old", "new"), sets, strict=True):
        formats.save(made, tmp_path / kind)
    formats.save(sets[0], tmp_path / "both")
    script = f"""
import os, itertools
from pathlib import Path
from replacement import formats
made, count, rename = formats.load(Path({str(tmp_path / "new")!r})), itertools.count(), os.replace
os.replace = lambda *of: os.kill(os.getpid(), 9) if next(count) == {renames} else rename(*of)
formats.save(made, {str(tmp_path / "both")!r})
"""
    ended = subprocess.run([sys.executable, "-c", script], check=False).returncode
    n_renames = len(sets[0].by_layer) + 2
    assert ended == (-signal.SIGKILL if renames < n_renames else 0)
    left = {path.name: path.read_bytes() for path in (tmp_path / "both").iterdir() if not path.name.startswith(".")}
    old, new = ({path.name: path.read_bytes() for path in (tmp_path / kind).iterdir()} for kind in ("old", "new"))
    if renames == 0:
        assert left == old
    elif renames == n_renames:
        assert left == new
    else:
        with pytest.raises(InputError, match="no known format; a folder needs config"):
            formats.load(tmp_path / "both")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_files_are_those_of_the_safetensors_library(kind, dtype, tmp_path, monkeypatch):
    """Byte for byte, whatever the size of the pieces that they are written in; thresholds keep their own dtype."""
    made = random_set("llama", kind, "jumprelu", CFG)
    for piece in (1, 500, 2**24):
        monkeypatch.setattr("replacement.formats.tensors.PIECE_BYTES", piece)
        formats.save(made, tmp_path, dtype=dtype)
        for one in made:
            whole = {name: tensor.to(getattr(torch, dtype)) for name, tensor in one.named_parameters()}
            whole["threshold"] = one.activation.threshold
            assert (tmp_path / f"layer_{one.layer}.safetensors").read_bytes() == library_bytes(whole)
