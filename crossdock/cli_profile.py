"""The command that measures a running cluster: profile."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from crossdock.cli_files import in_folder
from crossdock.cli_gateway import Authority, Certificate
from crossdock.proto.settings import CONTROLLER_ADDRESS, GATEWAY_ADDRESS
from crossdock.tables import console_of, table

if TYPE_CHECKING:
    from crossdock.profiling.session import Profiled


def register(app: typer.Typer) -> None:
    """Adds `crossdock profile` to the command line."""
    app.command()(profile)


def profile(
    target: Annotated[
        str, Option(envvar="CROSSDOCK_TARGET", help="The gateway's gRPC address, host:port.")
    ] = GATEWAY_ADDRESS,
    address: Annotated[
        str, Option(envvar="CROSSDOCK_ADMIN", help="The controller's address, host:port.")
    ] = CONTROLLER_ADDRESS,
    out: Annotated[
        Path | None,
        Option(
            callback=in_folder,
            help="Write the profile to this file, as crossdock sim --profile reads it.",
        ),
    ] = None,
    seconds: Annotated[
        float, Option(min=5, help="How long to measure for, about; links come on top.")
    ] = 60.0,
    model: Annotated[str, Option(help="Model name; the cluster's first when empty.")] = "",
    ca: Authority = "",
    cert: Certificate = "",
    credential: Annotated[
        Path | None,
        Option(
            envvar="CROSSDOCK_CREDENTIAL",
            help="The operator's credential; the one that CROSSDOCK_HOME has if unset.",
        ),
    ] = None,
) -> None:
    """Measure what steps, links and starts take in a running, idle cluster.

    Prints the profile, to simulate that cluster with or to plan one, and how well it fits.
    """
    from crossdock.client import Tls
    from crossdock.profiling.session import profile_cluster, to_yaml

    tls = Tls(ca, cert) if ca or cert else None
    found = asyncio.run(profile_cluster(target, address, seconds, model, tls, credential, _say))
    _show(found)
    text = to_yaml(found, address)
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _show(found: Profiled) -> None:
    console = console_of(stderr=True)
    console.print(table("profile", ("term", "value"), asdict(found.profile).items(), ("value",)))
    kinds = (("prefill", found.fit.prefill), ("decode", found.fit.decode))
    rows = [(k, each.count, f"{each.median:.1%}", f"{each.p90:.1%}") for k, each in kinds]
    figures = ("measured", "median error", "p90")
    console.print(table("the fit", ("steps", *figures), rows, figures))
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
