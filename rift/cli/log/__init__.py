"""The commands that read the whole log and the archive.

fresh_warehouse  the archive, and a temporary warehouse folded from it and the log

replay           replay --rebuild, --until, --digest; quarantine
verify           replay --verify
archive          archive verify
audit            audit export
"""
