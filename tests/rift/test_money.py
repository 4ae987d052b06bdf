"""A bill on a real installation, by the commands and the routes that users have."""

import csv
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from events.money import usd
from rift.gateway.api import schemas
from tests.service import Service, until

pytestmark = pytest.mark.slow

PERIOD_NOW = "select strftime(make_timestamp(max(stored_at_ns) // 1000), '%Y-%m') as period from lag"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    started = Service(tmp_path_factory.mktemp("money"), "--engine", "sim").start()
    yield started
    started.stop()


def infer(service: Service, key: str | None = None, tokens: int = 5) -> dict[str, Any]:
    body = {"model": "smollm2:135m", "prompt": "Hello there", "parameters": {"max_tokens": tokens}}
    with service.client(key) as client:
        answer = client.post("/v1/inference", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def done(service: Service, *arguments: str) -> str:
    ran = service.rift(*arguments)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def new_key(service: Service, account: str) -> str:
    return str(json.loads(done(service, "keys", "create", "--account", account, "--json"))["key"])


def period_of(service: Service) -> str:
    return str(service.sql(PERIOD_NOW)[0]["period"])


def test_the_invoice_is_the_sum_of_the_answers_by_every_way(service: Service) -> None:
    key = new_key(service, "sums")
    charged = sum(infer(service, key, tokens)["charge"]["nanousd"] for tokens in (3, 4))
    period = period_of(service)
    ask = ("invoice", "--account", "sums", "--period", period)
    told = json.loads(done(service, *ask, "--json"))
    assert (told["status"], told["total_nanousd"]) == ("open", charged)
    [line] = told["lines"]
    assert (line["plan"], line["requests"], line["output_tokens"]) == ("per_token", 2, 7)
    shown = done(service, *ask)
    assert f"({charged} nano-USD)" in shown
    assert "provisional" in shown
    rows = list(csv.DictReader(io.StringIO(done(service, *ask, "--csv"))))
    assert sum(int(row["BilledCost"].replace(".", "")) for row in rows) == charged
    with service.client(key) as client:
        assert client.get(f"/v1/invoices/{period}").json()["lines"] == told["lines"]
        [usage] = client.get("/v1/usage", params={"group_by": "model"}).json()["data"]
        assert (usage["requests"], usage["charge_nanousd"]) == (2, charged)


def test_an_account_sees_its_own_bills_only(service: Service) -> None:
    infer(service, new_key(service, "mine"))
    with service.client(new_key(service, "other")) as client:
        assert client.get(f"/v1/invoices/{period_of(service)}").json()["lines"] == []
        assert client.get("/v1/usage").json()["data"] == []
    with service.client("rift_no_key") as client:
        assert client.get("/v1/usage").status_code == 401


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/v1/invoices/2026-13", "'2026-13' is not a period"),
        ("/v1/usage?from=yesterday", "from: 'yesterday' is not a day"),
        ("/v1/usage?month=2026-11", "month: this route has no such parameter; it has from, to, group_by"),
        ("/v1/usage?group_by=day&group_by=key", "group_by: given more than once"),
        ("/v1/invoices?page=2", "page: this route has no such parameter; it has limit, after"),
        ("/v1/inference?limit=1&limit=2", "limit: given more than once"),
        ("/v1/usage?group_by=colour", "'colour' is not a group"),
    ],
)
def test_routes_name_the_invalid_parameter(service: Service, path: str, message: str) -> None:
    with service.client() as client:
        answer = client.get(path)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert message in answer.json()["error"]["message"]


def test_a_price_applies_to_requests_accepted_after_it(service: Service, tmp_path: Path) -> None:
    key = new_key(service, "prices")
    before = infer(service, key)["charge"]["nanousd"]
    listed = tmp_path / "list.toml"
    listed.write_text('[prices."smollm2:135m"]\nprompt_usd = "0.02"\noutput_usd = "0.04"\n')
    diff = ("rerate", "--price-list", str(listed), "--period", period_of(service), "--diff", "--json")
    [told] = [row for row in json.loads(done(service, *diff)) if row["account"] == "prices"]
    assert told["difference_nanousd"] == before
    assert "smollm2:135m: 10 in, 20 out -> 20 in, 40 out" in done(service, "prices", "publish", str(listed))
    assert "already in force" in done(service, "prices", "publish", str(listed))
    version = json.loads(done(service, "prices", "list", "--json"))["version"]
    # A gateway follows the book.
    until(service, f"select version from prices where version = {version}")
    assert infer(service, key)["charge"]["nanousd"] == 2 * before
    lines = service.sql(
        "select price_version, nanousd from invoice_lines where account = 'prices' order by 1"
    )
    assert lines == [
        {"price_version": version - 1, "nanousd": before},
        {"price_version": version, "nanousd": 2 * before},
    ]


def test_plan_per_second_is_the_same_in_answers_lists_usage_economics_and_invoice(
    service: Service, tmp_path: Path
) -> None:
    listed = tmp_path / "seconds.toml"
    listed.write_text(
        '[prices."smollm2:135m"]\nprompt_usd = "0.02"\noutput_usd = "0.04"\n'
        'cached_prompt_usd = "0.01"\nsecond_usd = "0.000000701"\n'
    )
    done(service, "prices", "publish", str(listed))
    key = new_key(service, "timed")
    done(service, "limits", "set", "--account", "timed", "--plan", "per_second")
    # A gateway follows the book.
    until(service, "select 1 from limits where account = 'timed' and plan = 'per_second'")
    with service.client(key) as client:
        model = client.get("/v1/models/smollm2:135m").json()
        assert model["price_nanousd"] == {
            "prompt_token": 20, "cached_prompt_token": 10, "output_token": 40, "second": 701
        }  # fmt: skip
        assert model["price_usd"]["second"] == "0.000000701"
        assert model["price_usd"]["million_cached_prompt_tokens"] == "0.010000000"
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(lambda tokens: infer(service, key, tokens), (5, 20, 40)))
        for answer in answers:
            assert answer["seconds"] >= 1
            assert answer["charge"] == {"at_most_nanousd": answer["seconds"] * 701, "final": False}
            stored = client.get(f"/v1/inference/{answer['id']}").json()
            assert (stored["seconds"], stored["charge"]) == (answer["seconds"], answer["charge"])
            msgspec.convert(stored, schemas.Inference)
        page = client.get("/v1/inference").json()
        msgspec.convert(page, schemas.InferenceList)
        shown = {row["id"]: row for row in page["data"]}
        for answer in answers:
            row = shown[answer["id"]]
            assert (row["seconds"], row["charge"]) == (answer["seconds"], answer["charge"])
        period = period_of(service)
        bill = client.get(f"/v1/invoices/{period}").json()
        msgspec.convert(bill, schemas.MonthInvoice)
        assert bill["lines"][0]["nanousd"] == bill["lines"][0]["seconds"] * 701
        page = client.get("/v1/invoices").json()
        msgspec.convert(page, schemas.InvoiceList)
        [listed_bill] = page["data"]
        assert listed_bill == {
            "object": "invoice", "period": period, "status": "open",
            "total_nanousd": bill["total_nanousd"], "total_usd": usd(bill["total_nanousd"]),
        }  # fmt: skip
        for groups in ("hour", "plan,key"):
            sums = client.get("/v1/usage", params={"group_by": groups}).json()
            msgspec.convert(sums, schemas.UsageReport)
            rows = sums["data"]
            assert sum(row["charge_nanousd"] for row in rows) == bill["total_nanousd"]
        refused = client.get("/v1/invoices", params={"after": "2026"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_period")
        refused = client.get("/v1/invoices", params={"limit": "0"})
        assert refused.json()["error"]["param"] == "limit"
    shares = service.sql("select seconds, nanousd from shares where account = 'timed'")
    assert sum(row["nanousd"] for row in shares) == bill["total_nanousd"]
    assert sum(row["seconds"] for row in shares) == sum(answer["seconds"] for answer in answers)
    [both] = service.sql(
        "select (select sum(revenue_nanousd) from unit_economics) as earned,"
        " (select sum(nanousd) from invoice_lines where plan <> 'correction') as billed"
    )
    assert both["earned"] == both["billed"]


def test_a_list_that_prices_an_unknown_model_is_not_published(service: Service, tmp_path: Path) -> None:
    listed = tmp_path / "list.toml"
    listed.write_text('[prices."gpt-9"]\nprompt_usd = "0.02"\noutput_usd = "0.04"\n')
    ran = service.rift("prices", "publish", str(listed))
    assert ran.returncode == 1
    assert "model 'gpt-9' is not in the catalogue" in ran.stderr


def test_a_correction_is_on_the_next_invoice(service: Service) -> None:
    answer = infer(service, new_key(service, "sorry"))
    amount = answer["charge"]["nanousd"]
    told = done(
        service,
        *("correct", "--account", "sorry", f"--usd=-{answer['charge']['usd']}"),
        *("--reason", "slow", "--request", answer["id"], "--id", "ticket-7"),
    )
    repeated = service.rift(
        *("correct", "--account", "sorry", "--usd=-1", "--reason", "slow", "--id", "ticket-7")
    )
    assert (repeated.returncode, "nothing was added" in repeated.stderr) == (1, True)
    assert "USD to sorry's next invoice: slow" in told
    lines = json.loads(
        done(service, "invoice", "--account", "sorry", "--period", period_of(service), "--json")
    )
    assert [line["nanousd"] for line in lines["lines"]] == [-amount, amount]
    assert lines["total_nanousd"] == 0


WRONG: dict[str, tuple[str, ...]] = {
    "there is no account 'nobody'": ("invoice", "--account", "nobody", "--period", "2026-11"),
    "is not over": ("period", "close", "2199-01"),
    "there is no account 'ghost'": ("correct", "--account", "ghost", "--usd", "1", "--reason", "x"),
    "'1e3' is not an amount": ("correct", "--account", "dev", "--usd", "1e3", "--reason", "x"),
    "must not be 0": ("correct", "--account", "dev", "--usd", "0", "--reason", "x"),
    "must be one line of text": ("correct", "--account", "dev", "--usd", "1", "--reason", " "),
    "'nope' has no price": (
        *("correct", "--account", "dev", "--usd", "1", "--reason", "x", "--model", "nope"),
    ),
    "'req_1' is not a request id": (
        *("correct", "--account", "dev", "--usd", "1", "--reason", "x", "--request", "req_1"),
    ),
    "'' is not a request id": (
        *("correct", "--account", "dev", "--usd", "1", "--reason", "x", "--request", ""),
    ),
    "'here' is not a position": ("replay", "--until", "here"),
    "'' is not a position": ("replay", "--until", ""),
    "needs --until POSITION": ("replay", "--digest", "select 1"),
    "only unreadable records can be skipped": ("quarantine", "RIFT_0:1", "--reason", "x"),
}


def test_refused_commands_give_the_reason(service: Service) -> None:
    with ThreadPoolExecutor(2) as pool:
        refused = list(pool.map(lambda words: service.rift(*words), WRONG.values()))
    for message, ran in zip(WRONG, refused, strict=True):
        assert (ran.returncode, message in ran.stderr) == (1, True), (message, ran.stderr)
        assert ran.stderr.startswith("rift: ")


@pytest.mark.parametrize("read", [1, 4])
def test_a_client_that_leaves_early_still_pays(service: Service, read: int) -> None:
    """A client pays for all tokens generated until the gateway notices that it left."""
    account = f"leaver-{read}"
    body = {"model": "smollm2:135m", "prompt": "Hello there", "max_tokens": 300, "stream": True}
    with (
        service.client(new_key(service, account)) as client,
        client.stream("POST", "/v1/completions", json=body) as answer,
    ):
        lines = (line for line in answer.iter_lines() if line.startswith("data: "))
        for _ in range(read):
            next(lines)
    row = until(
        service,
        "select finish_reason, cancel_reason, prompt_tokens, output_tokens, charge_nanousd, prompt_nanousd,"
        " output_nanousd from requests"
        " join prices on version = price_version and prices.model = requests.model"
        f" where account = '{account}' and finished_at_ns is not null",
    )
    assert (row["finish_reason"], row["cancel_reason"]) == ("cancelled", "disconnect")
    assert read <= row["output_tokens"] < 300
    tokens = row["prompt_tokens"] * row["prompt_nanousd"] + row["output_tokens"] * row["output_nanousd"]
    assert row["charge_nanousd"] == tokens > 0


def test_a_repeated_idempotency_key_is_charged_once(service: Service) -> None:
    key = new_key(service, "again")
    body = {"model": "smollm2:135m", "prompt": "Hello there", "parameters": {"max_tokens": 5}}
    with service.client(key) as client:
        answers = [
            client.post("/v1/inference", json=body, headers={"Idempotency-Key": "k"}).json() for _ in range(3)
        ]
    assert len({answer["id"] for answer in answers}) == 1
    [line] = service.sql("select requests, nanousd from invoice_lines where account = 'again'")
    assert line == {"requests": 1, "nanousd": answers[0]["charge"]["nanousd"]}


def test_replay_gives_the_same_results(service: Service) -> None:
    infer(service)
    first = done(service, "replay", "--digest")
    assert done(service, "replay", "--digest") == first
    assert "invoice_lines" in first
    assert "lag" not in first
    done(service, "replay", "--rebuild")
    assert done(service, "replay", "--digest") == first
    assert "verified up to RIFT_0:" in done(service, "replay", "--verify")
    state = done(service, "replay", "--until", "RIFT_0:1", "--json", "select count(*) as many from requests")
    assert json.loads(state) == [{"many": 0}]


def test_an_archive_is_verified_only_against_its_log(service: Service) -> None:
    infer(service)
    done(
        service,
        "audit",
        "export",
        "--account",
        "dev",
        "--period",
        period_of(service),
        str(service.folder / "export"),
    )
    exported = service.folder / "export"
    open_to_others = [file for file in (exported, *exported.iterdir()) if file.stat().st_mode & 0o077]
    assert open_to_others == [], "a customer's data is for its owner only"
    archive = service.folder / "archive"
    aside = service.folder / "aside"
    assert "verified: every hash matches" in done(service, "archive", "verify")
    assert "verified" not in done(service, "archive", "verify", "--offline")
    archive.rename(aside)
    try:
        lost = service.rift("archive", "verify")
        assert (lost.returncode, lost.stdout) == (1, "")
        assert "holds no segment, but the log's book names" in lost.stderr
    finally:
        aside.rename(archive)
    silent = service.rift("archive", "verify", "--nats", "nats://127.0.0.1:1")
    assert (silent.returncode, silent.stdout) == (1, "")
    assert "nothing was verified, because the archive cannot be compared with the log" in silent.stderr
