"""Life-cycle events at the moment they happen, for tests that strike at them."""

from collections.abc import Callable

Listener = Callable[[str, str, str], object]  # event, who, detail

_listener: Listener | None = None


def listen(listener: Listener | None) -> None:
    """Has `listener` called at every event of this process from now on, on the thread it happens
    on, which goes on once the listener has returned. None: nobody listens."""
    global _listener
    _listener = listener


def emit(event: str, who: str, detail: str = "-") -> None:
    """An event in the life of `who`: a request, sequence, ticket (its id in hex) or worker."""
    if _listener is not None:
        _listener(event, who, detail)
