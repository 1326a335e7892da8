#!/usr/bin/env bash
# The entry point of NVIDIA's images: says what the container is, then becomes the command.
printf '=== pdstack lab runtime: Dynamo, UCX and NIXL are real, the TensorRT-LLM engine is a stand-in ===\n'
[ $# -gt 0 ] || exec bash
exec "$@"
