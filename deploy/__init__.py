"""The control plane: spec, reconcile, controller, actors, telemetry."""
