"""The command `circuits`: which commands there are, and how a user's mistake is said.

One file a command stands in `circuits.commands`; this one only picks it, and turns mistakes into one line on standard
error and exit code 2. Nothing heavy is imported before a command runs, so that `circuits --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from circuits import __version__
from graphs.errors import InputError as GraphInputError
from replacement.errors import InputError as ModelInputError

COMMANDS = {
    "trace": "trace a prompt: from its tokens through features to the model's answer",
    "show": "summarise a stored graph in words",
    "prune": "keep what matters of a stored graph",
    "export": "write a stored graph in other formats",
    "heads": "split a stored graph's edges by the attention head that carried them",
    "train": "train dictionaries of any kind for a model",
    "eval": "measure how good dictionaries are",
    "diff-models": "compare a model with a fine-tuned one, feature by feature",
    "models": "list the models that ship with the package",
}
"""Command -> one line of help; each is a module `circuits.commands.NAME` (underscores for hyphens) with
`configure(parser)`, `run(arguments)`."""

INTERRUPTED = 130  # what a shell reports for Ctrl-C

EPILOG = """\
start here:
  circuits trace "the capital of the state containing Dallas is"
  circuits trace --help
"""


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line, as every other mistake is said."""

    def error(self, message: str) -> NoReturn:
        raise ModelInputError(f"{message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    top = _Parser(
        prog="circuits",
        description="Trace how a language model gets from a prompt to its answer.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="store_true", help="print the version")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=_Parser)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        _module(name).configure(command)
        command.add_argument("--json", action="store_true", help="print one JSON object instead of a report")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 where a part failed, 2 for a user's mistake, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows "?", and that is all
    code = 0
    try:
        top = parser()
        arguments, unknown = top.parse_known_args(argv)
        if unknown:
            asked = " ".join(filter(None, [top.prog, arguments.command]))
            raise ModelInputError(f"unrecognized arguments: {' '.join(unknown)}; see {asked} --help")
        if arguments.version:
            print(f"circuits {__version__}")
        elif arguments.command is None:
            top.print_help()
        else:
            code = _module(arguments.command).run(arguments) or 0
        sys.stdout.flush()
    except (GraphInputError, ModelInputError) as mistake:
        return _refuse(str(mistake))
    except BrokenPipeError:  # `circuits show graph.json | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as problem:
        return _refuse(str(problem))
    except KeyboardInterrupt as stop:
        print(f"circuits: interrupted; {str(stop) or 'nothing was written'}", file=sys.stderr)
        return INTERRUPTED
    return code


def _module(command: str) -> ModuleType:
    return import_module(f"circuits.commands.{command.replace('-', '_')}")


def _refuse(message: str) -> int:
    line = " ".join(message.split())
    print(f"circuits: error: {''.join(c if c.isprintable() else '?' for c in line)}", file=sys.stderr)
    return 2
