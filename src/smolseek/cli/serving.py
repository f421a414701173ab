"""Command `smolseek serve`, an HTTP server with OpenAI's interface."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from smolseek import console
from smolseek.cli.arguments import parse
from smolseek.cli.writing import ModelArgs
from smolseek.errors import SmolseekError
from smolseek.serve.settings import Settings, is_loopback

VARIABLE = "SMOLSEEK_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServeArgs(ModelArgs, Settings):
    """Serve a model over HTTP, with the interface of OpenAI, for one machine or a trusted network.

    docs/serving.md has examples. SIGTERM or Ctrl-C lets the running requests end.
    """


def serve(argv: Sequence[str]) -> None:
    """Carry out `smolseek serve MODEL`. Needs the extra `serve`."""
    args = _with_key(parse(ServeArgs, "serve", argv))
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        message = f"smolseek serve needs {error.name}: install it with pip install 'smolseek[serve]'"
        raise SmolseekError(message) from None
    import asyncio

    from smolseek.serve.server import Server, bind, url

    listener = bind(args)
    model = args.load()
    server = Server(model, args, listener)
    address = url(listener)
    console.say(f"{server.service.name} ({model.number_format}): {address}/v1, playground {address}/, {address}/docs")
    console.say(f"cache of {args.cache_tokens:,} tokens, {server.cache_bytes / 1e6:,.0f} MB; Ctrl-C ends the server")
    asyncio.run(server.run())
    console.say("stopped")


def _with_key(args: ServeArgs) -> ServeArgs:
    """Return the arguments with the API key of the environment.

    Raises:
        SmolseekError: if other machines would reach the server without a key.
    """
    if args.api_key is not None and args.no_auth:
        raise SmolseekError("--api-key and --no-auth contradict each other: give only one of them")
    key = None if args.no_auth else args.api_key or os.environ.get(VARIABLE)
    if key is not None and (not key.strip() or key != key.strip()):
        raise SmolseekError(f"the API key in {VARIABLE} is empty or has spaces around it: correct it")
    if key is None and not args.no_auth and not is_loopback(args.host):
        raise SmolseekError(
            f"--host {args.host} lets other machines in: give --api-key KEY (or {VARIABLE}), or --no-auth to let "
            "everybody in"
        )
    return replace(args, api_key=key)
