"""OpenTelemetry spans from the log: pure functions of rows.

request_spans  the spans of one request
otlp           spans as OTLP/JSON
"""
