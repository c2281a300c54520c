"""What tests share: tiny random language models of every family, dictionaries for them, and the folder of outside
results."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from replacement import ReplacementModel
from replacement.dictionary import DictionarySet
from replacement.loading import load_bridge
from replacement.neurons import neurons
from tests.mixes import ALONE, MIXES
from tests.tiny import random_set, save_tiny_model

torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of outside material beside the repository; tests that need it are skipped where it is not."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared")
    return SHARED


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory):
    """`tiny_folder(family)`: a Hugging Face folder with a tiny random model, made once."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = save_tiny_model(family, root / family)
        return made[family]

    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_folder):
    """`tiny_model(family, kind, activation, dtype)`: a replacement model with random dictionaries, made once."""
    made: dict[tuple, ReplacementModel] = {}

    def model(
        family: str = "llama", kind: str = "transcoder", activation: str = "relu", dtype: str = "float64"
    ) -> ReplacementModel:
        key = (family, kind, activation, dtype)
        if key not in made:
            bridge, _ = load_bridge(tiny_folder(family), getattr(torch, dtype), "cpu")
            compute = torch.float64 if dtype == "float64" else torch.float32
            dictionaries: DictionarySet
            if kind == "neurons":
                dictionaries = neurons(bridge, compute)
            else:
                dictionaries = random_set(family, kind, activation, bridge.cfg)
            made[key] = ReplacementModel(bridge, dictionaries, name=family)
        return made[key]

    return model


@pytest.fixture(scope="session")
def mixed_model(tiny_model):
    """`mixed_model(family, mix)`: a replacement model of a mix, made once."""
    made: dict[tuple, ReplacementModel] = {}

    def model(family: str, mix: str) -> ReplacementModel:
        if (family, mix) not in made:
            bridge = tiny_model(family).bridge
            made[family, mix] = ReplacementModel(bridge, (MIXES | ALONE)[mix](family, bridge), name=family)
        return made[family, mix]

    return model
