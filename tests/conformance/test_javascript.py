"""The official JavaScript SDK, unmodified, against Rift. The checks are in sdk.mjs."""

import pytest

from tests.conformance import node
from tests.scripted import MODEL, Served

pytestmark = pytest.mark.slow


def test_the_javascript_sdk(served: Served) -> None:
    said = node.run("sdk.mjs", served.url, served.key, MODEL)
    assert said.splitlines()[-1] == "a response in the background"
    assert "disconnect" in {cancel.why for cancel in served.cancelled}, "who aborts cancels"
