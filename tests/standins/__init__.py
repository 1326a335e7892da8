"""Stand-ins for what only a GPU host has; README.md says how they are used."""
