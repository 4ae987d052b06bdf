"""What follows from the log: facts, bills, latency and decisions. Appends nothing, calls no model."""
