"""Command line: ``python -m fusedrnn`` with ``charlm``, ``unmask`` or ``info``."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from . import info, unmask


class Parser(argparse.ArgumentParser):
    """An argument parser that reports errors in one sentence, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def run_charlm(words: Sequence[str]) -> None:
    """Run ``examples/charlm.py`` of a clone; an installed package does not have it."""
    path = Path(__file__).resolve().parents[1] / "examples" / "charlm.py"
    if not path.exists():
        raise unmask.UserError(
            "this example is not part of the installed package: run `python examples/charlm.py` in "
            "a clone of the repository"
        )
    sys.argv[:] = [str(path), *words]
    runpy.run_path(str(path), run_name="__main__")


def parser() -> Parser:
    """Build the parser for the whole command line."""
    top = Parser(
        prog="python -m fusedrnn",
        description="fusedrnn: a fused drop-in replacement for torch.nn.RNN.",
    )
    commands = top.add_subparsers(dest="command", title="commands", metavar="COMMAND")

    commands.add_parser(
        "charlm",
        add_help=False,  # main gives everything after the command to the example
        help="train a character model with fusedrnn and without, side by side (in a clone)",
    )

    show = commands.add_parser(
        "unmask",
        help="write an HTML page that shows an RNN at work, step by step",
        description="Train a small character model, the one of the blog post that this project "
        "began with, and write an HTML page that runs it in the browser: every value of the "
        "forward pass, and the gradient of a prediction through time. The page needs no other "
        "file. Training takes about 15 seconds.",
    )
    # fmt: off
    show.add_argument("--text", metavar="FILE", default=argparse.SUPPRESS,
        help="a UTF-8 text file (default: the Python language reference, which CPython includes); "
        f"the first {unmask.CHARS:,} characters are used")
    show.add_argument("--checkpoint", metavar="FILE", default=argparse.SUPPRESS,
        help="a model to load instead of training one; the page's examples are from --text")
    show.add_argument("--save", metavar="FILE", default=argparse.SUPPRESS,
        help="write the model to this checkpoint, too")
    show.add_argument("--out", metavar="FILE.html", default=unmask.Settings.out,
        help="the page (default: %(default)s)")
    # fmt: on

    commands.add_parser("info", help="print versions, instruction sets, and what was built")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    cli = parser()
    charlm = words[:1] == ["charlm"]
    options = vars(cli.parse_args(words[:1] if charlm else words))
    command = options.pop("command")
    try:
        if charlm:
            run_charlm(words[1:])
        elif command == "unmask":
            unmask.write_page(unmask.Settings(**options))
        elif command == "info":
            return info.main()
        else:
            cli.print_help()
    except unmask.UserError as error:
        print(f"python -m fusedrnn {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
