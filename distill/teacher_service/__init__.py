"""A teacher over HTTP: requests of many clients merged into packs, the score store behind them."""

NEEDED = {
    "fastapi": "fastapi",
    "msgpack": "msgpack",
    "prometheus_client": "prometheus-client",
    "uvicorn": "uvicorn",
}
"""Modules that the service takes, and the packages that bring them."""
