"""The engine behind the interface."""
