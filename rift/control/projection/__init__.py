"""The projection of the log into the warehouse.

projector       follows the streams and applies batches
warehouse_host  owns the warehouse file: opens, rebuilds and replaces it
disk_watch      notes what a full or read-only disk refuses
catch_up        folds what was stored while nothing ran
continuity      checks that the log continues the archive and the database
acceptances     the newest acceptances of a shard, by which a start knows its log
key_continuity  checks that the idempotency keys of a day are still stored
time_travel     folds up to a position in the past
"""
