"""The protocol: what is said in the log, and what it means. Imports nothing else of Rift."""
