"""The base class of every error that `replay` raises for a caller to handle."""


class ReplayError(Exception):
    """A projection, an archive, a bill or a backtest could not be produced; the message gives the reason."""
