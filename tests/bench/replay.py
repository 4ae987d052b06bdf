"""The rebuild from the archive, compared with DuckDB's `create table as select` of the same Parquet.

Each runs in its own process with the same memory limit, and ends once its file is written. Peak memory is the
process's largest resident set. Then the log is folded (`projection.py`).
"""

import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import duckdb

from replay.archive import parquet
from replay.archive.archive import Archive
from replay.warehouse.rebuild import rebuild
from tests.bench import archived, figures, projection


class Options(NamedTuple):
    """`requests` of the archive, and of the log."""

    requests: int
    log_requests: int
    rounds: int


def run(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="rift-bench-") as name:
        folder = Path(name) / "archive"
        folder.mkdir()
        began = time.monotonic()
        archive = archived.write(folder, options.requests, say)
        say(f"wrote the archive in {time.monotonic() - began:.0f} s")
        rows = []
        for number in range(options.rounds):
            table = _apart(_table, folder, Path(name) / f"table-{number}")
            whole = _apart(_rebuild, folder, Path(name) / f"warehouse-{number}")
            rows.append({"table": table, "rebuild": whole, "ratio": whole["seconds"] / table["seconds"]})
            say(f"table {table['seconds']:.1f} s, rebuild {whole['seconds']:.1f} s")
        log = projection.run(options.log_requests, say)
        manifests = [m for stream in archive.streams() for m in archive.manifests(stream)]
        return {
            "machine": figures.machine(),
            "requests": options.requests,
            "events": sum(manifest.events for manifest in manifests),
            "records": sum(manifest.records for manifest in manifests),
            "segments": len(manifests),
            "parquet_bytes": sum(file.bytes for manifest in manifests for file in manifest.files.values()),
            "rows": rows,
            "log": log,
            "ratios": {
                "rebuild_s": min(row["rebuild"]["seconds"] for row in rows),
                "table_s": min(row["table"]["seconds"] for row in rows),
                "rebuild_per_table": min(row["ratio"] for row in rows),
                "peak_bytes": max(row["rebuild"]["peak_bytes"] for row in rows),
                "log_events_per_s": log["events_per_s"],
                "lag_p99_ms": log["answered_p99_ms"],
            },
        }


def _apart(work: Callable[[Path, Path], None], folder: Path, path: Path) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply(_timed, (work, folder, path))
    path.unlink()
    return result


def _timed(work: Callable[[Path, Path], None], folder: Path, path: Path) -> dict[str, Any]:
    began = time.monotonic()
    work(folder, path)
    seconds = time.monotonic() - began
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak_bytes": peak_bytes, "bytes": path.stat().st_size}


def _table(folder: Path, path: Path) -> None:
    with duckdb.connect(str(path), config={"memory_limit": parquet.MEMORY_MAX}) as connection:
        # DuckDB takes a process of multiprocessing for interactive and would show a progress bar.
        connection.execute("set enable_progress_bar = false")
        for name in ("records", "events"):
            files = f"{folder}/{archived.STREAM}/*.{name}.parquet"
            connection.execute(f"create table {name} as from read_parquet('{files}')")


def _rebuild(folder: Path, path: Path) -> None:
    rebuild(Archive(folder, key=b"bench"), path)
