"""The reason of an error in words."""

from socket import gaierror
from ssl import SSLError

import pytest

from events.errors import reason


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionRefusedError(111, "Connect call failed ('127.0.0.1', 4222)"), "Connection refused"),
        (FileNotFoundError(2, "No such file or directory", "/bin/nothing"), "No such file or directory"),
        (SSLError(1, "[SSL] certificate verify failed"), "[SSL] certificate verify failed"),
        (gaierror(-2, "Name or service not known"), "Name or service not known"),
        (OSError("All connection attempts failed"), "All connection attempts failed"),
        (TimeoutError(), "TimeoutError"),
        (ValueError("3 is too many"), "3 is too many"),
    ],
)
def test_a_reason_has_no_number_and_no_python(error: Exception, words: str) -> None:
    assert reason(error) == words
