"""The root of every error that `rift` raises for a caller to handle."""


class RiftError(Exception):
    """A process or a command cannot continue; the message is one sentence for the operator.

    `exit_status` is what the command line exits with.
    """

    exit_status = 1
