"""Attention over the paged KV pool: torch everywhere, numba on CPUs."""
