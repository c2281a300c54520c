"""A second device made of this one: tensors that say they are on a GPU, and are computed on the CPU.

It refuses what a GPU refuses: operations between tensors of two devices (numbers, and indices into what is on the GPU,
may come from the CPU), and a CPU's generator for a tensor elsewhere. So code that forgets where a tensor belongs fails
here too, where there is no GPU. `python -m tests.elsewhere OUT [DEVICE]` trains every case of `tests.processes` there
(or on a real device), in a process of its own, since torch lets a device be added once and for good.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from replacement.loading import load_bridge
from replacement.training import EndToEndConfig, TrainingConfig
from replacement.training.run import run
from tests.processes import cases_of, run_case, write_figures

NAME = "pretended"
ATLAS, RESUMED = "atlas", "resumed"
COPIES = ("_to_copy", "copy_")
TAKE_INDICES = ("index", "index_put", "index_put_", "_index_put_impl_")


class Elsewhere(Tensor):
    """A tensor that says it is on the pretended device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        out = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        out.held = held
        return out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.held.tolist()  # torch refuses it for subclasses


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """One operation: devices are checked, and it is done on the CPU."""
    name = func._schema.name.partition("::")[2]
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    away = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    asked = kwargs.get("device")
    result_is_away = bool(away) if asked is None else torch.device(asked).type == NAME
    if away and name not in COPIES:
        _require_one_device(name, args, tensors)
    if kwargs.get("generator") is not None and result_is_away:
        raise RuntimeError(f"{name}: a CPU's generator for a tensor on {NAME}")
    if asked is not None and result_is_away:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner = tree_map(lambda x: x.held if isinstance(x, Elsewhere) else x, (args, kwargs))
    out = func(*inner[0], **inner[1])
    if func._schema.is_mutable and isinstance(out, Tensor):
        return kwargs.get("out", args[0])
    return tree_map(lambda x: Elsewhere(x) if type(x) is Tensor else x, out) if result_is_away else out


def _require_one_device(name: str, args: tuple, tensors: list[Tensor]) -> None:
    here = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.ndim]
    if name in TAKE_INDICES and isinstance(args[0], Elsewhere):
        here = [tensor for tensor in here if tensor.dtype.is_floating_point]
    if here:
        raise RuntimeError(f"{name}: tensors on {NAME} and the CPU ({', '.join(str(list(t.shape)) for t in here)})")


@contextlib.contextmanager
def pretended() -> Any:
    """Add the device to torch, for the rest of the process; tensors can be made there while the context lasts."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("aten", "IMPL")  # what `torch.tensor` calls behind the mode's back
    for op in (torch.ops.aten.empty_strided.default, torch.ops.aten.copy_.default):
        library.impl(op, lambda *args, op=op, **kwargs: _run(op, args, kwargs), "PrivateUse1")
    with _Mode():
        yield torch.device(NAME, 0)


def run_atlas(folder: Path, device: torch.device | str) -> None:
    """A short whole run with a language model that is on the device too; leaves the last figures of both stages."""
    bridge, _ = load_bridge("atlas", torch.float32, "cpu")
    config = TrainingConfig(kind="clt", n_features=64, k=4, tokens=512 * 4, batch_tokens=512, buffer_bytes=2_000_000)
    finished = run(
        bridge.to(device),
        model="atlas",
        data="atlas",
        config=config,
        out=folder / ATLAS,
        end_to_end=EndToEndConfig(steps=2, documents=4, bridging_weight=1.0),
        context=32,
        show_progress=False,
    )
    assert finished.reconstruction is not None and finished.end_to_end is not None
    write_figures([finished.reconstruction, finished.end_to_end], folder / ATLAS)


def main() -> None:
    """Train every case on a device, in the folder that is given; one of them also with a break."""
    out, device = Path(sys.argv[1]), (sys.argv[2:] or [NAME])[0]
    torch.set_num_threads(1)
    with pretended() if device == NAME else contextlib.nullcontext(torch.device(device)) as where:
        for case in cases_of(1):
            run_case(case, out, device=where)
        for stop in (6, None):
            run_case(cases_of(1)[0]._replace(stop_after=stop), out / RESUMED, device=where)
        run_atlas(out, where)


if __name__ == "__main__":
    main()
