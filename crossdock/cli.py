"""The `crossdock` command. What a command needs is imported when it runs, so that help is fast.

Every failure is one line on stderr, `error: …`, and exit code 1; a wrong command line is code 2.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from crossdock import cli_access, cli_bench, cli_cluster, cli_plan, cli_profile, cli_sim
from crossdock.cli_gateway import Authority, Certificate, Target, connect
from crossdock.proto.errors import CrossdockError, InvalidRequest, Overloaded
from crossdock.proto.settings import GATEWAY_ADDRESS

if TYPE_CHECKING:
    from crossdock.client import RequestFields
    from crossdock.results import Chunk, Result, ToolCall

app = typer.Typer(
    name="crossdock",
    help="Serve language models from a prefill pool and a decode pool, and talk to them.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
cli_cluster.register(app)
cli_access.register(app)
cli_bench.register(app)
cli_profile.register(app)
cli_plan.register(app)
cli_sim.register(app)

Model = Annotated[str, Option(help="Model name; the cluster's own when empty.")]
System = Annotated[str, Option(help="A system message before the conversation.")]
MaxTokens = Annotated[
    int | None,
    Option(min=1, help="Most tokens to generate; the rest of the context if unset."),
]
Temperature = Annotated[float | None, Option(help="0 is greedy; 1 if unset.")]
TopP = Annotated[float | None, Option(help="Nucleus: in (0, 1].")]
TopK = Annotated[int | None, Option(help="Only the k likeliest tokens; 0 is off.")]
MinP = Annotated[float | None, Option(help="Drop tokens below this share of the likeliest.")]
Seed = Annotated[int | None, Option(help="The same seed gives the same text.")]
Stop = Annotated[list[str] | None, Option(help="End before this text; may be repeated.")]
Timeout = Annotated[float | None, Option(help="Deadline of the request in seconds.")]
Tools = Annotated[
    Path | None, Option("--tools", help="A JSON list of tools, as OpenAI's clients write them.")
]
SAMPLING_OPTIONS = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        from crossdock import __version__

        print(f"crossdock {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def generate(
    context: typer.Context,
    prompt: Annotated[str, Argument(help="What to say; - reads it from standard input.")],
    target: Target = GATEWAY_ADDRESS,
    ca: Authority = "",
    cert: Certificate = "",
    model: Model = "",
    as_chat: Annotated[
        bool, Option("--chat/--raw", help="Through the chat template, or the text as it is.")
    ] = True,
    system: System = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
    stop: Stop = None,
    n: Annotated[int, Option("-n", "--n", help="How many continuations.")] = 1,
    ignore_eos: Annotated[bool, Option("--ignore-eos", help="Go on to --max-tokens.")] = False,
    stream: Annotated[bool, Option(help="Print tokens as they come.")] = True,
    as_json: Annotated[
        bool, Option("--json", help="Print text, tokens, usage and timings as JSON.")
    ] = False,
    timeout: Timeout = None,
) -> None:
    """Ask the cluster once and print the answer."""
    text = sys.stdin.read() if prompt == "-" else prompt
    fields: RequestFields = {"model": model, "n": n, "ignore_eos": ignore_eos}
    fields |= _sampling(context)
    if system and not as_chat:
        raise typer.BadParameter("--system needs the chat template: not with --raw")
    given: Any = [*_system(system), {"role": "user", "content": text}] if as_chat else text
    with connect(target, ca, cert) as client:
        if as_json or not stream or n != 1:
            _show_result(client.generate(given, timeout=timeout, **fields), as_json)
        else:
            for chunk in client.stream(given, timeout=timeout, **fields):
                print(chunk.text, end="", flush=True)
            print()


@app.command()
def chat(
    context: typer.Context,
    target: Target = GATEWAY_ADDRESS,
    ca: Authority = "",
    cert: Certificate = "",
    model: Model = "",
    system: System = "",
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
    tools: Tools = None,
    timeout: Timeout = None,
) -> None:
    """Talk with the model. /reset forgets what was said, /exit ends, Ctrl-C stops an answer. Where
    it calls tools, what you say next are their results, a line for each call."""
    fields: RequestFields = {"model": model, "tools": _tools(tools)}
    fields |= _sampling(context)
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  input() edits lines with it
    messages = _system(system)
    calls: list[ToolCall] = []  # that have no result yet
    with connect(target, ca, cert) as client:
        for said in _lines("> " if interactive else ""):
            if said == "/exit":
                return
            if said == "/reset":
                messages, calls = _system(system), []
                continue
            call = calls.pop(0) if calls else None
            messages.append(
                {"role": "user", "content": said}
                if call is None
                else {"role": "tool", "tool_call_id": call.id, "content": said}
            )
            if calls:
                continue
            try:
                answer, calls = _print_answer(client.stream(messages, timeout=timeout, **fields))
            except CrossdockError as error:
                if not interactive:
                    raise
                messages.pop()
                calls = [call] if call is not None else []
                print(f"error: {error}", file=sys.stderr)
            else:
                told = {"role": "assistant", "content": answer}
                messages.append(told | ({"tool_calls": list(calls)} if calls else {}))


def _lines(prompt: str) -> Iterator[str]:
    """What the user says, without empty lines, until the end of input."""
    while True:
        try:
            said = input(prompt).strip()
        except EOFError:
            return
        if said:
            yield said


def _tools(file: Path | None) -> Any:
    """The tools of a file. Raises InvalidRequest."""
    if file is None:
        return None
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidRequest("tools", str(file), f"must be a file of JSON: {error}") from None


def _print_answer(chunks: Iterator[Chunk]) -> tuple[str, list[ToolCall]]:
    """The answer and its calls, or as much of it as came before Ctrl-C, which has no calls; leaving
    the iterator cancels the rest."""
    said: list[str] = []
    calls: dict[int, ToolCall] = {}
    try:
        for chunk in chunks:
            said.append(chunk.text)
            print(chunk.text, end="", flush=True)
            for piece in chunk.tool_calls:
                before = calls.get(piece.index)
                whole = f"{before.arguments}{piece.arguments}" if before else piece.arguments
                calls[piece.index] = replace(before or piece, arguments=whole)
    except KeyboardInterrupt:
        chunks.close()  # type: ignore[attr-defined]
        calls.clear()
    finally:
        for call in calls.values():
            print(f"\n{call.name}({call.arguments})", end="")
        print(flush=True)
    return "".join(said), list(calls.values())


def _show_result(result: Result, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(result), indent=2, ensure_ascii=False))
        return
    for completion in result.completions:
        if len(result.completions) > 1:
            print(f"--- {completion.index}")
        print(completion.text)


def _system(words: str) -> list[dict[str, Any]]:
    return [{"role": "system", "content": words}] if words else []


def _sampling(context: typer.Context) -> RequestFields:
    """The options of the command line that say how tokens are drawn, where they were given."""
    given = {name: context.params.get(name) for name in SAMPLING_OPTIONS}
    return {name: value for name, value in given.items() if value is not None}  # type: ignore[return-value]


def main(arguments: list[str] | None = None) -> int:
    """Runs one command line (without the program's name); returns its exit code."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments, prog_name="crossdock", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # `crossdock … | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130)
    except Exception as error:
        if os.environ.get("CROSSDOCK_TRACEBACK"):
            raise
        return _fail(_words(error), getattr(error, "exit_code", 1))
    return code if isinstance(code, int) else 0


def _fail(words: str, code: int) -> int:
    print("error: " + " ".join(words.split()), file=sys.stderr)
    return code


def _words(error: Exception) -> str:
    """One line a user can act on. Command-line errors and failed calls bring their own words."""
    if hasattr(error, "format_message"):
        return str(error.format_message())
    if isinstance(error, Overloaded):
        return f"{error} (try again in {error.retry_after_s:g} s)"
    if isinstance(error, (CrossdockError, OSError)):
        return str(error) or type(error).__name__
    if "grpc" in sys.modules and isinstance(error, sys.modules["grpc"].RpcError):
        from crossdock.client import translate

        return str(translate(error))
    return f"{type(error).__name__}: {error} (CROSSDOCK_TRACEBACK=1 shows where)"


if __name__ == "__main__":
    sys.exit(main())
