"""Call a worker's endpoint as the frontend does, with any request: `direct_call.py NAMESPACE COMPONENT` < request.json.

Prints {"items": [...], "error": text or null}. The environment names etcd and NATS.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from dynamo.runtime import Context, DistributedRuntime


async def main() -> dict[str, Any]:
    request = json.load(sys.stdin)
    runtime = DistributedRuntime(asyncio.get_running_loop(), "etcd", False)
    client = await runtime.namespace(sys.argv[1]).component(sys.argv[2]).endpoint("generate").client()
    await client.wait_for_instances()
    request_id = request.pop("request_id")
    while True:
        items: list[Any] = []
        try:
            stream = await client.direct(
                request, client.instance_ids()[0], annotated=False, context=Context(request_id)
            )
            async for item in stream:
                items.append(item)
        except Exception as problem:
            # A fresh client lists an instance a moment before it can call it.
            if "not found for endpoint" in str(problem):
                await asyncio.sleep(0.02)
                continue
            return {"items": items, "error": str(problem)}
        return {"items": items, "error": None}


result = asyncio.run(main())
sys.stdout.write(json.dumps(result) + "\n")
sys.stdout.flush()
os._exit(0)
