"""Tries grammars for a gateway, in a process of its own: compiling one cannot be interrupted, and a
few lines of schema can ask for minutes and gigabytes.

    python -m crossdock.model.grammar_process MODEL HOME

Says one line when the model's tokens are there, then answers each line, a JSON list of a kind and a
text, with a JSON text: why the grammar is refused, empty where it is not. A grammar beyond the
limits ends the process.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from pathlib import Path

from crossdock.model.grammar import GrammarCompiler
from crossdock.model.store import resolve
from crossdock.model.text import load_text
from crossdock.proto.errors import InvalidRequest
from crossdock.proto.types import Grammar, GrammarKind

CPU_S = 2  # of one grammar
MEMORY_BYTES = 512 << 20  # of all that is kept, beyond the tokenizer


def main(model: str, home: str) -> None:
    """Answers until its input ends."""
    sys.setrecursionlimit(10_000)  # nesting is llguidance's to refuse
    files = resolve(model, Path(home), any_family=True)
    compiler = GrammarCompiler(load_text(files))
    assert compiler.tokenizer is not None
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY_BYTES, hard))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        kind, text = json.loads(line)
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + CPU_S, hard))
        print(json.dumps(refused(compiler, Grammar(GrammarKind(kind), text))), flush=True)


def refused(compiler: GrammarCompiler, grammar: Grammar) -> str:
    """Why it cannot be used; empty where it can."""
    try:
        compiler.matcher(grammar)
    except InvalidRequest as error:
        return error.limit
    except RecursionError:
        return "is nested too deeply"
    return ""


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main(*sys.argv[1:])
