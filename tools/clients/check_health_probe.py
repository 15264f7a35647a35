"""grpc_health_probe, as Kubernetes runs it: no key is needed."""

from __future__ import annotations

from checking import CA, GRPC, check, command, run


@check
def serving() -> None:
    """the server's health"""
    words = ("grpc_health_probe", f"-addr={GRPC}", "-tls", f"-tls-ca-cert={CA}")
    assert command(*words) is not None
    assert command(*words, "-service=crossdock.v1.Inference") is not None


if __name__ == "__main__":
    run()
