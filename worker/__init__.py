"""What both roles share: the engine loop, the gRPC service, peers, metrics."""
