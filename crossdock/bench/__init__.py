"""Load generation against any endpoint: traces, requests, metrics, reports."""
