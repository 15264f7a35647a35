"""The decode role: pulls offered KV and generates."""
