"""The report as text for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from events.contracts import LANE_SILENT_S, REPLICA_REPORT_S
from rift.cli.output import table

# A replica that sends no report for this long has missed one.
REPORT_LATE_S = REPLICA_REPORT_S * 1.5


def as_text(report: dict[str, Any]) -> str:
    """Return the report as lines and tables."""
    stale = report["stale_ms"]
    lines = [f"rift {report['rift']}, Python {report['python']}, in {report['data']}"]
    if disk := report.get("disk"):
        lines.append(f"disk      {disk['free_bytes'] >> 20} MiB free for {disk['folder']}")
    if "nats" in report:
        lines.append(
            f"log       nats-server {report['nats_server']} at {report['nats']}{_age(stale, 'nats')}"
        )
        lines += [
            f"broker    {name}: {state}{_age(stale, 'brokers')}" for name, state in report["brokers"].items()
        ]
    if "leader" in report:
        lines += _control_lines(report)
    for row in report.get("models", ()):
        if row["limit"]:
            lines.append(f"scaling   {row['model']}: {row['limit']}")
    if "models" in report:
        columns = ("model", "wanted", "ready", "starting", "draining", "queued", "running")
        speed = ("tokens_per_s", "ttft_p50_ms", "ttft_p99_ms")
        lines += ["", *_heading(stale, "models"), _table(report["models"], (*columns, *speed))]
    if report.get("replicas"):
        late_ms = 0 if "replicas" in stale else REPORT_LATE_S * 1000
        rows = [
            {name: value for name, value in row.items() if name != "silent_ms"}
            | {"report": _since(row["silent_ms"], late_ms)}
            for row in report["replicas"]
        ]
        lines += ["", *_heading(stale, "replicas"), _table(rows, tuple(rows[0]))]
    if report.get("metrics"):
        lines += ["", "metrics", _table(report["metrics"], ("role", "name", "address"))]
    if "streams" in report:
        rows = [
            row | {"MiB": row["bytes"] >> 20, "room MiB": row["room_bytes"] >> 20}
            for row in report["streams"]
        ]
        shown = ("stream", "MiB", "room MiB", "sequence", "behind", "behind_ms")
        lines += ["", *_heading(stale, "streams"), _table(rows, shown)]
    return "\n".join(lines)


def _control_lines(report: dict[str, Any]) -> Sequence[str]:
    leader, gateways = report["leader"], report["gateways"]
    lines = [
        f"control   {leader['control']} leads in epoch {leader['epoch']}" if leader else "control   no leader"
    ]
    if leader:
        lines.append(f"standbys  {', '.join(leader['standbys']) or 'none'}")
    if gateways is None:
        lines.append("gateways  unknown without a leader")
    else:
        late_ms = LANE_SILENT_S * 1000
        each = [f"{row['lane']} (last report {_since(row['silent_ms'], late_ms)})" for row in gateways]
        lines.append(f"gateways  {', '.join(each) or 'none'}")
    if shown := report["shards"]:
        each = [
            f"{row['shard']} (gateways: {row['gateways']})"
            if row["supervised"]
            else f"{row['shard']} (not supervised)"
            for row in shown
        ]
        lines.append(f"shards    {', '.join(each)}")
    return lines


def _since(ms: int, late_ms: float) -> str:
    return f"{ms / 1000:.1f} s ago{', stale' if ms > late_ms else ''}"


def _age(stale: Mapping[str, int], part: str) -> str:
    return f" (stale: {stale[part] / 1000:.0f} s old)" if part in stale else ""


def _heading(stale: Mapping[str, int], part: str) -> Sequence[str]:
    return [f"{part}{_age(stale, part)}"] if part in stale else []


def _table(rows: Sequence[dict[str, Any]], columns: tuple[str, ...]) -> str:
    return table(columns, [[row.get(column) for column in columns] for row in rows])
