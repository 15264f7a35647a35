"""Tools: what a request offers, how models write calls of them, and how clients read those."""
