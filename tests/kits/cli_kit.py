"""The command line, called in this process."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from crossdock.cli import main
from crossdock.deploy import admin


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def fake_admin(monkeypatch: pytest.MonkeyPatch, **functions: Callable[..., Any]) -> None:
    """Fakes that take what the real functions take, so that a wrong call still fails."""
    for name, function in functions.items():
        real = inspect.signature(getattr(admin, name))

        def checked(*args: Any, _real: Any = real, _do: Any = function, **named: Any) -> Any:
            bound = _real.bind(*args, **named)
            bound.apply_defaults()
            return _do(**bound.arguments)

        monkeypatch.setattr(admin, name, checked)
