"""gRPC over HTTP/2 of our own, what both ends share: frames (RFC 9113), header compression (RFC
7541); and the end that calls. The end that serves is the front door's."""
