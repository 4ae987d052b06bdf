"""A client of a model without replicas waits, leaves, comes back or is refused."""

import json
from typing import Any

import anyio
import httpx
import pytest

from tests.rift.fleet.conftest import Rig, of

pytestmark = [pytest.mark.slow, pytest.mark.anyio]


@of("left")
async def test_a_client_that_leaves_while_waiting_is_not_charged(rig: Rig) -> None:
    """By DELETE, by closing a route that cannot resume, and by not coming back."""
    first = await _statuses(rig, "POST", "/v1/inference", json=rig.body(5, stream=True))
    request = first["id"]
    assert (first["frame"], first["status"]) == ("1", "starting")
    again = await _statuses(rig, "GET", f"/v1/inference/{request}/events?after=1")
    assert (again["id"], again["frame"], again["status"]) == (request, "1", "starting")
    assert (await rig.http.delete(f"/v1/inference/{request}")).status_code == 202
    await anyio.sleep(1)
    shown = (await rig.http.get(f"/v1/inference/{request}")).json()
    assert (shown["status"], shown["charge"]["nanousd"]) == ("cancelled", 0)
    with pytest.raises(httpx.ReadTimeout):
        await rig.http.post("/v1/completions", json={"model": rig.model, "prompt": "x"}, timeout=1)
    # The gateway notices within two checks of its connections, and a worker may start faster.
    newest = ("", "")
    with anyio.fail_after(10):
        while newest != ("completion", "cancelled"):
            (row,) = (await rig.http.get("/v1/inference?limit=1")).json()["data"]
            newest = row["kind"], row["status"]
    await rig.decide(1)
    await rig.ready(1)
    await anyio.sleep(1)
    assert (await rig.frames(3))[-1][1]["attempts"] == 1
    rows = await rig.sql(f"select state, charge_nanousd, attempts from requests where model = '{rig.model}'")
    states = sorted((row["state"], row["attempts"]) for row in rows)
    assert states == [("cancelled", 0), ("cancelled", 0), ("finished", 1)]
    assert {row["charge_nanousd"] for row in rows if row["state"] == "cancelled"} == {0}
    await rig.decide(0)


async def _statuses(rig: Rig, method: str, url: str, **more: Any) -> dict[str, Any]:
    """Return the first status of a stream with its frame's id, and leave."""
    frame = ""
    async with rig.http.stream(method, url, **more) as response:
        async for line in response.aiter_lines():
            if line.startswith("id: "):
                frame = line.removeprefix("id: ")
            if line.startswith("data: "):
                return {"frame": frame, **json.loads(line.removeprefix("data: "))}
    raise AssertionError("the stream ended without a status")


@of("left")
async def test_a_model_that_is_not_served_is_refused(rig: Rig) -> None:
    refused = await rig.http.post("/v1/inference", json=rig.body(5) | {"model": "deepseek-v3"})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "model_unavailable"
    assert "[scale.'deepseek-v3']" in refused.json()["error"]["message"]
    listed = [entry["id"] for entry in (await rig.http.get("/v1/models")).json()["data"]]
    assert listed[0] == "cold"
    assert "left" in listed
    assert "deepseek-v3" not in listed
