"""Gateways: the front door, the dispatcher behind it, and placement."""
