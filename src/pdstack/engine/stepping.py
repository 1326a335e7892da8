"""The arithmetic of one step: copies, the forward pass, and the choice of the next tokens."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pdstack.engine.model import LlamaModel
from pdstack.engine.sampling import greedy, sample
from pdstack.engine.scheduler import Plan

__all__ = ["compute"]


def compute(plan: Plan, model: LlamaModel, pool: npt.NDArray[np.float32]) -> dict[int, int]:
    """Run the plan over `pool`; the next token by place in the plan, for those that wanted one."""
    for copies in plan.copies:
        pool[copies.targets] = pool[copies.sources]
    logits = model.forward(plan.segments, pool)
    wanting = [at for at, segment in enumerate(plan.segments) if segment.wants_logits]
    if not wanting:
        return {}
    for column, at in enumerate(wanting):
        sequence = plan.sequences[at]
        if sequence.generated < sequence.min_new and sequence.stop:
            logits[[token for token in sequence.stop if 0 <= token < logits.shape[0]], column] = -np.inf
    chosen = dict(zip(wanting, greedy(logits).tolist(), strict=True))
    for column, at in enumerate(wanting):
        sequence = plan.sequences[at]
        sampling = sequence.request.sampling
        if sampling.temperature:
            chosen[at] = sample(
                np.ascontiguousarray(logits[:, column]),
                temperature=sampling.temperature,
                top_p=sampling.top_p if sampling.top_p is not None else 1.0,
                top_k=max(0, sampling.top_k or 0),
                seed=sequence.seed,
                position=len(sequence.tokens),
            )
    return chosen
