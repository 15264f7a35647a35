"""A gateway that is started only to see whether its settings are good, beside those that serve."""

from __future__ import annotations

import asyncio

from crossdock.deploy.authority import Authority
from crossdock.deploy.members import certify
from crossdock.deploy.runtime import Launch, ProcessGone, Runtime, StartFailed
from crossdock.proto.errors import ConfigError


async def try_gateway(
    runtime: Runtime, launch: Launch, authority: Authority, timeout_s: float
) -> None:
    """Starts and ends it. `launch`: without the ports that others hold. Raises ConfigError saying
    why it does not start within `timeout_s`."""
    try:
        async with asyncio.timeout(timeout_s):
            process = await runtime.launch(launch)
            try:
                await certify(process, launch, authority)
                await process.start()
            finally:
                await process.stop()
    except TimeoutError:
        why = runtime.why_waiting(launch) or f"not ready in {timeout_s:g} s"
    except (StartFailed, ProcessGone) as error:
        why = str(error)
    else:
        return
    raise ConfigError("gateway", f"one with these settings does not start: {why}")
