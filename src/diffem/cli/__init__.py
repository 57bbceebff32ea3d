"""The command line. `parser` holds the arguments of all commands; the module of a command's name runs it, and is only
imported for that: `diffem --help` and `diffem status` answer at once."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from diffem.cli.console import complain
from diffem.cli.parser import parser, separate
from diffem.errors import DiffemError, Stopped, ToldElsewhere

MODULES = {"import": "imports"}  # of commands that cannot be the name of a module


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. The exit status is 0; 1 if a check finds a problem; 2 after a :class:`DiffemError` or an error of
    the file system, which is printed on one line; 143 after SIGTERM and 130 after Ctrl-C."""
    try:
        words, settings = separate(sys.argv[1:] if argv is None else argv)
        commands = parser()
        arguments, rest = commands.parse_known_args(words)
        arguments.rest = rest = [*rest, *settings]
        if arguments.command is None:
            if rest:
                raise DiffemError(f"diffem: {rest[0]}: give a command first; diffem --help lists them")
            commands.print_help()
            return 0
        if arguments.command != "status":  # it answers at once, as --help does
            import diffem.rivals  # noqa: F401 - registers their samplers

        if rest and arguments.command not in ("train", "import", "check", "corrupt"):
            raise DiffemError(f"diffem {arguments.command}: unknown argument {rest[0]}")
        status = import_module(f"{__name__}.{MODULES.get(arguments.command, arguments.command)}").run(arguments)
    except ToldElsewhere:
        return 2
    except DiffemError as error:
        complain(str(error))
        return 2
    except OSError as error:
        complain(f"{error.filename}: {error.strerror or error}" if error.filename else str(error))
        return 2
    except Stopped as stopped:
        print("diffem: stopped, and saved; run the same command to go on", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print("diffem: stopped; run the same command to go on", file=sys.stderr)
        return 128 + signal.SIGINT
    return status or 0
