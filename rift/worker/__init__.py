"""The worker: one engine of one model, fed from the log and answering through it."""
