"""Command line: ``python -m fusedrnn`` with ``charlm``, ``unmask`` or ``info``."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from . import charlm, info, unmask


class Parser(argparse.ArgumentParser):
    """An argument parser that reports errors in one sentence, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def whole(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """Return an argument type: a whole number from ``low`` to ``high``, both included."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, not {value}")
        if value > high:
            raise argparse.ArgumentTypeError(f"must be at most {high}, not {value}")
        return value

    return parse


def positive(text: str) -> float:
    """Parse an argument that must be a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, not {text}")
    return value


def parser() -> Parser:
    """Build the parser for the whole command line."""
    top = Parser(
        prog="python -m fusedrnn",
        description="fusedrnn: a fused drop-in replacement for torch.nn.RNN.",
    )
    commands = top.add_subparsers(dest="command", title="commands", metavar="COMMAND")

    summary = "train a character model with fusedrnn and without, side by side"
    demo = commands.add_parser(
        "charlm",
        help=summary,
        description="Train a character model with fusedrnn and without: first the model of the "
        "blog post that this project began with, against its Python loop; then its sequence form, "
        "against a Python loop and torch.nn.RNN. All start from the same weights and see the same "
        "batches.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    text = demo.add_argument_group("text")
    model = demo.add_argument_group("model")
    training = demo.add_argument_group("training")
    output = demo.add_argument_group("output")
    machine = demo.add_argument_group("machine")
    # fmt: off
    text.add_argument("--text", metavar="FILE", default=argparse.SUPPRESS,
        help="a UTF-8 text file (default: the Python language reference, which CPython includes)")
    text.add_argument("--chars", metavar="N", type=whole(1),
        help="use at most the first N characters")
    model.add_argument("--hidden", metavar="N", type=whole(1), help="hidden units")
    model.add_argument("--embedding", metavar="N", type=whole(1),
        help="size of a character's embedding")
    model.add_argument("--dtype", choices=["float32", "float64"],
        help="float64 shows that the losses differ only by rounding")
    training.add_argument("--epochs", metavar="N", type=whole(1), help="passes over the text")
    training.add_argument("--lr", metavar="X", type=positive, help="Adam's learning rate")
    training.add_argument("--context", metavar="N", type=whole(1),
        help="part 1: characters that predict the next one")
    training.add_argument("--batch", metavar="N", type=whole(1), help="part 1: windows in a batch")
    training.add_argument("--chunk", metavar="N", type=whole(1),
        help="part 2: characters between two updates; gradients end there, the state does not")
    training.add_argument("--streams", metavar="N", type=whole(1),
        help="part 2: parts of the text that are read in parallel")
    training.add_argument("--seed", metavar="N", type=whole(0),
        help="seed of the weights, the order of the batches, and the samples")
    output.add_argument("--sample", metavar="N", type=whole(0),
        help="characters to generate after training")
    output.add_argument("--temperature", metavar="X", type=positive,
        help="of the samples: 1 is the model's distribution, less favours likely characters")
    machine.add_argument("--threads", metavar="N", type=whole(1, 1024), default=argparse.SUPPRESS,
        help="threads to compute with (default: torch's)")
    # fmt: on
    demo.set_defaults(**{k: v for k, v in vars(charlm.Settings()).items() if v is not None})

    show = commands.add_parser(
        "unmask",
        help="write an HTML page that shows an RNN at work, step by step",
        description="Train a small character model, the one of the blog post that this project "
        "began with, and write an HTML page that runs it in the browser: every value of the "
        "forward pass, and the gradient of a prediction through time. The page needs no other "
        "file. Training takes about a quarter of a minute.",
    )
    # fmt: off
    show.add_argument("--text", metavar="FILE", default=argparse.SUPPRESS,
        help="a UTF-8 text file (default: the Python language reference, which CPython carries); "
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
    cli = parser()
    options = vars(cli.parse_args(arguments))
    command = options.pop("command")
    try:
        if command == "charlm":
            charlm.demonstrate(charlm.Settings(**options))
        elif command == "unmask":
            unmask.write_page(unmask.Settings(**options))
        elif command == "info":
            return info.main()
        else:
            cli.print_help()
    except charlm.CharlmError as error:
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
