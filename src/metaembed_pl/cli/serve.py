"""`python -m metaembed_pl serve`: a local page and JSON API over a store.

    python -m metaembed_pl serve --model runs/emoji/model --store shelf

Needs no internet access, and listens only on this machine by default. It prints its address;
Ctrl-C stops it.
"""

import argparse
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from metaembed_pl.cli.model import add_model_arguments, load_model
from metaembed_pl.errors import UserError

if TYPE_CHECKING:
    import socket

    from metaembed_pl.serving.service import Service

CONNECTIONS_AT_MOST = 64
LEFT_S = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the verb."""
    add = parser.add_argument
    add_model_arguments(parser)
    add("--store", type=Path, required=True, metavar="FOLDER", help="a store made by `embed`")
    add(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default: 127.0.0.1, this machine only)",
    )
    add(
        "--port",
        type=int,
        default=8000,
        metavar="N",
        help="port to listen on; 0: any free port (default: 8000)",
    )
    add(
        "--pictures",
        type=Path,
        action="append",
        metavar="FOLDER",
        help="show original images from this folder, if items were made from them; repeatable",
    )
    add(
        "--allow-host",
        action="append",
        metavar="NAME",
        help="another host name of this machine, such as that of a proxy",
    )
    add(
        "--log-queries",
        action="store_true",
        help="log text queries in the store's folder; search plans are then measured with them",
    )
    add(
        "--max-upload",
        type=float,
        default=10,
        metavar="MB",
        help="largest image in MB (default: 10)",
    )


def run(args: argparse.Namespace) -> None:
    """Serve until interrupted."""
    if not 0 <= args.port < 2**16:
        raise UserError(f"--port must be between 0 and {2**16 - 1}, got {args.port}")
    if not 0 < args.max_upload <= 1000:
        raise UserError(f"--max-upload must be above 0 and at most 1000 MB, got {args.max_upload}")
    try:
        import uvicorn

        from metaembed_pl.serving.app import make_app
        from metaembed_pl.serving.guard import LOOPBACK
    except ImportError as error:
        raise UserError(f"serve needs {error.name}: pip install 'metaembed-pl[serve]'") from error
    listener = _listen(args.host, args.port)
    with listener:
        with redirect_stdout(sys.stderr):
            service = _service(args)
        host, port = listener.getsockname()[:2]
        hosts = {*(args.allow_host or ()), args.host}
        if _is_loopback(host):
            hosts |= LOOPBACK
        elif not args.allow_host:
            hosts = None
        app = make_app(service, hosts)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=CONNECTIONS_AT_MOST,
            timeout_graceful_shutdown=LEFT_S,
        )
        _print_address(args, host, port, len(service.store))
        # uvicorn closes its connections, and then raises the interrupt.
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


def _service(args: argparse.Namespace) -> "Service":
    from metaembed_pl.retrieval.store import Store

    store = Store.open(args.store)  # before the model, which takes seconds

    from metaembed_pl.retrieval.calibration import needs_measuring
    from metaembed_pl.serving.service import Service

    model = load_model(args, store)
    max_upload_bytes = int(args.max_upload * 1e6)
    service = Service(model, args.store, args.pictures or (), max_upload_bytes, args.log_queries)
    if service.measuring.calibration(store) is None and needs_measuring(store):
        service.measuring.start(service.store)  # searches are exact until it is done
    return service


def _listen(host: str, port: int) -> "socket.socket":
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"cannot listen at {host}, port {port} ({error.strerror or error}): choose another "
            "--port, or an address of this machine as --host"
        ) from error


def _is_loopback(address: str) -> bool:
    import ipaddress

    return ipaddress.ip_address(address).is_loopback


def _print_address(args: argparse.Namespace, host: str, port: int, num_items: int) -> None:
    shown = f"[{host}]" if ":" in host else host
    if not _is_loopback(host):
        print(
            f"warning: anyone who can reach {shown}:{port} can search {args.store} and see its "
            "pictures; there is no password",
            file=sys.stderr,
        )
    print(
        f"serving {args.store} ({num_items:,} items) at http://{shown}:{port} - Ctrl-C to stop",
        flush=True,
    )
