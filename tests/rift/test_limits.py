"""Credit and limits of a running installation, with two gateways."""

import json
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import httpx
import pytest

from tests.service import Service, environment

pytestmark = pytest.mark.slow

MODEL = "smollm2:135m"
TOKENS = 8
BODY: dict[str, Any] = {"model": MODEL, "prompt": "Say something.", "parameters": {"max_tokens": TOKENS}}
# The simulated engine counts 4 prompt tokens at 10 and 8 output tokens at 20 nano-USD.
CHARGE = 4 * 10 + TOKENS * 20


def key_of(service: Service, account: str) -> str:
    made = service.rift("keys", "create", "--account", account, "--json")
    return str(json.loads(made.stdout)["key"])


def done(service: Service, *words: str) -> str:
    ran = service.rift(*words)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def standing(service: Service, account: str) -> dict[str, Any]:
    lines = json.loads(done(service, "credit", "list", "--json"))
    found: dict[str, Any] = next(line for line in lines if line["account"] == account)
    return found


def charged(service: Service, account: str) -> list[int]:
    rows = service.sql(
        f"select charge_nanousd from requests where account = '{account}' and finished_at_ns is not null"
    )
    return [row["charge_nanousd"] for row in rows if row["charge_nanousd"]]


def usd(nanousd: int) -> str:
    return f"0.{nanousd:09d}"


@contextmanager
def second_gateway(service: Service) -> Iterator[str]:
    """Run a second gateway, and yield its address."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "rift", "gateway", "--engine", "sim", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--data", str(service.folder)], env=environment(), stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                httpx.get(f"{url}/readyz")
                break
            except httpx.TransportError:
                time.sleep(0.1)
        yield url
    finally:
        process.kill()
        process.wait()


def settled(service: Service, account: str, within_s: float) -> dict[str, Any]:
    deadline = time.monotonic() + within_s
    while (found := standing(service, account))["held_nanousd"] and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def test_limits_of_accounts_and_keys(service: Service) -> None:
    made = json.loads(service.rift("keys", "create", "--account", "rated", "--json").stdout)
    of_account = ("limits", "set", "--account", "rated")
    done(service, *of_account, "--requests-per-minute", "60", "--concurrent", "8", "--queue-share", "40")
    done(service, *of_account, "--tokens-per-minute", "9000", "--concurrent", "none", "--budget", "2")
    done(service, *of_account, "--key", made["id"], "--requests-per-minute", "2")
    done(service, *of_account, "--log-bytes-per-minute", "70000", "--idempotency-keys", "7")
    refused = service.rift(*of_account, "--concurrent", "9" * 5000)
    assert (refused.returncode, refused.stderr[:36]) == (1, "rift: --concurrent: must be a number")
    warned = service.rift(*of_account, "--plan", "per_second")
    assert "no model has a price per second, so every request of account rated is refused" in warned.stderr
    assert "price" not in service.rift(*of_account, "--plan", "per_token").stderr
    lines = json.loads(done(service, "limits", "list", "--json"))
    assert [line for line in lines if line["account"] == "rated"] == [
        {
            "account": "rated", "key": None, "plan": "per_token", "requests_per_minute": 60,
            "tokens_per_minute": 9000, "log_bytes_per_minute": 70_000, "concurrent": None,
            "idempotency_keys": 7, "content_keys": None, "queue_share_percent": 40,
            "budget_nanousd": 2 * 10**9,
        },
        {
            "account": "rated", "key": made["id"], "plan": None, "requests_per_minute": 2,
            "tokens_per_minute": None, "log_bytes_per_minute": None, "concurrent": None,
            "idempotency_keys": None, "content_keys": None, "queue_share_percent": None,
            "budget_nanousd": None,
        },
    ]  # fmt: skip
    shown = "select key, requests_per_minute, tokens_per_minute, budget_nanousd from limits"
    assert service.sql(f"{shown} where account = 'rated' order by key nulls first") == [
        {"key": None, "requests_per_minute": 60, "tokens_per_minute": 9000, "budget_nanousd": 2 * 10**9},
        {"key": made["id"], "requests_per_minute": 2, "tokens_per_minute": None, "budget_nanousd": None},
    ]
    with service.client(made["key"]) as client:
        answers = [client.post("/v1/inference", json=BODY) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "2"
    assert answers[0].headers["x-ratelimit-limit-tokens"] == "9000"
    # As it was counted, not as it was estimated.
    assert answers[1].headers["x-ratelimit-remaining-tokens"] == str(9000 - 2 * (4 + TOKENS))
    assert answers[2].json()["error"]["code"] == "requests_per_minute"
    assert 50_000 < int(answers[2].headers["retry-after-ms"]) <= 60_000


def test_the_commands(service: Service) -> None:
    key_of(service, "acme")
    done(service, "credit", "grant", "--account", "acme", "--usd", "10.50", "--reason", "a present")
    again = ("credit", "grant", "--account", "acme", "--usd", "0.000000001", "--id", "twice")
    done(service, *again)
    ran = service.rift(*again)
    assert (ran.returncode, "already has grant.acme.twice, and an id counts once" in ran.stderr) == (1, True)
    done(service, "limits", "set", "--account", "acme", "--budget", "3")
    done(service, "limits", "set", "--account", "acme", "--plan", "per_second")
    assert standing(service, "acme") == {
        "account": "acme", "plan": "per_second", "budget_nanousd": 3 * 10**9,
        "granted_nanousd": 10_500_000_001, "held_nanousd": 0, "spent_nanousd": 0,
        "corrected_nanousd": 0, "available_nanousd": 3 * 10**9,
    }  # fmt: skip
    done(service, "limits", "set", "--account", "acme", "--budget", "none")
    assert standing(service, "acme")["plan"] == "per_second"
    assert standing(service, "acme")["available_nanousd"] == 10_500_000_001
    lines = done(service, "credit", "list").splitlines()
    columns = ["account", "plan", "budget", "granted", "held", "spent", "corrected", "available"]
    assert lines[0].split() == columns
    (acme,) = [line for line in lines if line.startswith("acme ")]
    none = "0.000000000"
    assert acme.split() == ["acme", "per_second", "10.500000001", none, none, none, "10.500000001"]


def test_accounts_are_listed(service: Service) -> None:
    key_of(service, "seen")
    lines = json.loads(done(service, "accounts", "list", "--json"))
    (seen,) = [line for line in lines if line["account"] == "seen"]
    assert seen.pop("opened") > 0
    assert seen == {"account": "seen", "keys": 1, "plan": "per_token", "available_nanousd": None}
    header = done(service, "accounts", "list").splitlines()[0]
    assert header.split() == ["account", "opened", "keys", "plan", "available"]


ERRORS: list[tuple[tuple[str, ...], int, str]] = [
    (("credit", "grant", "--account", "nobody", "--usd", "1"), 1, "there is no account 'nobody'"),
    (("limits", "set", "--account", "nobody", "--budget", "1"), 1, "there is no account 'nobody'"),
    (("limits", "set", "--account", "dev"), 1, "nothing to set: name --budget, --plan"),
    (("limits", "set", "--account", "dev", "--concurrent", "0"), 1, "must be a number from 1 to"),
    (("limits", "set", "--account", "dev", "--queue-share", "101"), 1, "from 1 to 100, or none"),
    (
        ("limits", "set", "--account", "dev", "--key", "k", "--budget", "1"),
        1,
        "--budget applies to",
    ),
    (("limits", "set", "--account", "dev", "--key", "k", "--concurrent", "1"), 1, "has no valid key 'k'"),
    (("limits", "set", "--account", "dev", "--key", "", "--concurrent", "1"), 1, "has no valid key ''"),
    (("limits", "set", "--account", "dev", "--key", "", "--budget", "1"), 1, "--budget applies to"),
    (("credit", "grant", "--account", "dev", "--usd", "1.0000000001"), 1, "is not an amount; write"),
    (("credit", "grant", "--account", "dev", "--usd", "-1"), 1, "must be greater than 0, got -1"),
    (("credit", "grant", "--account", "dev", "--usd", "1e3"), 1, "'1e3' is not an amount; write USD"),
    (("credit", "grant", "--account", "dev", "--usd", "1", "--id", "a.b"), 2, "'a.b' is not a valid id"),
    (("limits", "set", "--account", "dev", "--budget", "all"), 1, "'all' is not an amount; write USD"),
]


def lists(service: Service, *accounts: str) -> list[dict[str, Any]]:
    """Return what every command shows of the accounts."""
    lines = [json.loads(done(service, kind, "list", "--json")) for kind in ("accounts", "credit", "limits")]
    return [line for listed in lines for line in listed if line["account"] in accounts]


def test_errors_name_the_invalid_argument(service: Service) -> None:
    before = lists(service, "dev", "nobody")
    with ThreadPoolExecutor(2) as pool:
        ran = list(pool.map(lambda error: service.rift(*error[0]), ERRORS))
    for (words, status, said), one in zip(ERRORS, ran, strict=True):
        assert (one.returncode, said in one.stderr) == (status, True), (words, one.stderr)
        assert "Traceback" not in one.stderr
    assert lists(service, "dev", "nobody") == before


def test_200_at_once_on_a_credit_for_ten_over_two_gateways(service: Service) -> None:
    key = key_of(service, "tight")
    done(service, "credit", "grant", "--account", "tight", "--usd", usd(10 * CHARGE))
    # There are other accounts, so it would not be let fill the queue.
    done(service, "limits", "set", "--account", "tight", "--queue-share", "100")
    with second_gateway(service) as url:
        body = {"model": MODEL, "prompt": BODY["prompt"], "max_tokens": TOKENS}
        client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"}, timeout=60, limits=httpx.Limits(max_connections=200)
        )
        with client, ThreadPoolExecutor(200) as pool:
            urls = [f"{at}/v1/completions" for at in [service.url, url] * 100]
            answers = list(pool.map(lambda at: client.post(at, json=body), urls))
        found = Counter(answer.status_code for answer in answers)
        assert set(found) == {200, 402}, found
        codes = {answer.json()["error"]["code"] for answer in answers if answer.status_code == 402}
        assert codes == {"credit_exhausted"}
        assert charged(service, "tight") == [CHARGE] * found[200]
        assert 1 <= found[200] <= 10
        # Nothing is free any more, so gateways do not keep what they hold and do not use.
        done(service, "limits", "set", "--account", "tight", "--budget", "0")
        after = settled(service, "tight", 40)
    assert after["held_nanousd"] == 0
    assert after["spent_nanousd"] == sum(charged(service, "tight"))
