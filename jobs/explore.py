"""`corpuscope explore`: the explorer's pages on this machine, for as long as the command runs.

Invariant: it listens on the loopback address alone.
"""

from __future__ import annotations

import signal

import click

from jobs.arguments import POSITIVE
from jobs.output import message, uris
from sae_runtime.errors import InputError

HOST = "127.0.0.1"
PORT = 8642


@click.command()
@click.argument("index")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=PORT, show_default=True, help="0: any free one."
)
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=POSITIVE,
    default=30.0,
    show_default=True,
    help="What a page's queries may take.",
)
@click.option("--model", metavar="URI", help="Where the model is, if it is not where it was scanned.")
@click.option(
    "--saes", "suites", multiple=True, metavar="URI", help="Where the SAEs' suites are, if they moved."
)
@click.option("--no-model", is_flag=True, help="Run no model: no texts of one's own.")
def explore(
    index: str, port: int, timeout: float, model: str | None, suites: tuple[str, ...], no_model: bool
) -> None:
    """A local web page over INDEX, also while a scan adds to it."""
    try:
        import starlette  # noqa: F401
        import uvicorn
        import vl_convert  # noqa: F401
    except ImportError as error:
        raise InputError(f"explore: {error.name} is missing; pip install 'corpuscope[explore]'") from None
    import socket

    from pipelines.reading import Reader
    from pipelines.status import status
    from queries.explorer.app import application
    from queries.explorer.session import Outside, open_session

    reader = None if no_model else Reader(model, suites)
    session = open_session(uris(index), Outside(status, reader), seconds=timeout)
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
    except OSError as error:
        raise InputError(f"--port {port}: {error.strerror}; --port 0 takes a free one") from None
    listening.listen()  # so that the address is not told before it answers
    message(f"http://{HOST}:{listening.getsockname()[1]}/  (Ctrl-C ends it)")
    server = uvicorn.Server(
        uvicorn.Config(
            application(session),
            log_level="warning",
            access_log=False,
            server_header=False,
            http="h11",
            h11_max_incomplete_event_size=1 << 18,
        )  # texts and SQL stand in addresses
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)  # which the server, once it has closed, raises again
    server.run(sockets=[listening])


def _end(number: int, frame: object) -> None:
    raise SystemExit(0)
