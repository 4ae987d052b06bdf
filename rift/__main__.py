"""`python -m rift` and the command `rift` begin here."""

import os
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
    _open_standard_streams()
    from rift.cli import parser

    return parser.main(arguments)


def _open_standard_streams() -> None:
    """Open the standard streams that are closed. A socket would get their numbers, and uvloop aborts there.

    To write to such an output fails, and such errors are lost.
    """
    for number, access in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            # It gets the lowest number that is free.
            os.set_inheritable(os.open(os.devnull, access), True)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


if __name__ == "__main__":
    sys.exit(main())
