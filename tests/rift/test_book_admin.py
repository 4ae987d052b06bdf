"""Operators create, list and revoke keys of a running installation, and a key has only its own rights."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from rift.cli.keys import expiry_ns
from rift.cli.output import CommandFailed
from rift.cli.parser import main
from rift.gateway.admission.queue_share import QUEUE_SHARE_PERCENT
from tests.rift.test_limits import BODY, MODEL, done, second_gateway
from tests.service import Service, frames

DAY_NS = 86_400 * 10**9
# 2026-11-23, 12:00 UTC.
NOON_NS = 1_795_435_200 * 10**9


@pytest.mark.parametrize(
    ("text", "at_ns"),
    [
        ("30d", NOON_NS + 30 * DAY_NS),
        ("12h", NOON_NS + DAY_NS // 2),
        ("2026-11-24", NOON_NS + DAY_NS // 2),
    ],
)
def test_expiry_times(text: str, at_ns: int) -> None:
    assert expiry_ns(text, NOON_NS) == at_ns


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0d", "must be a time in the future"),
        ("99999d", "at most 100 years"),
        ("9999-12-31", "at most 100 years"),
        ("2026-11-23", "has already started"),
        ("2026-02-30", "must be like 30d, 12h, or a date"),
        ("30", "must be like 30d, 12h, or a date"),
        ("-1d", "must be like 30d, 12h, or a date"),
    ],
)
def test_an_invalid_expiry_is_refused(text: str, said: str) -> None:
    with pytest.raises(CommandFailed, match=said):
        expiry_ns(text, NOON_NS)


def test_the_help_shows_the_default_queue_share(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["limits", "set", "--help"])
    assert f"of a model's queue, or none (default: {QUEUE_SHARE_PERCENT})" in " ".join(
        capsys.readouterr().out.split()
    )


def made(service: Service, *words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done(service, "keys", "create", *words, "--json"))
    return found


def listed(service: Service, *words: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(done(service, "keys", "list", *words, "--json"))
    return found


@pytest.mark.slow
def test_keys_are_created_listed_and_revoked(service: Service) -> None:
    wide = made(service, "--account", "keyed")
    narrow = made(
        service,
        "--account",
        "keyed",
        "--scopes",
        "usage",
        "--models",
        f"{MODEL},wide:sim",
        "--expires",
        "30d",
    )
    done(service, "keys", "revoke", wide["id"])
    first, second = listed(service, "--account", "keyed")
    assert (first["id"], first["state"], first["scopes"]) == (wide["id"], "revoked", ["inference", "usage"])
    assert first["created"] <= first["revoked"]
    assert second | {"created": 0, "expires": 0} == {
        "id": narrow["id"], "account": "keyed", "state": "valid", "scopes": ["usage"],
        "models": [MODEL, "wide:sim"], "expires": 0, "created": 0, "revoked": None,
    }  # fmt: skip
    assert second["expires"] - second["created"] == pytest.approx(30 * DAY_NS, abs=60 * 10**9)
    text = done(service, "keys", "list")
    assert text.split()[:8] == [
        "id", "account", "state", "scopes", "models", "expires", "created", "revoked"
    ]  # fmt: skip
    assert narrow["key"] not in text
    (row,) = service.sql(f"select state, scopes, models from keys where key = '{wide['id']}'")
    assert row == {"state": "revoked", "scopes": ["inference", "usage"], "models": None}
    with service.client(narrow["key"]) as client:
        assert client.get("/v1/usage").status_code == 200
        refused = client.post("/v1/inference", json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")


ERRORS: dict[str, tuple[str, ...]] = {
    "there is no account 'typo'": ("list", "--account", "typo"),
    "there is no key 'nosuchid'; `rift keys list` shows": ("revoke", "nosuchid"),
    "unknown scope 'all'; choose from inference": ("create", "--account", "dev", "--scopes", "all"),
    "--scopes: an item of '' is empty": ("create", "--account", "dev", "--scopes", ""),
    "unknown model 'gpt'; known models: smollm2": ("create", "--account", "dev", "--models", "gpt"),
    "2027-01-31 (its start, UTC), got 'soon'": ("create", "--account", "dev", "--expires", "soon"),
}


@pytest.mark.slow
def test_errors_name_the_invalid_argument(service: Service) -> None:
    before = listed(service)
    with ThreadPoolExecutor(2) as pool:
        ran = list(pool.map(lambda words: service.rift("keys", *words), ERRORS.values()))
    for said, one in zip(ERRORS, ran, strict=True):
        assert (one.returncode, said in one.stderr) == (1, True), (said, one.stderr)
        assert "Traceback" not in one.stderr
    assert listed(service) == before


@pytest.mark.slow
def test_revoking_a_whole_key_does_not_print_its_secret(service: Service) -> None:
    key = made(service, "--account", "leaked")
    for _ in range(2):
        ran = service.rift("keys", "revoke", key["key"])
        assert f"key {key['id']}" in ran.stderr
        assert key["key"] not in ran.stderr
    assert ran.returncode == 1, "the key is already revoked"


@pytest.mark.slow
def test_a_key_can_be_revoked_once(service: Service) -> None:
    key = made(service, "--account", "once")
    done(service, "keys", "revoke", key["id"])
    ran = service.rift("keys", "revoke", key["id"])
    assert (ran.returncode, f"key {key['id']} of account once is already revoked" in ran.stderr) == (1, True)


@pytest.mark.slow
def test_every_gateway_refuses_a_revoked_key_and_ends_its_stream(service: Service) -> None:
    key = made(service, "--account", "leaver")
    body = BODY | {"stream": True, "parameters": {"max_tokens": 2000, "ignore_eos": True}}
    with second_gateway(service) as url, service.client(key["key"]) as client:
        with client.stream("POST", f"{url}/v1/inference", json=body) as answer:
            events = frames(answer)
            while next(events)["event"] != "token":
                pass
            done(service, "keys", "revoke", key["id"])
            last = list(events)[-1]
        assert last["data"]["error"]["code"] == "revoked"
        for at in (service.url, url):
            refused = client.get(f"{at}/v1/models")
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "revoked_api_key")
    (row,) = service.sql(
        "select state, finish_reason, charge_nanousd > 0 as charged from requests where account = 'leaver'"
    )
    assert row == {"state": "cancelled", "finish_reason": "revoked", "charged": True}


@pytest.mark.slow
def test_usage_and_invoices_belong_to_the_keys_account(service: Service) -> None:
    mine, other = (made(service, "--account", account)["key"] for account in ("billed", "unbilled"))
    with service.client(mine) as client:
        assert client.post("/v1/inference", json=BODY).status_code == 200
        assert MODEL in client.get("/v1/usage").text
    with service.client(other) as client:
        assert client.get("/v1/usage", params={"account": "billed"}).status_code == 400
        assert MODEL not in client.get("/v1/usage").text
        assert MODEL not in client.get("/v1/invoices/2026-11?account=billed").text
