"""The store's document in Ray's own tables, where every node of the Ray cluster finds it."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import RayError

from crossdock.proto.errors import Unavailable

NAMESPACE = b"crossdock"
PATIENCE_S = 2.0  # for Ray's GCS to answer: the controller stands still meanwhile


class GcsMirror:
    """A store.Mirror in the key-value table of Ray's GCS, which the controller's own arguments and
    those of every worker, keys among them, are in as well."""

    def __init__(self, cluster: str) -> None:
        self._entry = f"clusters/{cluster}".encode()

    def load(self) -> bytes:
        """The document; empty where there is none. Raises Unavailable, as all of these do."""
        return self._ask("internal_kv_get") or b""

    def save(self, document: bytes) -> None:
        """In place of the one before."""
        self._ask("internal_kv_put", document, True)

    def end(self) -> None:
        """Forgets it."""
        self._ask("internal_kv_del", False)

    def _ask(self, call: str, *arguments: object) -> Any:
        worker: Any = ray._private.worker.global_worker
        try:
            return getattr(worker.gcs_client, call)(
                self._entry, *arguments, namespace=NAMESPACE, timeout=PATIENCE_S
            )
        except (RayError, AttributeError) as error:
            raise Unavailable(f"Ray's GCS does not keep the cluster's state: {error}") from None
