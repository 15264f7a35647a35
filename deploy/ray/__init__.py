"""All that speaks to Ray, and the settings that Ray reads when it is imported, so they are made
here. What the user set stays as it is."""

from __future__ import annotations

import os
from pathlib import Path

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_worker_niceness": "0",  # Ray's own 15 starves workers beside anything else
    # The controller tells of lost workers itself; signals are for `crossdock up` to handle.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed",
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
}

for _name, _value in SETTINGS.items():
    os.environ.setdefault(_name, _value)

# Ray clusters ask for the token that Ray keeps here; without the mode Ray would not show it to
# a cluster that is joined by its address.
if (Path.home() / ".ray" / "auth_token").exists() or "RAY_AUTH_TOKEN" in os.environ:
    os.environ.setdefault("RAY_AUTH_MODE", "token")
