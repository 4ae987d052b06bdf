"""Backups of an installation that runs, and restores into a new data folder.

manifest      what a backup consists of, with the digest of each file
files         durable copies with digests
streams       snapshots of streams, and streams from snapshots
archives      copies of archives
save          makes a backup, or brings an earlier one up to date
restore       makes a data folder from a backup
broker        the broker that a log is restored into
continuation  completes a restored log, and opens a shard for new requests
gap           appends what only the archive holds
unfinished    ends the requests that ran, and moves claims of idempotency keys to the new shard
"""
