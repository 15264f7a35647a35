"""The hand-off of KV blocks: tickets, leases, the fence, and the transports below them."""
