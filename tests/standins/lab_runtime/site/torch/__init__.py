"""As much of torch as `dynamo.trtllm` touches for text: names in annotations, and how many GPUs the container got."""

from __future__ import annotations

from torch import cuda as cuda


class Tensor:
    """Never made: this image has no tensors."""


class dtype:
    """Never made either."""
