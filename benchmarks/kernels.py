"""The sparse kernels of a GPU beside torch's own functions that stand in where Triton is missing.

    python benchmarks/kernels.py

Rows: what a training step calls, on random activations of which each token has k. By default features are as popular as
the ranks of words, as trained ones nearly are; `--even` makes all equally popular. ms: median of many runs, with the
GPU's cache emptied before each. GB/s: the bytes of all rows that the entries name, and of the result, over that time;
rows that the cache holds make it more than the memory's own rate. Difference: the largest between the two, of the
largest value. Needs a GPU and Triton.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from replacement.training.sparse import ActiveSet, decode_active, encode_active, products  # noqa: E402


def active_set(n_tokens: int, n_features: int, k: int, *, even: bool) -> ActiveSet:
    """The k features of every token, drawn at random without repeats."""
    generator = torch.Generator("cuda").manual_seed(0)
    rank = torch.arange(1.0, n_features + 1, device="cuda")
    chances = torch.ones_like(rank) if even else 1 / rank
    noise = torch.rand(n_tokens, n_features, device="cuda", generator=generator).clamp_min(1e-9)
    feature = (noise.log() / chances).topk(k).indices.sort().values  # weighted draws, by their keys
    token = torch.arange(n_tokens, device="cuda").repeat_interleave(k)
    return ActiveSet(token, feature.flatten(), n_tokens, n_features)


def calls(active: ActiveSet, d: int, dtype: torch.dtype) -> dict[str, tuple[Callable[[], Tensor], int]]:
    """By name, what a step calls and how many rows it reads and writes."""
    x, grad = (torch.randn(active.n_tokens, d, device="cuda", dtype=dtype) for _ in range(2))
    W_enc, W_dec = (torch.randn(active.n_features, d, device="cuda", dtype=dtype) for _ in range(2))
    b_enc, entries = torch.zeros(active.n_features, device="cuda", dtype=dtype), len(active.token)
    values = torch.randn(entries, device="cuda", dtype=dtype)
    order, token, by_feature = active.by_feature
    leaves = [W_enc.requires_grad_(), b_enc.requires_grad_(), W_dec.requires_grad_()]

    def step() -> Tensor:
        out = decode_active(encode_active(x, W_enc, b_enc, active), W_dec, active)[:, 0]
        return torch.cat([each.flatten() for each in torch.autograd.grad(out, leaves, grad)])

    frozen, ordered = W_dec.detach(), values[order]
    return {
        "dots: encode": (lambda: products.dots(x, frozen, active.token, active.feature, active.starts), 2 * entries),
        "sums: decode": (lambda: products.sums(frozen, active.feature, values, active.starts), entries + len(x)),
        "sums: gradient of weights": (
            lambda: products.sums(x, token, ordered, by_feature),
            entries + active.n_features,
        ),
        "all of a step": (step, 7 * entries + len(x) + 2 * active.n_features),
    }


def main() -> int:
    """Print one table for every number of features."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--features", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--d", type=int, default=256)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4096, help="tokens")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--even", action="store_true", help="all features equally popular")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py: needs a GPU, and torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    if importlib.util.find_spec("triton") is None:
        print("benchmarks/kernels.py: needs Triton, and there is none: pip install triton", file=sys.stderr)
        return 2
    from triton.testing import do_bench

    dtype = getattr(torch, options.dtype)
    for n_features in options.features:
        active = active_set(options.batch, n_features, options.k, even=options.even)
        most = int(torch.bincount(active.feature).max())
        shape = f"{n_features:,} features, d {options.d}, k {options.k}, {options.batch:,} tokens, {options.dtype}"
        table = Table(title=f"{shape}\n{torch.cuda.get_device_name()}; the busiest feature fires at {most:,} tokens")
        for name in ("", "ms", "GB/s", "ms, torch's own", "GB/s", "difference"):
            table.add_column(name, justify="right" if name else "left")
        for name, (call, rows) in calls(active, options.d, dtype).items():
            cells, results = [], []
            for kernels in (products.kernels_on, lambda device: None):
                with mock.patch.object(products, "kernels_on", kernels):
                    results.append(call().double())
                    ms = do_bench(call, return_mode="median")
                cells += [f"{ms:.3f}", f"{rows * options.d * dtype.itemsize / ms / 1e6:,.0f}"]
            ours, own = results
            table.add_row(name, *cells, f"{float((ours - own).abs().max() / own.abs().max()):.1e}")
        Console(width=140).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
