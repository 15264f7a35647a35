"""How many workers each pool should have: pure functions, the clock and all observations passed in.

The controller and the simulator call the same `autoscale`. No Ray, no gRPC, no torch, no I/O.
"""
