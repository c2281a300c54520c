"""What `--dry-run` expects beside what a trace really takes.

    python benchmarks/dry_run.py [--size LAYERS,WIDTH,TOKENS,ROWS ...]

Random Llama models with random transcoders, 40 active features a token and layer. Each line is two fresh processes of
`circuits`, one thread each, one after the other: seconds are CPU seconds after loading (what else the machine does is
no part of them), memory is the largest of the process. A ratio within 0.5 to 2 is what `--dry-run` promises.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, set_seed

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from replacement import formats  # noqa: E402
from replacement.activation import TopK  # noqa: E402
from replacement.dictionary import DictionarySet  # noqa: E402
from replacement.transcoder import Transcoder  # noqa: E402

SIZES = ("4,128,16,all", "6,256,32,all", "6,256,64,500", "6,256,128,7500", "12,768,32,1000")
FEATURES, K, VOCABULARY = 2048, 40, 1000
RUN = """
import json, resource, sys, time
from circuits import attribute, preflight
from replacement import ReplacementModel
what, model, dictionaries, prompt, rows = sys.argv[1:]
preflight.perf_counter = time.process_time
model = ReplacementModel.load(model, dictionaries=dictionaries)
limit = None if rows == "all" else int(rows)
started = time.process_time()
if what == "expected":
    said = preflight.preflight(model, prompt, max_features=limit)
    figures = {"tracing": said.tracing_seconds, "seconds": said.seconds, "edges": said.edges, "bytes": said.peak_bytes}
    figures["cost"] = time.process_time() - started
else:
    graph = attribute(model, prompt, max_features=limit)
    tracing = time.process_time() - started
    preflight._finish(graph)
    figures = {"tracing": tracing, "seconds": time.process_time() - started, "edges": graph.n_edges}
    figures["bytes"] = preflight._largest_memory()
print(json.dumps(figures))
"""


def make(folder: Path, layers: int, width: int) -> None:
    """Save a random model with its dictionaries."""
    set_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": width // 32, "num_key_value_heads": width // 32}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=2048, **sizes, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    words = {"<unk>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    by_layer = {
        layer: Transcoder(
            layer=layer,
            read="mlp.hook_in",
            write="hook_mlp_out",
            W_enc=normal(FEATURES, width) / width**0.5,
            b_enc=0.1 * normal(FEATURES),
            W_dec=normal(FEATURES, width) / FEATURES**0.5,
            b_dec=0.1 * normal(width),
            activation=TopK(K),
            W_skip=None,
        )
        for layer in range(layers)
    }
    (folder / "dictionaries").mkdir()
    formats.save(DictionarySet(by_layer, "random"), folder / "dictionaries", dtype="float32")


def figures(what: str, folder: Path, tokens: int, rows: str) -> dict[str, float]:
    """What a fresh process says, expected or real."""
    prompt = " ".join(f"w{(37 * i * i) % (VOCABULARY - 3) + 3}" for i in range(tokens - 1))
    command = [sys.executable, "-c", RUN, what, str(folder / "model"), str(folder / "dictionaries"), prompt, rows]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure every size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", metavar="LAYERS,WIDTH,TOKENS,ROWS")
    sizes = parser.parse_args().size or SIZES
    table = Table(title="expected / real (ratio)")
    for name in ("layers", "width", "tokens", "rows", "tracing s", "all s", "edges, 1,000", "memory GB", "dry run s"):
        table.add_column(name, justify="right")
    for size in sizes:
        layers, width, tokens, rows = size.split(",")
        with tempfile.TemporaryDirectory() as scratch:
            make(Path(scratch), int(layers), int(width))
            expected, real = (figures(what, Path(scratch), int(tokens), rows) for what in ("expected", "real"))
        cells = []
        for name, unit, digits in (("tracing", 1, 1), ("seconds", 1, 1), ("edges", 1e3, 0), ("bytes", 1e9, 2)):
            a, b = expected[name] / unit, real[name] / unit
            cells.append(f"{a:,.{digits}f} / {b:,.{digits}f} ({a / b:.2f})")
        table.add_row(layers, width, tokens, rows, *cells, f"{expected['cost']:.1f}")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
