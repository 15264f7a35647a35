"""The control plane: spec, reconcile, controller, Ray's actors, telemetry."""
