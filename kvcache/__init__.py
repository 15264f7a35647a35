"""Sequences and who owns their KV blocks: pool, tables, prefix cache. Imports no torch."""
