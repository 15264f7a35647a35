"""A profile of a running cluster: shaped requests, what they took, and the fit of it."""
