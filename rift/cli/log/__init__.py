"""The commands that read the whole log and the archive.

fresh_warehouse  the archive, and a temporary warehouse folded from it and the log
collector        sends spans to an OpenTelemetry collector

replay           replay --rebuild, --until, --digest; quarantine
verify           replay --verify
archive          archive verify
audit            audit export
spans            spans
backup           backup, restore
"""
