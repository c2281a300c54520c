"""Laws of the settings: what contradicts itself, or would be ignored, is named."""

from __future__ import annotations

import pytest

from replacement.errors import InputError
from replacement.training import EndToEndConfig
from tests.test_replacement_training import toy_config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_features": 30}, "multiple of 8"),
        ({"n_features": (64, 30)}, "multiple of 8"),
        ({"n_features": (64, 32), "prefixes": (32,)}, "leave n_features itself out"),
        ({"n_features": (64, 32), "k": (4, 4, 4)}, "needs one number each"),
        ({"n_features": ()}, "needs one number each"),
        ({"n_features": [64, 32]}, "needs an int, or a tuple"),
        ({"n_features": 64.0}, "needs an int, or a tuple"),
        ({"prefixes": (32, 16)}, "ascending sizes"),
        ({"prefixes": (64,)}, "leave n_features itself out"),
        ({"prefixes": (63,)}, r"parts have \[63, 1\] features and the last must be the largest"),
        ({"k": 0}, "between 1 and n_features"),
        ({"tokens": 3}, "less than one batch"),
        ({"batch_tokens": 0}, r"\(batch_tokens=0\): must be above 0"),
        ({"warmup_steps": -1}, r"\(warmup_steps=-1\): must not be negative"),
        ({"kind": "sea"}, "needs one of transcoder"),
        ({"sparsity": "topk", "floor": 0.1}, "belongs to sparsity='batchtopk'"),
        ({"site": "hook_resid_pre"}, "belongs to kind='sae' or 'crosscoder' or 'causal_crosscoder'; leave it out"),
        ({"penalty": "quadratic"}, r"\(penalty='quadratic'\): belongs to sparsity='jumprelu'"),
        ({"sparsity": "gated", "bandwidth": 0.1}, "belongs to sparsity='jumprelu'"),
        ({"experts": 4}, "belongs to encoder='switch'"),
        ({"encoder": "switch", "pairs": (2, 2)}, "belongs to encoder='kronecker'"),
        ({"dead": "resample", "dead_weight": 3.0}, "belongs to dead='auxk' or 'ghost' or 'preactivation'"),
        ({"dead": "ghost", "dead_k": 5}, "belongs to dead='auxk'"),
        ({"sparsity": "relu", "dead_k": 5}, "belongs to sparsity='batchtopk' or 'topk'"),
        ({"sparsity": "topk", "threshold_memory": 0.5}, "belongs to sparsity='batchtopk'"),
        ({"start": "clusters", "sparsity": "topk"}, "fewer than k may fire; pass start='shared_clusters'"),
        ({"start": "shared_clusters", "prefixes": (63,)}, "the last must be the largest"),
        ({"balance_weight": float("nan")}, "must be finite"),
        ({"dead_weight": float("nan")}, "must be finite"),
        ({"layers": (1, 0)}, "ascending layers"),
        ({"learning_rate": 0.0}, "must be above 0"),
    ],
)
def test_contradictory_settings_are_named(changes: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        toy_config(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": -1.0}, r"\(learning_rate=-1.0\): must not be negative"),
        ({"warmup_steps": -3}, "must not be negative"),
        ({"aux_weight": -1.0}, "must not be negative"),
        ({"kl_weight": float("nan")}, "must be finite"),
        ({"threshold_memory": 2.0}, r"share in \[0, 1\]"),
        ({"other_share": -0.1}, r"share in \[0, 1\]"),
        ({"layers": (1, 1)}, "ascending layers from 0, each once"),
        ({"k": 0}, "needs k >= 1"),
        ({"documents": 0}, "documents >= 1"),
    ],
)
def test_a_last_stage_that_cannot_be_is_named(changes: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        EndToEndConfig(**changes)
