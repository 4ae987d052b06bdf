"""The archive: segments of the log, sealed in Parquet and chained by hashes.

archive   seals, reads and verifies segments
folder    lists the segments
manifest  a segment's manifest and its files
parquet   a segment's Parquet files
signatures  what control signs: segments, closed months
"""
