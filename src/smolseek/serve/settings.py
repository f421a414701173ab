"""The options of a server. Imports no torch."""

import ipaddress
from dataclasses import dataclass

from smolseek.config import option


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of a server."""

    host: str = "127.0.0.1"
    """Address to listen at. An address that other machines reach needs --api-key or --no-auth."""
    port: int = option(8000, least=0, most=65535)
    """Port to listen at; 0 takes any free port."""
    api_key: str | None = None
    """Key that clients must send; better in the variable SMOLSEEK_API_KEY, because other users see a command line."""
    no_auth: bool = False
    """Let everybody in who reaches --host."""
    allowed_host: tuple[str, ...] = ()
    """Further names of this server, as they stand in the header Host."""
    allowed_origin: tuple[str, ...] = ()
    """Web pages that may use this server, such as https://chat.example.org."""
    max_sequences: int = option(32, least=1, most=512)  # MAX_BATCH in generate/cpu_decode.py
    """Largest number of texts that are written at the same time."""
    cache_tokens: int = option(32_768, least=64)
    """Number of tokens in the cache, for all requests together. The memory is allocated once."""
    max_queue: int = option(256, least=1)
    """Largest number of waiting texts; further requests get the status 429."""
    max_tokens: int = option(1024, least=1)
    """Largest number of new tokens of a request that does not set max_tokens."""
    timeout: float = option(600.0, above=0, may_be_infinite=True)
    """Seconds after which a request ends, with the text so far."""
    drain: float = option(30.0, least=0, may_be_infinite=True)
    """Seconds that running requests may take to end after SIGTERM or Ctrl-C."""
    log_prompts: bool = False
    """Print the prompts of requests. Without this option, no text of a request is printed."""


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches the address or name `host`."""
    name = host.strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
