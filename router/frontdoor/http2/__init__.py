"""HTTP/2 (RFC 9113) and gRPC on it, for the front door: a token costs one frame in a buffer, and a
step's tokens of all streams of a connection one write."""
