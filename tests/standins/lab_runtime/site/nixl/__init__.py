"""The name under which Dynamo looks for NIXL's Python package; the package itself is nixl-cu12."""
