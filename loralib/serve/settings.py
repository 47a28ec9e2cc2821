"""The settings of a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from ..bases.device import DTYPES
from ..bases.quant import KINDS
from ..settings import check, setting, settings_class

__all__ = ["ServeConfig"]


@settings_class
@dataclass(frozen=True)
class ServeConfig:
    """What is served, where, and with which limits.

    Raises:
        ConfigError: one or more settings are invalid; the message lists all of them.
    """

    model: str | None = setting(None, "base model: a name or path (default: the adapters', else smollm2-135m)", "model",
                                aliases=("base",), common=True)  # fmt: skip
    adapter: Sequence[str] = setting((), "an adapter to load, as NAME=DIR; may be repeated", "model",
                                     several="repeat", common=True)  # fmt: skip
    adapters: str | None = setting(
        None, "directory of adapters: all are loaded, and it is the only place to load more from at run time", "model",
        common=True,
    )  # fmt: skip
    dtype: str = setting("auto", "dtype of the base model; auto uses bf16 where it is fast", "model", DTYPES)
    device: str | None = setting(None, "cpu, cuda, mps, ... (default: the fastest available)", "model")
    quantize: str = setting("none", "store the base's weights in fewer bits: int8 or nf4", "model",
                            ("none", *KINDS))  # fmt: skip
    chat_template: str | None = setting(None, "file with a chat template (Jinja), for a base without one", "model")
    host: str = setting(
        "127.0.0.1", "address to listen on; 0.0.0.0: reachable from other machines", "network", common=True
    )
    port: int = setting(8000, "port to listen on; 0: any that is free", "network", at_least=0, at_most=65535,
                        common=True)  # fmt: skip
    api_key: Sequence[str] = setting((), "a key that clients must send; may be repeated", "network", several="repeat",
                                     expected="non-empty keys")  # fmt: skip
    allow_origin: Sequence[str] = setting(
        (), "an origin such as https://example.com whose pages may use the server; may be repeated", "network",
        several="repeat", expected="origins such as https://example.com",
    )  # fmt: skip
    state_dir: str = setting("loralib-serve", "directory for uploaded files, jobs and their adapters", "jobs",
                             common=True)  # fmt: skip
    page: bool = setting(True, "serve the web page at /", "network")
    max_requests: int = setting(64, "number of requests computed together; others wait", "limits", at_least=1)
    max_waiting: int = setting(
        256, "number of requests that may wait; any more are refused with 429", "limits", at_least=0
    )
    max_tokens: int = setting(4096, "maximum number of new tokens that a request may ask for", "limits", at_least=1)
    max_choices: int = setting(
        32, "maximum number of texts that a request may ask for: prompts times n", "limits", at_least=1
    )
    max_seconds: float = setting(600.0, "maximum seconds that a request may take", "limits", above=0)
    grace_seconds: float = setting(30.0, "seconds that running requests have to finish when the server is stopped",
                                   "limits", at_least=0)  # fmt: skip
    max_body_mb: float = setting(8.0, "largest request body in MB, except for uploads", "limits", above=0)
    max_upload_mb: float = setting(512.0, "largest uploaded file in MB", "limits", above=0)
    max_jobs: int = setting(1, "number of training jobs that run at once; others wait", "limits", at_least=0)
    adapter_memory_mb: float | None = setting(
        None, "memory for adapters; the least recently used are kept on disk", "limits", above=0
    )
    cache_tokens: int | None = setting(
        None,
        "number of tokens whose keys and values are cached (default: according to free memory)",
        "limits",
        at_least=1,
    )

    def __post_init__(self) -> None:
        for name in ("adapter", "api_key", "allow_origin"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        check(self, "the server", self._faults)

    def _faults(self) -> list[str]:
        faults = [f"adapter is {word!r}, expected NAME=DIR" for word in self.adapter if not all(_pair(word))]
        if any(not key.strip() for key in self.api_key):
            faults.append("api_key is empty, expected a key that is hard to guess")
        faults += [
            f"allow_origin is {origin!r}, expected an origin such as https://example.com (no path, no *)"
            for origin in self.allow_origin
            if not _is_origin(origin)
        ]
        return faults

    @property
    def named_adapters(self) -> list[tuple[str, str]]:
        """Names and directories in `adapter`."""
        return [_pair(word) for word in self.adapter]


def _pair(word: str) -> tuple[str, str]:
    name, _, directory = word.partition("=")
    return name.strip(), directory


def _is_origin(text: str) -> bool:
    """Tells whether a text is an origin in the form that browsers send.

    >>> [_is_origin(text) for text in ("https://a.b", "http://a:8080", "*", "https://a.b/", "null")]
    [True, True, False, False, False]
    """
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    host = parts.hostname or ""
    plain = f"{parts.scheme}://{f'[{host}]' if ':' in host else host}" + (f":{port}" if port is not None else "")
    return parts.scheme in ("http", "https") and bool(host) and "*" not in host and plain == text
