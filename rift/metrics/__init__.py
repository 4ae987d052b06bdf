"""Prometheus metrics: what a process counts, and a listener that shows it. Nothing in Rift reads them back.

No other folder imports prometheus_client. A role counts in `families`, and hands them to `listener.serving`.

control    the metrics of a control process
worker     the metrics of a worker
engine     those of vLLM in it
address    where a role serves its metrics
families   counts, histograms and figures that are read at a scrape
listener   `/metrics` on an address of its own
"""
