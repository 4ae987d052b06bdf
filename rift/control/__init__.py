"""The control process: the projector, and the answers it gives about what was projected."""
