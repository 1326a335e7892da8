"""Scenarios for the Ansible roles, one a role, on one systemd container; `python -m tests.molecule` runs them."""
