"""A page in the browser, and an API, on this machine: python inference/app.py

python inference/app.py --preset tiny
python inference/app.py --add_user NAME users.txt
python inference/app.py --auth users.txt --host 0.0.0.0
"""

from __future__ import annotations

import argparse
import getpass
import os
import signal
import socket
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from core.commands.flags import Parser, dtype_name, home_path, run
from core.config.offloading import AUTO, OFFLOAD_NAMES
from core.config.presets import PRESETS
from core.devices import KINDS
from core.printable import say
from core.server.limits import Limits

if TYPE_CHECKING:
    from types import FrameType

    from starlette.types import ASGIApp

    from core.server.models import Models
    from core.server.service import Service

PORT = 7860
LOCAL = ("127.0.0.1", "localhost", "::1")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    group = parser.add_argument_group("server")
    group.add_argument(
        "--preset", choices=tuple(PRESETS),
        help="models to begin with (default: small-big where its weights are there, else the embedded tiny)",
    )  # fmt: skip
    group.add_argument("--port", type=int, default=PORT, help="0 takes any that is free")
    group.add_argument("--host", default="127.0.0.1", help="where to listen; 0.0.0.0: on all networks")
    group.add_argument("--output_dir", type=home_path, default="outputs/app", help="folder for the pictures")
    group.add_argument("--lora_dir", type=home_path, help="a folder of LoRAs that the page offers")
    group.add_argument("--models", type=home_path, help="the folder that stands for models/")
    group.add_argument("--device", help=f"{KINDS} (default: cuda where there is a GPU, else cpu)")
    group.add_argument("--dtype", type=dtype_name, help="bf16 or float32 (default: the configuration's)")
    group.add_argument("--offload", choices=OFFLOAD_NAMES, default=AUTO, help="where weights rest")
    group.add_argument("--int8", action="store_true", help="keep large weights as 8-bit integers")
    add_safety_flags(parser)
    return parser.parse_args(arguments)


def add_safety_flags(parser: argparse.ArgumentParser) -> None:
    """Who may ask, and for how much."""
    group = parser.add_argument_group("safety")
    group.add_argument(
        "--auth", type=home_path, metavar="FILE", help="users that --add_user wrote: page and API"
    )
    group.add_argument("--api_key_file", type=home_path, metavar="FILE", help="keys of the API, one a line")
    group.add_argument(
        "--add_user", nargs=2, metavar=("NAME", "FILE"), help="ask for a password, write it hashed, and stop"
    )
    group.add_argument(
        "--allow_host", action="append", default=[], metavar="NAME",
        help="another name of this server, such as a proxy's; once for each",
    )  # fmt: skip
    texts = {
        "side": "px of a picture's side", "steps": "steps of a pass", "pictures": "pictures of a job",
        "upload_mb": "millions of bytes of a picture that is sent", "upload_mp": "millions of its pixels",
        "jobs": "jobs of a client, waiting or running",
    }  # fmt: skip
    for field in fields(Limits):
        group.add_argument(f"--max_{field.name}", type=int, default=field.default, help=texts[field.name])


def main(given: list[str] | None = None) -> int:
    arguments = parse(given)
    if arguments.add_user is not None:
        return add_a_user(*arguments.add_user)
    limits = Limits(**{field.name: getattr(arguments, f"max_{field.name}") for field in fields(Limits)})
    listening = listen(arguments.host, arguments.port)
    if find_spec("gradio") is None:
        raise ValueError("the page needs the package gradio: pip install -e '.[app]', or make app")
    # These load torch and gradio, once the flags are read.
    from core.server.accounts import Accounts, Keys
    from core.server.outputs import Outputs
    from core.server.service import Service
    from core.server.site import build_site

    accounts = None if arguments.auth is None else Accounts.read(arguments.auth)
    keys = None if arguments.api_key_file is None else Keys(arguments.api_key_file)
    models = named_models(arguments)
    preset = arguments.preset or models.first()
    if (lacking := models.lacking(preset)) is not None:
        raise ValueError(lacking)
    service = Service(models, Outputs(arguments.output_dir), limits, preset)
    for sentence in warnings_of(arguments):
        say(f"warning: {sentence}", sys.stderr)
    # uvicorn raises the signal once more when it has ended, and what was sent must go then.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with TemporaryDirectory(prefix="ultrapixel-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # else all users of the machine share one folder
        site = build_site(service, arguments.host, arguments.allow_host, accounts, keys)
        say(f"{address(listening)} makes pictures with {preset}; the API: /docs; Ctrl-C ends it", sys.stdout)
        serve(site, listening, service)
    return 0


def serve(site: ASGIApp, listening: socket.socket, service: Service) -> None:
    """Serve until a signal ends it; clients are told before they are let go."""
    import uvicorn

    config = uvicorn.Config(
        site, log_level="warning", proxy_headers=False, server_header=False, timeout_graceful_shutdown=3
    )
    server = uvicorn.Server(config)
    end = server.handle_exit

    def close(number: int, frame: FrameType | None) -> None:
        service.close()
        end(number, frame)

    server.handle_exit = close
    server.run(sockets=[listening])


def add_a_user(name: str, file: str) -> int:
    """Ask for a password and write it; ValueError as `core.server.accounts.add_user`."""
    from core.server.accounts import add_user

    asked = sys.stdin.isatty()
    password = getpass.getpass(f"password for {name}: ") if asked else sys.stdin.readline().rstrip("\n")
    if asked and getpass.getpass("once more: ") != password:
        raise ValueError("the passwords differ: start anew")
    add_user(name, password, file)
    say(f"{name} is in {file}; start the server with --auth {file}", sys.stdout)
    return 0


def named_models(arguments: argparse.Namespace) -> Models:
    """The models that the flags name; ValueError for folders and devices that are not there."""
    from core.devices import device_named
    from core.server.models import Models

    folder = None if arguments.lora_dir is None else Path(arguments.lora_dir)
    if folder is not None and not folder.is_dir():
        raise ValueError(f"--lora_dir: {folder} is no folder")
    device_named(arguments.device)
    names = ("device", "models", "dtype", "offload", "int8")
    return Models({name: getattr(arguments, name) for name in names}, folder)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; ValueError where that is not possible."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        way = "--host" if isinstance(error, socket.gaierror) and 0 <= port < 65536 else "--port"
        raise ValueError(f"{host} port {port} cannot be listened at ({reason}): use another {way}") from None


def address(listening: socket.socket) -> str:
    """Where a browser finds it."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def warnings_of(arguments: argparse.Namespace) -> list[str]:
    """A sentence for everything that lets in more people than may be meant."""
    sentences = []
    if arguments.host not in LOCAL and arguments.auth is None:
        sentences.append(f"everybody who reaches {arguments.host} can make and see pictures: add --auth FILE")
    if arguments.api_key_file is not None and arguments.auth is None:
        sentences.append("--api_key_file covers the API alone, not the page: add --auth FILE")
    return sentences


if __name__ == "__main__":
    run(main)
