"""The gateway's metrics: what they count is what SQL says, and the table in ops/README.md lists them."""

import re
from collections.abc import Iterable
from contextlib import closing
from functools import partial
from pathlib import Path

import anyio
import pytest

from events.contracts import SECOND_NS
from replay.warehouse.warehouse import Warehouse
from rift.gateway.process import Opened
from rift.gateway.state import GatewayConfig
from rift.gateway.streams.lane_counts import GAP_S, QUEUE_S, TTFT_S, WHOLE_S, LaneCounts
from rift.metrics.families import Collector, process
from tests.rift.gateway.admission.test_credit import World, live, opened
from tests.rift.gateway.test_prompts import post, projected
from tests.simulation import processes
from tests.simulation.processes import MODEL

README = Path(__file__).parents[3] / "ops" / "README.md"
ROW = re.compile(r"\| `(?P<name>\w+)` \| (?P<type>\w+) \|(?P<labels>[^|]*)\| (?P<help>[^|]*) \|")
Samples = dict[tuple[str, ...], float]


def samples(collectors: Iterable[Collector]) -> Samples:
    """Return each sample by its name and the values of its labels."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for each in collectors
        for metric in each.collect()
        for sample in metric.samples
    }


def column(warehouse: Warehouse, select: str) -> list[int]:
    return [value for (value,) in warehouse.query(f"select {select}").rows if value is not None]


def check_histogram(shown: Samples, name: str, bounds_s: Iterable[float], values_ns: list[int]) -> None:
    """Check that each bucket holds what SQL has."""
    metric = f"rift_gateway_{name}_seconds"
    for bound_s in bounds_s:
        below = sum(value <= round(bound_s * SECOND_NS) for value in values_ns)
        assert shown[f"{metric}_bucket", MODEL, repr(float(bound_s))] == below, (metric, bound_s)
    assert shown[f"{metric}_count", MODEL] == len(values_ns) > 0
    assert shown[f"{metric}_sum", MODEL] == pytest.approx(sum(values_ns) / SECOND_NS)


async def traffic(world: World) -> Opened:
    """Requests that wait for a worker, that stream, that do not, and whose clients leave."""
    gateway = await world.gateway(served=[MODEL])
    early = [world.ask(gateway, prompt="early", parameters={"max_tokens": tokens}) for tokens in (1, 2)]
    await anyio.sleep(3)
    unread = world.ask(gateway, prompt="never read", parameters={"max_tokens": 40})
    await anyio.sleep(0.1)
    unread.leave()
    await anyio.sleep(3)
    await world.work()
    for call in early:
        while await call.more():
            pass
    await post(world, gateway, prompt=["several", "prompts"], n=2, max_tokens=20)
    await post(world, gateway, prompt="a stream", stream=True, max_tokens=50)
    leaving = world.ask(gateway, prompt="a stream", stream=True, parameters={"max_tokens": 400})
    await leaving.more()
    leaving.leave()
    background = world.ask(gateway, prompt="later", background=True, parameters={"max_tokens": 30})
    assert await background.more()
    await anyio.sleep(60)
    return opened(gateway)


def test_each_bucket_holds_what_relation_latency_has() -> None:
    async def test(world: World) -> None:
        parts = await traffic(world)
        shown = samples(parts.collectors)
        with closing(projected(world)) as warehouse:
            intervals = {
                "time_to_first_token": (TTFT_S, "ttft_ns"),
                "queue_time": (QUEUE_S, "queue_ns"),
            }
            for name, (bounds_s, relation) in intervals.items():
                check_histogram(shown, name, bounds_s, column(warehouse, f"{relation} from latency"))
            whole_ns = column(warehouse, "e2e_ns from latency where queue_ns is not null")
            ended = sum(
                value for key, value in shown.items() if key[0] == "rift_gateway_requests_ended_total"
            )
            assert ended == len(column(warehouse, "e2e_ns from latency")) > len(whole_ns)
            assert shown["rift_gateway_request_duration_seconds_count", MODEL] == ended
            gaps = column(warehouse, "list_sum(itl_counts) from latency")
            assert shown["rift_gateway_inter_token_latency_seconds_count", MODEL] == sum(gaps)
            gap_ns = column(warehouse, "last_token_at_ns - first_token_at_ns from requests")
            assert shown["rift_gateway_inter_token_latency_seconds_sum", MODEL] == pytest.approx(
                sum(gap_ns) / SECOND_NS
            )
            (tokens,) = column(warehouse, "sum(output_tokens)::bigint from requests")
            assert shown["rift_gateway_output_tokens_total", MODEL] == tokens
            prompts = column(
                warehouse, "max(prompt_tokens) from requests group by coalesce(group_id, request_id)"
            )
            assert shown["rift_gateway_prompt_tokens_total", MODEL] == sum(prompts)
            (charged,) = column(warehouse, "sum(charge_nanousd)::bigint from requests")
            assert shown["rift_gateway_revenue_usd_total", MODEL] == pytest.approx(charged / 1e9)
        assert shown["rift_gateway_requests_total", "POST /v1/inference", MODEL, "gone"] == 1
        assert shown["rift_gateway_requests_total", "POST /v1/completions", MODEL, "200"] == 2
        counts = parts.lanes.own.counts
        assert isinstance(counts, LaneCounts)
        assert not counts._running, "a request that has ended leaves nothing"
        assert not counts._paid

    live(test)


def test_a_request_counts_while_it_runs_and_when_it_is_no_longer_followed() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        await world.work()
        world.ask(gateway, prompt="a stream", stream=True, parameters={"max_tokens": 400})
        own = opened(gateway).lanes.own
        for is_followed in (True, False):
            await anyio.sleep(1)
            for subscription in [] if is_followed else own._every():
                own.close(subscription)
            assert bool(own.followed) == is_followed
            shown = samples(opened(gateway).collectors)
            gaps = shown["rift_gateway_inter_token_latency_seconds_count", MODEL]
            assert 0 < gaps < shown["rift_gateway_output_tokens_total", MODEL] < 400
            mean_s = shown["rift_gateway_inter_token_latency_seconds_sum", MODEL] / gaps
            assert 0.001 < mean_s < 0.1

    live(test)


def documented(prefix: str) -> dict[str, tuple[str, str, str]]:
    section = README.read_text(encoding="utf-8").partition("\n## Metrics\n")[2].partition("\n## ")[0]
    rows = [match.groupdict() for match in ROW.finditer(section)]
    return {
        row["name"]: (row["type"], row["labels"].replace("`", "").strip(), row["help"].replace("`", ""))
        for row in rows
        if row["name"].startswith(prefix)
    }


def described(collectors: Iterable[Collector]) -> dict[str, tuple[str, str, str]]:
    """Return the type, the labels and the meaning of each metric."""
    found = {}
    for each in collectors:
        for metric in each.collect():
            name = metric.name + "_total" * (metric.type == "counter")
            labels = ", ".join(getattr(metric, "_labelnames", ()))
            found[name] = metric.type, labels, metric.documentation.replace("`", "")
    return found


def test_the_documentation_lists_every_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    config = partial(GatewayConfig, metrics_accounts=True)
    monkeypatch.setattr(processes, "GatewayConfig", config)

    async def test(world: World) -> None:
        parts = opened(await world.gateway())
        assert documented("rift_gateway_") == described(parts.collectors)
        shown = {key[1] for key in samples(parts.collectors) if key[0] == "rift_gateway_limit"}
        text = README.read_text(encoding="utf-8")
        assert shown | {"content_keys"} == set(re.findall(r"^- `(\w+)`: ", text, re.M))

    live(test)
    assert documented("process_") == described([process()])


def test_accounts_are_counted_only_if_that_is_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(world: World, names: set[str]) -> None:
        gateway = await world.gateway()
        await world.work()
        assert (await world.answer(gateway, tokens=5))[0] == 200
        shown = samples(opened(gateway).collectors)
        assert {key[0] for key in shown if "acme" in key} == names

    live(partial(test, names=set()))
    monkeypatch.setattr(processes, "GatewayConfig", partial(GatewayConfig, metrics_accounts=True))
    live(partial(test, names={"rift_gateway_account_requests_total", "rift_gateway_account_tokens_total"}))


def test_targets_for_first_tokens_are_bounds() -> None:
    counts = LaneCounts(ttft_ms=(2000, 1234))
    bounds = counts._times[1]._bounds_s
    assert 1.234 in bounds
    assert list(bounds) == sorted(set(bounds))
    for bounds_s in (GAP_S, QUEUE_S, TTFT_S, WHOLE_S):
        assert list(bounds_s) == sorted(set(bounds_s))
    assert {2, 10} <= set(TTFT_S)
    assert 0.05 in GAP_S
