"""The processes: gateway, worker, control, and the command line that starts them."""

__version__ = "0.1.0"
