"""Several prompts in one body: each is a group, and the answer, the table and the invoice agree."""

import json
from collections import defaultdict
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from events import codec, subjects
from events.schema import AccountOpened, CancelRequested, LimitsSet
from replay.billing.invoice import invoice
from replay.warehouse.warehouse import Warehouse
from rift.engines import Emit, RequestAborted, Step
from rift.gateway import choices as groups
from rift.gateway.admission import lane_credit, request_size
from tests.rift.gateway.admission.test_credit import World, granted, live
from tests.rift.gateway.admission.test_request_size import FITS
from tests.simulation import prepaid
from tests.simulation.client import Call
from tests.simulation.corrections import correct
from tests.simulation.ledger import STREAM
from tests.simulation.prepaid import ACCOUNT, PRICE, standing_of
from tests.simulation.processes import MODEL, SECRET, Engine, GatewayProcess, WorkerProcess

PATH = "/v1/completions"
PERIOD = "2025-06"
RICH = granted(10**9)
CACHED_NANOUSD = 7

LONG = "a longer prompt " * 4
Ask = tuple[list[str], int, int]
asks = st.tuples(
    st.lists(st.sampled_from(["a", "b c", LONG]), min_size=1, max_size=8),
    st.integers(1, 8),
    st.integers(1, 5),
).filter(lambda ask: len(ask[0]) * ask[1] <= 8)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settle idle credit holds within a test."""
    monkeypatch.setattr(lane_credit, "IDLE_S", 30.0)


async def post(world: World, gateway: GatewayProcess, *, key: str = "", **body: Any) -> Call:
    call = world.ask(gateway, PATH, headers={"idempotency-key": key} if key else {}, **body)
    while await call.more():
        pass
    return call


def whole_of(call: Call) -> dict[str, Any]:
    """Return the object of an answer, or what the chunks of a stream add up to."""
    assert call.status == 200, call.data
    if call.headers[b"content-type"] != b"text/event-stream":
        answer: dict[str, Any] = json.loads(call.data)
        return answer
    *blocks, done, _ = call.data.decode().split("\n\n")
    assert done == "data: [DONE]"
    chunks = [json.loads(block.removeprefix("data: ")) for block in blocks if block.startswith("data: ")]
    shown: defaultdict[int, dict[str, Any]] = defaultdict(
        lambda: {"text": "", "logprobs": None, "finish_reason": None}
    )
    for chunk in chunks:
        for choice in chunk["choices"]:
            whole = shown[choice["index"]]
            assert whole["finish_reason"] is None, "nothing follows the end of a choice"
            whole["text"] += choice["text"]
            whole["finish_reason"] = choice["finish_reason"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    choices = [{"index": index, **choice} for index, choice in sorted(shown.items())]
    return chunks[-1] | {"choices": choices}


def requests_of(world: World, answer: dict[str, Any], count: int) -> list[str]:
    world.ledger.catch_up()
    first = world.ledger.entries[answer["id"]].accepted
    return groups.request_ids(first, count, secret=SECRET)


def projected(world: World) -> Warehouse:
    warehouse = Warehouse.open(Path(":memory:"))
    for name in (subjects.BOOK, subjects.FLEET, STREAM):
        warehouse.apply(name, world.broker.stream(name).messages)
    return warehouse


@settings(max_examples=5, deadline=None)
@given(given_asks=st.lists(asks, min_size=1, max_size=2))
@example(given_asks=[(["a", LONG], 4, 2), (["a"] * 8, 1, 1), (["b c"], 8, 3)])
def test_answer_stream_table_credit_and_invoice_agree(given_asks: list[Ask]) -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        asked: list[tuple[dict[str, Any], list[str], int]] = []
        for number, (prompts, n, tokens) in enumerate(given_asks):
            body = {"prompt": prompts, "n": n, "max_tokens": tokens, "seed": 7}
            streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
            answers = [
                whole_of(await post(world, gateway, **body)),
                whole_of(await post(world, gateway, **streamed)),
                whole_of(await post(world, gateway, key=f"key {number}", **body)),
            ]
            assert whole_of(await post(world, gateway, key=f"key {number}", **body)) == answers[-1]
            for answer in answers:
                assert [choice["index"] for choice in answer["choices"]] == list(range(len(prompts) * n))
                assert answer["choices"] == answers[0]["choices"], "the seed makes them equal"
                assert answer["usage"]["total_tokens"] == answers[0]["usage"]["total_tokens"]
                asked.append((answer, prompts, n))
        with closing(projected(world)) as warehouse:
            total = sum(check_rows(world, warehouse, *each) for each in asked)
            assert invoice(warehouse.read, ACCOUNT, PERIOD).total_nanousd == total
        await anyio.sleep(100)
        standing = standing_of(world.broker)
        assert (standing.spent_nanousd, standing.holds) == (total, {})

    with pytest.MonkeyPatch.context() as patch:
        caching(patch)
        live(test, RICH)


def caching(patch: pytest.MonkeyPatch) -> None:
    """Make the engine find half of a prompt in its cache, or nothing, and give these tokens a price."""
    generate = Engine.generate

    async def cached(self: Engine, attempt: str, rendered: Any, *rest: Any, emit: Emit, **more: Any) -> None:
        tokens = len(rendered.prompt_ids) // 2 * (ord(attempt[-1]) % 2)

        def first(step: Step) -> bool:
            nonlocal tokens
            step, tokens = replace(step, cached_tokens=tokens), 0
            return emit(step)

        await generate(self, attempt, rendered, *rest, emit=first, **more)

    patch.setattr(Engine, "generate", cached)
    patch.setattr(prepaid, "PRICE", replace(PRICE, cached_prompt_nanousd=CACHED_NANOUSD))


def check_rows(world: World, warehouse: Warehouse, answer: dict[str, Any], prompts: list[str], n: int) -> int:
    """Compare an answer with its rows in the table of requests; return its charge."""
    ids = requests_of(world, answer, len(prompts) * n)
    select = (
        "select request_id, group_id, choice, prompt_tokens, output_tokens, charge_nanousd, "
        "billed_prompt_tokens, billed_cached_tokens "
        "from requests where request_id in (select unnest($ids)) order by choice"
    )
    [result] = warehouse.read((select, {"ids": ids}))
    rows = [dict(zip(result.columns, row, strict=True)) for row in result.rows]
    assert [(row["request_id"], row["choice"]) for row in rows] == list(
        zip(ids, range(len(ids)), strict=True)
    )
    usage = answer["usage"]
    assert sum(row["output_tokens"] for row in rows) == usage["completion_tokens"]
    for at, prompt in enumerate(prompts):
        own = rows[at * n : (at + 1) * n]
        assert {row["group_id"] for row in own} == {own[0]["request_id"] if n > 1 else None}
        billed = sorted(row["billed_prompt_tokens"] + row["billed_cached_tokens"] for row in own)
        assert billed == [0] * (n - 1) + [own[0]["prompt_tokens"]]
        for row in own:
            assert world.ledger.entries[row["request_id"]].accepted.input == prompt
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert sum(row["billed_cached_tokens"] for row in rows) == cached
    assert sum(row["billed_prompt_tokens"] for row in rows) == usage["prompt_tokens"] - cached
    charge = sum(row["charge_nanousd"] for row in rows)
    assert charge == (
        (usage["prompt_tokens"] - cached) * PRICE.prompt_nanousd
        + cached * CACHED_NANOUSD
        + usage["completion_tokens"] * PRICE.output_nanousd
    )
    return int(charge)


async def refusal(world: World, gateway: GatewayProcess, **body: Any) -> tuple[int, dict[str, Any]]:
    call = await post(world, gateway, **body)
    return call.status, json.loads(call.data)["error"]


def cancels(world: World) -> list[str]:
    stored = world.broker.stream(STREAM).messages
    events = [event for message in stored for event in codec.decode(message.data)[1]]
    return [event.why for event in events if isinstance(event, CancelRequested)]


async def owed(world: World) -> int:
    """Return what the invoice says, after control's corrections."""
    await correct(world.broker)
    with closing(projected(world)) as warehouse:
        return invoice(warehouse.read, ACCOUNT, PERIOD).total_nanousd


def test_if_one_prompt_cannot_be_accepted_none_is() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        status, error = await refusal(world, gateway, prompt=["a", "x" * (FITS + 1)], max_tokens=1)
        assert (status, error["param"]) == (400, "prompt[1]")
        status, error = await refusal(world, gateway, prompt=["x" * (FITS // 2), "a"], max_tokens=500)
        assert (status, error["param"]) == (400, "max_tokens")
        assert error["message"].startswith("prompt[0]: ")
        # The credit is enough for one prompt.
        status, error = await refusal(world, gateway, prompt=["a", "b"], max_tokens=10)
        assert (status, error["code"]) == (402, "credit_exhausted")
        world.ledger.catch_up()
        assert not world.ledger.entries
        assert not standing_of(world.broker).holds
        assert (await post(world, gateway, prompt="a", max_tokens=10)).status == 200

    live(test, granted(15_000))


def test_a_limit_counts_each_prompt() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        status, error = await refusal(world, gateway, prompt=["a"] * 5, max_tokens=1)
        assert (status, error["code"]) == (429, "concurrent_requests")
        call = await post(world, gateway, prompt=["a"] * 2, n=2, max_tokens=1)
        assert call.status == 200
        assert call.headers[b"x-ratelimit-remaining-requests"] == b"6"
        call = await post(world, gateway, prompt=["a" * 400] * 4, max_tokens=1)
        error = json.loads(call.data)["error"]
        assert (call.status, error["code"]) == (429, "tokens_per_minute")
        assert "needs 404" in error["message"]
        # The earlier request used two prompt tokens and four output tokens.
        assert call.headers[b"x-ratelimit-remaining-tokens"] == b"394"

    limits = LimitsSet(
        id="limits", account=ACCOUNT, requests_per_minute=10, tokens_per_minute=400, concurrent=4
    )
    live(test, limits)


def test_the_queue_counts_each_prompt() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway(served=(MODEL,))
        for count in (8, 4):
            world.ask(gateway, PATH, prompt=["a"] * count)
            await anyio.sleep(1)
        status, error = await refusal(world, gateway, prompt=["a"] * 5)
        assert (status, error["code"]) == (429, "queue_share")

    live(test, AccountOpened(id="other", account="other"))


def test_the_record_of_each_prompt_must_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_size, "MESSAGE_BYTES_MAX", request_size.ENVELOPE_BYTES + 1000)

    async def test(world: World) -> None:
        gateway = await world.gateway(served=(MODEL,))
        status, error = await refusal(world, gateway, prompt=["a", "b" * 1000], max_tokens=1)
        assert (status, error["code"]) == (413, "body_too_large")
        world.ledger.catch_up()
        assert not world.ledger.entries

    live(test)


def test_the_stored_bytes_are_those_of_each_prompt() -> None:
    async def test(world: World) -> None:
        first = world.accepted(await world.gateway())
        choices = groups.of(first, ["b" * 1000, "c"], choices=2, secret=SECRET)
        size = sum(len(msgspec.json.encode(accepted)) for accepted in choices)
        # The seed and the index of a choice have few digits.
        assert abs(request_size.stored_bytes(choices) - size) < 100

    live(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_a_worker_refuses_ends_the_others_as_if_the_client_had_left(stream: bool) -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        # With three slots the last is refused once another has ended.
        prompts = ["a", "b", "c", " " * 8 * FITS + "a"]
        call = await post(world, gateway, prompt=prompts, max_tokens=60, stream=stream)
        if stream:
            *_, last, done, _ = call.data.decode().split("\n\n")
            assert (call.status, done) == (200, "data: [DONE]")
            error = json.loads(last.removeprefix("data: "))["error"]
        else:
            assert call.status == 400
            error = json.loads(call.data)["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", "prompt[3]")
        assert error["message"].startswith("prompt[3]: ")
        await anyio.sleep(100)
        assert set(cancels(world)) == {"disconnect"}
        world.ledger.catch_up()
        outputs = [len(entry.token_ids) for entry in world.ledger.entries.values()]
        assert max(outputs) == 60
        assert await owed(world) == 3 * PRICE.prompt_nanousd + sum(outputs) * PRICE.output_nanousd
        assert not standing_of(world.broker).holds

    live(test, RICH)


def aborting(monkeypatch: pytest.MonkeyPatch, after_s: float) -> None:
    """Make the engine give up requests with the prompt `boom`."""
    generate = Engine.generate

    async def broken(self: Engine, attempt: str, rendered: Any, *rest: Any, **more: Any) -> None:
        if rendered.prompt_ids == [int.from_bytes(b"boom", "big")]:
            await anyio.sleep(after_s)
            raise RequestAborted("boom")
        await generate(self, attempt, rendered, *rest, **more)

    monkeypatch.setattr(Engine, "generate", broken)


@pytest.mark.parametrize(("stream", "charged"), [(False, 0), (True, 1)])
def test_if_rift_fails_one_what_the_client_did_not_receive_is_free(
    monkeypatch: pytest.MonkeyPatch, stream: bool, charged: int
) -> None:
    """In a stream the client has the whole text of a choice that ended before the failure."""
    aborting(monkeypatch, after_s=3.0)

    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        # The first ends before the failure, the third begins then.
        call = await post(world, gateway, prompt=["a", "boom", "b", "c"], max_tokens=40, stream=stream)
        assert call.status == (200 if stream else 500)
        assert b"prompt[1]: " in call.data
        await anyio.sleep(100)
        assert await owed(world) == charged * 2 * (PRICE.prompt_nanousd + 40 * PRICE.output_nanousd)

    live(test)


def test_a_key_that_is_used_again_after_our_failure_pays_for_one_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    aborting(monkeypatch, after_s=1.0)

    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        body = {"prompt": ["a", "boom"], "max_tokens": 10}
        left = world.ask(gateway, PATH, headers={"idempotency-key": "key"}, **body)
        await anyio.sleep(0.5)
        left.leave()
        await anyio.sleep(10)
        monkeypatch.undo()
        monkeypatch.setattr(lane_credit, "IDLE_S", 30.0)
        assert (await post(world, gateway, key="key", **body)).status == 200
        await anyio.sleep(100)
        world.ledger.catch_up()
        assert len(world.ledger.entries) == 4
        assert await owed(world) == 2 * (PRICE.prompt_nanousd + 10 * PRICE.output_nanousd)

    live(test)


def test_a_lost_worker_changes_neither_text_nor_charge() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        body = {"prompt": ["a", "a", "b"], "n": 2, "max_tokens": 30, "seed": 1}
        first = WorkerProcess(world.broker, world.chance, "first")
        world.tasks.start_soon(first.run)
        await anyio.sleep(0.1)
        answers: list[Call] = []

        async def ask() -> None:
            answers.append(await post(world, gateway, **body))

        world.tasks.start_soon(ask)
        await anyio.sleep(1.0)
        first.kill()
        await world.work()
        await anyio.sleep(120)
        undisturbed = await post(world, gateway, **body)
        assert whole_of(answers[0])["choices"] == whole_of(undisturbed)["choices"]
        assert await owed(world) == 2 * (3 * PRICE.prompt_nanousd + 6 * 30 * PRICE.output_nanousd)

    live(test)


def test_a_client_that_leaves_pays_each_prompt_that_has_begun_once() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        call = world.ask(gateway, PATH, prompt=["a", "b", "c", "d"], n=2, max_tokens=400, stream=True)
        await anyio.sleep(2.0)
        call.leave()
        await anyio.sleep(100)
        assert cancels(world) == ["disconnect"] * 8
        world.ledger.catch_up()
        begun = [entry for entry in world.ledger.entries.values() if entry.token_ids]
        prompts = {entry.prompt for entry in begun}
        assert 1 < len(prompts) < 4
        output = sum(len(entry.token_ids) for entry in begun)
        assert await owed(world) == len(prompts) * PRICE.prompt_nanousd + output * PRICE.output_nanousd

    live(test)


def test_prompts_that_run_at_once_share_their_seconds() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        # Three slots, 20 tokens a second each: two rounds of 2.5 s.
        assert (await post(world, gateway, prompt=["a", "b", "c"], n=2, max_tokens=50)).status == 200
        await anyio.sleep(100)
        assert PRICE.second_nanousd is not None
        assert await owed(world) in (5 * PRICE.second_nanousd, 6 * PRICE.second_nanousd)
        assert standing_of(world.broker).spent_nanousd == await owed(world)

    live(test, RICH, LimitsSet(id="limits", account=ACCOUNT, plan="per_second"))
