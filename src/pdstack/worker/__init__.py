"""The Dynamo worker process: joins the engine and the transfer agent to Dynamo's request plane.

Start it with `python -m pdstack.worker --config FILE`.
"""

from __future__ import annotations
