"""Owns each request from received to finished: admission, hand-offs, links to workers."""
