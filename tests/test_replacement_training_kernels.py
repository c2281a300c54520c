"""Laws of the kernels for GPUs: right in Triton's interpreter, compiled for GPUs that need not be here, and where there
is a GPU, equal to the CPU's results and to themselves, bit for bit."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from replacement.training.sparse import ActiveSet, decode_active, encode_active, products
from tests.test_replacement_training_sparse import sparse

ROOT = Path(__file__).resolve().parents[1]
GPU = torch.cuda.is_available()
TRITON = version("triton") if importlib.util.find_spec("triton") else ""
needs_triton = pytest.mark.skipif(not TRITON, reason="needs Triton, which is there for Linux: pip install triton")
interprets = pytest.mark.skipif(
    TRITON != "" and Version(TRITON) < Version("3.7"), reason="before 3.7 Triton's interpreter fails with numpy 2.4"
)
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
NAMES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
"""Pointers to tensors of each type in Triton's words."""


@needs_triton
@interprets
def test_all_laws_hold_in_tritons_interpreter() -> None:
    """`interpreted_kernels.py`, in a process that interprets from its first import on."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "--noconftest", "tests/interpreted_kernels.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"^\d+ passed in", done.stdout, re.MULTILINE), done.stdout + done.stderr


class Launch:
    """Stands for a kernel, and keeps what it is launched with."""

    def __init__(self, kernel) -> None:
        self.kernel, self.given, self.sizes = kernel, (), {}

    def __getitem__(self, grid):
        def launch(*given, **sizes) -> None:
            self.given, self.sizes = given, sizes

        return launch

    def compiled(self, capability: int):
        """The kernel as a GPU of this capability would get it."""
        from triton import compile
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        options = {"enable_fp_fusion": self.sizes.pop("enable_fp_fusion")}
        names = dict(zip(self.kernel.arg_names, self.given, strict=False))
        signature = {name: "i32" if isinstance(value, int) else NAMES[value.dtype] for name, value in names.items()}
        signature |= dict.fromkeys(self.sizes, "constexpr")
        assert list(signature) == self.kernel.arg_names
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=self.sizes)
        return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dtype", "d"), [(torch.float32, 256), (torch.bfloat16, 256), (torch.float64, 5)], ids=str)
def test_the_kernels_compile_for_gpus(dtype, d: int, capability: int, tmp_path: Path, monkeypatch) -> None:
    """As they are launched, to machine code, with no atomics; and all sums stay in registers."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from replacement.training.sparse import kernels

    launches = []
    for name in ("sum_pieces", "sum_segments", "dot_rows"):
        launches.append(Launch(getattr(kernels, name)))
        monkeypatch.setattr(kernels, name, launches[-1])
    table, index = torch.ones(3, d, dtype=dtype), torch.zeros(kernels.PIECE, dtype=torch.long)
    kernels.sums(table, index, torch.ones(kernels.PIECE, dtype=dtype), torch.tensor([0]))
    kernels.dots(table, table, index, index)
    for launch in launches:
        parts = launch.compiled(capability).asm
        assert f".target sm_{capability}" in parts["ptx"] and len(parts["cubin"]) > 1000
        assert not re.search(r"\b(atom|red)\.|\.local", parts["ptx"])


def test_a_cpu_needs_no_triton() -> None:
    """What it runs on is untouched, whether Triton is there or not."""
    assert products.kernels_on("cpu") is None


@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_the_benchmark_says_that_it_needs_a_gpu() -> None:
    done = subprocess.run([sys.executable, "benchmarks/kernels.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines() == ["benchmarks/kernels.py: needs a GPU, and torch.cuda.is_available() is False"]


@needs_gpu
@needs_triton
def test_the_benchmark_runs() -> None:
    command = [sys.executable, "benchmarks/kernels.py", "--features", "256", "--batch", "64", "--k", "4", "--d", "48"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "256 features" in done.stdout and "decode" in done.stdout


def crowd(n_tokens: int, n_features: int, k: int, *, popular: bool) -> ActiveSet:
    """An active set at random; one popular feature fires at every token."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(n_tokens, n_features, generator=generator)
    scores[:, 3] += float(popular)
    feature = scores.topk(k).indices.sort().values
    return ActiveSet(torch.arange(n_tokens).repeat_interleave(k), feature.flatten(), n_tokens, n_features)


def on(device: str, active: ActiveSet) -> ActiveSet:
    return ActiveSet(active.token.to(device), active.feature.to(device), active.n_tokens, active.n_features)


def path(device: str, dtype: torch.dtype, active: ActiveSet, prefixes: tuple[int, ...], d: int) -> list[torch.Tensor]:
    """Output and all gradients of encoding and decoding on one device."""
    generator = torch.Generator().manual_seed(1)
    shapes = (active.n_tokens, d), (active.n_features, d), (active.n_features,), (active.n_features, d + 3)
    leaves = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    out = sparse(*leaves, on(device, active), prefixes)
    out.backward(torch.randn(out.shape, generator=generator).to(device, dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@needs_gpu
@pytest.mark.parametrize("with_triton", [pytest.param(True, marks=needs_triton), False])
@pytest.mark.parametrize("prefixes", [(), (64, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("popular", [True, False])
def test_a_gpu_gives_the_cpus_outputs_and_gradients(popular, dtype, prefixes, with_triton, monkeypatch) -> None:
    """On the kernels, and on torch's own functions where there is no Triton."""
    if not with_triton:
        monkeypatch.setattr(products, "kernels_on", lambda device: None)
    active = crowd(1500, 1024, 12, popular=popular)
    near = 1e-4 if dtype == torch.float32 else 1e-11
    for found, expected in zip(
        path("cuda", dtype, active, prefixes, 130), path("cpu", dtype, active, prefixes, 130), strict=True
    ):
        torch.testing.assert_close(found.cpu(), expected, rtol=near, atol=near * float(expected.abs().max()))


@needs_gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_gpu_sums_short_floats_in_float32(dtype) -> None:
    """Results in 16 bits are the float32 ones, rounded once."""
    active = on("cuda", crowd(1500, 1024, 12, popular=True))
    order, token, starts = active.by_feature
    table, weight = (torch.randn(shape, device="cuda").to(dtype) for shape in ((1500, 130), (len(order),)))
    short = products.sums(table, token, weight, starts)
    torch.testing.assert_close(short, products.sums(table.float(), token, weight.float(), starts).to(dtype))
    short = products.dots(table, table, active.token, active.feature)
    torch.testing.assert_close(
        short, products.dots(table.float(), table.float(), active.token, active.feature).to(dtype)
    )


@needs_gpu
@needs_triton
@pytest.mark.parametrize("prefixes", [(), (64, 300)])
def test_two_runs_on_a_gpu_give_the_same_bits(prefixes) -> None:
    """Outputs and gradients, biases included: nothing is added in an order that chance decides."""
    active = crowd(4096, 4096, 32, popular=True)
    first, *others = (path("cuda", torch.float32, active, prefixes, 256) for _ in range(5))
    for other in others:
        assert all(torch.equal(*pair) for pair in zip(first, other, strict=True))


@needs_gpu
@needs_triton
def test_nothing_fires_on_a_gpu() -> None:
    none = torch.empty(0, dtype=torch.long, device="cuda")
    leaves = [torch.randn(s, device="cuda", requires_grad=True) for s in ((6, 4), (64, 4), (64,), (64, 3))]
    active = ActiveSet(none, none, 6, 64)
    out = decode_active(encode_active(*leaves[:3], active), leaves[3], active, (8,))
    out.sum().backward()
    assert not out.any() and not any(leaf.grad.any() for leaf in leaves)
