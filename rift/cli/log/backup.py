"""`rift backup` and `rift restore`: save a running installation, and make one from what was saved."""

import json
import os
import tomllib
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from rift.backup.broker import Target
from rift.backup.restore import Restored
from rift.backup.restore import restore as restore_backup
from rift.backup.save import CONTENT_KEYS_DAYS, Saved, Source, save
from rift.broker.roles import BACKUP
from rift.cli import signals
from rift.cli.arguments import Commands, add_command, add_config, natural, positive
from rift.cli.connection import connected, installation, settings_file
from rift.cli.output import positions, utc_time
from rift.data_dir import DataDir


def add_parser(commands: "Commands[ArgumentParser]") -> None:
    new = add_command(commands, "backup", backup, "save the running installation to a folder")
    new.add_argument(
        "folder",
        type=Path,
        metavar="BACKUP",
        help="an empty folder, or one with an earlier backup of this installation, which is replaced",
    )
    new.add_argument(
        "--content-keys-days",
        type=natural,
        default=CONTENT_KEYS_DAYS,
        metavar="N",
        help="after this time, a restore leaves out the keys of sealed content, so that erased content stays "
        f"erased (default: {CONTENT_KEYS_DAYS})",
    )
    add_config(new)
    again = add_command(commands, "restore", restore, "make a new installation from a backup", has_json=False)
    again.add_argument("folder", type=Path, metavar="BACKUP", help="the folder that `rift backup` wrote to")
    again.add_argument(
        "--archive",
        type=Path,
        metavar="DIR",
        help="the lost installation's archive, if it survived: its billing facts since the backup are kept",
    )
    again.add_argument(
        "--shard",
        type=natural,
        default=0,
        metavar="N",
        help="the shard for new requests, if earlier ones were opened after the backup (default: the next)",
    )
    again.add_argument(
        "--log-replicas",
        type=positive,
        metavar="N",
        help="copies of the log in a broker of your own (default: as log_replicas in the backup)",
    )


def backup(options: Namespace) -> None:
    async def run() -> Saved:
        async with connected(options, "backup", BACKUP) as log:
            source = Source(log, installation(options), settings_file(options))
            return await save(source, options.folder, content_keys_days=options.content_keys_days)

    saved = signals.run(run)
    made = saved.manifest
    if options.json:
        print(
            json.dumps(
                {
                    "positions": made.positions,
                    "archived": made.archived,
                    "created_at_ns": made.created_at_ns,
                    "content_keys_until_ns": made.content_keys_until_ns,
                    "written_bytes": saved.written_bytes,
                    "segment_files": saved.segment_files,
                }
            )
        )
        return
    print(f"saved up to {positions(made.positions)}")
    print(
        f"{saved.written_bytes / 1e6:.1f} MB written, {saved.segment_files} new files of the archive; "
        f"{options.folder} is complete"
    )
    print(f"a restore after {utc_time(made.content_keys_until_ns)} leaves out the keys of sealed content")


def restore(options: Namespace) -> None:
    installed = DataDir(options.data)
    is_external = options.nats or os.environ.get("RIFT_NATS_URL")
    address = installed.log_address(options.nats, os.environ) if is_external else None
    target = Target(installed, address, options.log_replicas)

    async def run() -> Restored:
        return await restore_backup(
            options.folder, target, print, surviving=options.archive, shard=options.shard
        )

    for line in summary(signals.run(run), target):
        print(line)


def _of_the_broker(file: Path) -> list[str]:
    """Return the settings in a restored file that depend on the broker."""
    stated = tomllib.loads(file.read_text()) if file.exists() else {}
    return [name for name in ("fleet", "log_replicas", "replicas", "nats_monitor") if name in stated]


def summary(restored: Restored, target: Target) -> Iterator[str]:
    """Yield what an operator must know about a restore."""
    made = restored.manifest
    continued = restored.continued
    yield f"restored the backup of {utc_time(made.created_at_ns)}, up to {positions(made.positions)}"
    if records := continued.filled.records:
        ends = {stream: made.positions[stream] + count for stream, count in records.items()}
        yield f"the archive reaches further, to {positions(ends)}: without prompts and answers"
    if continued.ended:
        yield f"{continued.ended} requests that ran are failed, without a charge"
    if continued.filled.erased:
        yield f"{continued.filled.erased} contents that were erased after the backup are erased again"
    if not restored.has_content_keys:
        yield (
            f"the keys of sealed content are left out, since {utc_time(made.content_keys_until_ns)} is past: "
            "sealed prompts and answers from before cannot be read"
        )
    yield f"new requests go to shard {continued.shard}; the ids of lost requests answer 404"
    if names := _of_the_broker(target.installation.folder / "rift.toml"):
        yield f"{', '.join(names)} in rift.toml may not fit the new broker: adjust them before the start"
    if target.address is None:
        yield f"start it with: rift up --data {target.installation.folder}"
    else:
        yield f"start its processes with --data {target.installation.folder} and --nats {target.address.url}"
