"""What every row of the tracing benchmark shares: prompt, clocks, memory, edges on disk; prints one JSON line.

Needs torch and numpy alone, so that it runs inside any peer's environment. Knows no tool.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measure import median_cpu_seconds, memory_peak, reset_memory_peak

FEATURE, ERROR, EMBEDDING, LOGIT = range(4)
_WARM_UP = 4  # tokens of the untimed prompt
_SHORT = 5.0  # CPU seconds; a trace that takes less is repeated
_REPEATS = 3
_COUNTED = 120.0  # CPU seconds; of a longer trace products are not counted, which takes another
_CODE = (4, 256, 1 << 16, 1 << 24)  # bounds of kind, layer + 1, position, number + 1


class Edges(NamedTuple):
    """A graph's edges for comparison, whichever tool made it."""

    nodes: np.ndarray  #: [n_nodes] codes of `node_codes`, in the order of columns
    rows: np.ndarray  #: [n_rows] which of the nodes have inputs
    block: Callable[[np.ndarray], np.ndarray]  #: dense [rows, n_nodes] of some of them


class Tool(NamedTuple):
    """How a tool is asked to do a row."""

    load: Callable[[argparse.Namespace], Any]
    logits: Callable[[Any, torch.Tensor], torch.Tensor]  #: of the language model, [pos, vocab]
    trace: Callable[[Any, torch.Tensor, argparse.Namespace], Any]
    edges: Callable[[Any], Edges]
    figures: Callable[[Any, Any], dict[str, float]]  #: what else a row says of a model and its graph
    products: Callable[[Any, torch.Tensor, argparse.Namespace], float] | None = None
    """Multiply-adds of one trace, where they can be counted."""


def node_codes(kind: np.ndarray, layer: np.ndarray, position: np.ndarray, number: np.ndarray) -> np.ndarray:
    """One integer a node; number is the feature or the token, -1 where there is none."""
    return np.ravel_multi_index((kind, layer + 1, position, number + 1), _CODE)


def is_feature(codes: np.ndarray) -> np.ndarray:
    """Which nodes are features."""
    return np.unravel_index(codes, _CODE)[0] == FEATURE


def arguments() -> argparse.Namespace:
    """The command line of a row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--dictionaries", type=Path, required=True, help="folder in circuit-tracer's format")
    parser.add_argument("--prompt", type=int, nargs="+", required=True, help="token ids")
    parser.add_argument("--rows", type=int, help="at most so many features have a row; all without it")
    parser.add_argument("--batch", type=int, help="targets a sweep; the tool's default without it")
    parser.add_argument("--limit", type=int, required=True, help="CPU seconds that a trace may take")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder for logits and edges")
    return parser.parse_args()


def run(tool: Tool) -> None:
    """Do one row and print its figures."""
    options = arguments()
    torch.set_num_threads(options.threads)
    tokens = torch.tensor(options.prompt)
    rate = _product_rate(options.device)
    model = tool.load(options)
    memory = _Memory(options.device)
    tool.trace(model, tokens[:_WARM_UP], options)
    limit = int(time.process_time()) + options.limit  # CPU time: wall time depends on what else runs
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
    cpu: list[float] = []
    wall: list[float] = []
    graph = None
    while not cpu or (cpu[0] < _SHORT and len(cpu) < _REPEATS):
        graph = None
        gc.collect()
        _wait(options.device)
        began = time.process_time(), time.perf_counter()
        graph = tool.trace(model, tokens, options)
        _wait(options.device)
        cpu.append(time.process_time() - began[0])
        wall.append(time.perf_counter() - began[1])
        memory.note()
    resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    figures = {"cpu_seconds": statistics.median(cpu), "wall_seconds": statistics.median(wall), "repeats": len(cpu)}
    figures |= {"peak_bytes": memory.over, "process_bytes": memory.process, "products_per_second": rate}
    figures |= tool.figures(model, graph)
    if tool.products is not None and cpu[0] < _COUNTED:
        figures["products"] = tool.products(model, tokens, options)
    print(json.dumps(figures), flush=True)
    if options.out is not None:
        options.out.mkdir(parents=True)
        np.save(options.out / "logits.npy", tool.logits(model, tokens).float().cpu().numpy())
        _write(tool.edges(graph), options.out)


class _Memory:
    """Peak memory over what the loaded model takes: of the first trace, since later ones start among its remains."""

    def __init__(self, device: str) -> None:
        self.cuda = device != "cpu"
        self.over = self.process = 0
        self.loading = 0 if self.cuda else memory_peak()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self.before = reset_memory_peak()

    def note(self) -> None:
        peak = torch.cuda.max_memory_allocated() if self.cuda else memory_peak()
        self.over = self.over or peak - self.before
        self.process = max(self.process, peak, self.loading)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _product_rate(device: str) -> float:
    """Multiply-adds a second of a float32 product as large as those of a sweep at d_model 768."""
    a, b = torch.randn(768, 768, device=device), torch.randn(768, 4096, device=device)
    out = torch.empty(768, 4096, device=device)

    def product() -> None:
        torch.mm(a, b, out=out)
        _wait(device)

    return a.numel() * b.shape[1] / median_cpu_seconds(product, times=9)


def _write(edges: Edges, folder: Path) -> None:
    """The edges as arrays that can be mapped into memory."""
    np.save(folder / "nodes.npy", edges.nodes)
    np.save(folder / "rows.npy", edges.rows)
    shape = len(edges.rows), len(edges.nodes)
    draft = folder / "edges.tmp"
    dense = np.lib.format.open_memmap(draft, mode="w+", dtype=np.float32, shape=shape)
    for start in range(0, shape[0], 512):
        dense[start : start + 512] = edges.block(edges.rows[start : start + 512])
    dense.flush()
    draft.rename(folder / "edges.npy")  # a process that is killed leaves no half of it
