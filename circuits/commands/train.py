"""`circuits train`: dictionaries of any kind for a model, in a folder for `circuits trace` and `circuits eval`."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from circuits.commands.options import add, print_json
from circuits.defaults import default
from circuits.settings import Field, fields

if TYPE_CHECKING:
    from replacement.training.run import Finished

LOAD = "replacement.model:ReplacementModel.load"
RUN = "replacement.training.run:run"
PROCESSES = "replacement.training.parallel:processes"
SETTINGS, LAST = (f"replacement.training.config:{name}" for name in ("TrainingConfig", "EndToEndConfig"))
FLAGS = {"n_features": "--features"}
"""Fields whose flag is not their own name."""
FOR_TORCHRUN = {"start": "--start-at", "log": "--log-to"}
"""Second spellings of flags that begin one of torchrun's own, which torchrun refuses even after the program's name."""
LAST_FLAGS = {"bridging_weight": "--bridging-weight"}
"""The same of the last stage, whose other flags begin with `--end-to-end-`."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Name the command's arguments: every field of `TrainingConfig` is a flag."""
    model = parser.add_argument_group("model and data")
    add(model, LOAD, "--model", "a shipped model, a Hugging Face directory, or a hub id")
    model.add_argument(
        "--data",
        required=True,
        help="'atlas' (its own generator), a UTF-8 text file, a .jsonl file, or hf:owner/name[:config][:split]",
    )
    add(model, RUN, "--text-field", "of JSON objects", metavar="NAME")
    add(model, RUN, "--context", "tokens of a row, at most the model's", type=int, metavar="N")
    add(model, RUN, "--documents", "rows of one forward pass", type=int, metavar="N")
    text = "folder that keeps activations: what it lacks is written, what it has is read and the model not run for it"
    add(model, RUN, "--cache", text, type=Path, metavar="DIR")
    text = "how a cache keeps them: bfloat16, float32, int8_token or int8_channel"
    add(model, RUN, "--cache-dtype", text, metavar="NAME")
    add(model, LOAD, "--dtype", "float32, float64, bfloat16 or float16")
    add(model, LOAD, "--device", "a torch device such as cpu or cuda")
    what = parser.add_argument_group("dictionaries and training")
    for field in fields(SETTINGS):
        what.add_argument(
            _flag(field),
            *([FOR_TORCHRUN[field.name]] if field.name in FOR_TORCHRUN else []),
            dest=field.name,
            type=_reader(field),
            default=field.default,
            metavar=_metavar(field),
            help=f"{_told(field)} (default: {_shown(field.default)})",
        )
    _configure_last(parser.add_argument_group("last stage, end to end"))
    many = parser.add_argument_group("many processes: torchrun --nproc-per-node N -m circuits train ...")
    text = "processes that share the features of each dictionary; the rest share the tokens of each batch"
    add(many, PROCESSES, "--feature-shards", text, type=int, metavar="M")
    out = parser.add_argument_group("output")
    out.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="folder; a stopped run goes on there"
    )
    text = "steps after which the run is kept; Ctrl-C keeps the last one"
    add(out, RUN, "--checkpoint-every", text, type=int, metavar="STEPS")
    out.add_argument(
        "--log",
        FOR_TORCHRUN["log"],
        dest="log",
        action="append",
        default=[],
        metavar="NAME",
        help="also log to tensorboard, wandb or trackio; repeatable",
    )


def _configure_last(last: argparse._ActionsContainer) -> None:
    """Every field of `EndToEndConfig` is a flag, its steps `--end-to-end`."""
    last.add_argument(
        "--end-to-end",
        type=int,
        default=0,
        metavar="STEPS",
        help="then train the replaced model's predictions towards the original's for so many steps (default: none)",
    )
    for field in fields(LAST):
        if field.name != "steps":
            last.add_argument(
                _last_flag(field),
                dest=_last_name(field),
                type=_reader(field),
                default=field.default,
                metavar=_metavar(field),
                help=f"{_told(field)} (default: {_shown(field.default)})",
            )


def run(arguments: argparse.Namespace) -> None:
    """Train, and say what came of it."""
    started = perf_counter()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in `trace`
    from replacement.training.config import EndToEndConfig, TrainingConfig

    config = TrainingConfig.from_mapping({field.name: getattr(arguments, field.name) for field in fields(SETTINGS)})
    last = EndToEndConfig.from_mapping({"steps": arguments.end_to_end, **_of_last_stage(arguments)})
    from replacement.loading import load_bridge
    from replacement.model import DTYPES
    from replacement.training import run as training
    from replacement.training.parallel import local_device, processes

    if arguments.dtype not in DTYPES:
        from replacement.errors import InputError

        raise InputError(f"--dtype {arguments.dtype!r}: needs one of {', '.join(DTYPES)}")
    with processes(feature_shards=arguments.feature_shards) as mesh, _kept(arguments.output):
        bridge, _ = load_bridge(arguments.model, DTYPES[arguments.dtype], local_device(arguments.device))
        finished = training.run(
            bridge,
            model=arguments.model,
            data=arguments.data,
            config=config,
            out=arguments.output,
            end_to_end=last if arguments.end_to_end else None,
            context=arguments.context,
            documents=arguments.documents,
            text_field=arguments.text_field,
            cache=arguments.cache,
            cache_dtype=arguments.cache_dtype,
            dashboards=arguments.log,
            checkpoint_every=arguments.checkpoint_every,
            show_progress=not arguments.json,
            mesh=mesh,
        )
    if mesh.is_first:
        _report(finished, arguments, perf_counter() - started)


@contextmanager
def _kept(out: Path) -> Iterator[None]:
    """Say what Ctrl-C leaves."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if not (out / "training.json").exists():
            raise
        from replacement.training.folder import has_kept

        if not has_kept(out):
            raise KeyboardInterrupt(f"no step is kept in {out} yet; the same command begins anew") from stop
        kept = str(stop) or "what was kept before is still there"
        raise KeyboardInterrupt(f"{kept}, in {out}; the same command goes on") from stop


def _report(finished: Finished, arguments: argparse.Namespace, seconds: float) -> None:
    from replacement.sites import WRITES

    last, cache = finished.end_to_end or finished.reconstruction, finished.cache
    if arguments.json:
        figures = None if last is None else last._asdict()
        kept = {} if cache is None else {"tokens": cache.tokens, "dtype": cache.dtype, "fvu": cache.fvu}
        print_json({"folder": str(finished.folder), "last": figures, "cache": kept, "seconds": round(seconds, 3)})
        return
    if cache is not None:
        lost = max(cache.fvu.values())
        print(
            f"cache       {cache.tokens:,} tokens in {arguments.cache} as {cache.dtype}, FVU lost by that <= {lost:.1e}"
        )
    if last is not None:
        print(f"last step   FVU {last.fvu:.4f}   L0 {last.l0:.1f}   dead {last.dead:.1%}")
    print(f"wrote {finished.folder} in {seconds:.0f} s")
    found = ["--model", arguments.model, "--dictionaries", str(finished.folder)]
    print(f"next  {shlex.join(['circuits', 'eval', *found, *_text(arguments)])}")
    if set(finished.written) <= set(WRITES):
        print(f'      circuits trace "..." {shlex.join(found)}')


def _text(arguments: argparse.Namespace) -> list[str]:
    """The flags that name a run's text, for another command that is to read it in the same way."""
    flags = ["--data", arguments.data]
    for flag, given in (("--text-field", arguments.text_field), ("--context", arguments.context)):
        if given != default(RUN, flag[2:].replace("-", "_")):
            flags += [flag, str(given)]
    return flags


def _flag(field: Field) -> str:
    return FLAGS.get(field.name, f"--{field.name.replace('_', '-')}")


def _last_flag(field: Field) -> str:
    return LAST_FLAGS.get(field.name, f"--end-to-end-{field.name.replace('_', '-')}")


def _last_name(field: Field) -> str:
    return f"end_to_end_{field.name}"


def _of_last_stage(arguments: argparse.Namespace) -> dict[str, Any]:
    """The last stage's settings but for its steps; raises `InputError` where some are given and it is not asked for."""
    from replacement.errors import InputError

    given = {}
    for field in fields(LAST):
        if field.name == "steps":
            continue
        given[field.name] = value = getattr(arguments, _last_name(field))
        if not arguments.end_to_end and value != field.default:
            raise InputError(f"{_last_flag(field)} {_shown(value)}: is of the last stage; add --end-to-end STEPS")
    return given


def _told(field: Field) -> str:
    return field.text.rstrip(".").replace("%", "%%")


def _metavar(field: Field) -> str:
    return {"str": "NAME", "float": "X"}.get(field.type, "N,N,..." if "tuple" in field.type else "N")


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def _reader(field: Field) -> Callable[[str], Any]:
    """What turns a flag's text into the field's value."""
    if "tuple" not in field.type:
        return {"str": str, "int": int, "float": float}[field.type.removesuffix(" | None")]
    number = float if "float" in field.type else int

    def numbers(text: str) -> Any:
        found = tuple(number(part) for part in text.split(",") if part.strip())
        return found[0] if field.type.startswith("int |") and len(found) == 1 else found

    return numbers
