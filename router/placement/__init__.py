"""Which workers serve a request: pure functions over a view of the cluster."""
