"""`python -m rift` and the command `rift` begin here."""

import signal
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, or the given arguments, and return the exit status.

    While its modules are imported, Ctrl-C ends the process at once: as an exception it would come out of any
    of their lines, even as another one.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from rift.cli import parser

    return parser.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
