"""Backends: how tasks reach clients. What a client does with one stands in ``client.py`` and is the same everywhere."""
