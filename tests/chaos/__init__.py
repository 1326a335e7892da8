"""Faults at random points of a transfer, between real processes: see `python -m tests.chaos --help`."""
