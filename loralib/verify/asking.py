"""Asks servers for log-probabilities, through the API of each kind of server.

It sends few requests, one after another, so urllib is enough and no client library is needed.
"""

from __future__ import annotations

import functools
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Final, Protocol

from ..errors import ConfigError, UnreachableServerError, did_you_mean, list_faults
from .judging import ServerLogprobs

__all__ = ["ServerClient", "Vocabulary", "connect"]

_LARGEST: Final = 64 * 2**20  # maximum bytes of a response
_PROMPT: Final = 12  # tokens of a prompt to continue, for servers that report nothing about prompts
_NEW: Final = 48  # tokens to generate after it
_TOP: Final = 5  # alternatives per token, the most that OpenAI's API returns

Ids = Sequence[int]


class Vocabulary:
    """Maps the text of tokens to their ids, for servers that do not report ids."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def text(self, ids: Ids) -> str:
        """Returns the text of token ids."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def sendable(self, ids: Ids) -> list[list[int]]:
        """Returns the tokens to send as text; and if they begin with BOS, also those without it: servers may add it.

        The tokens are cut so that their text encodes to them again: a word cut in the middle may tokenize differently.
        """
        for end in range(len(ids), 1, -1):
            start = list(ids[:end])
            if list(self._tokenizer.encode(self.text(start), add_special_tokens=False)) == start:
                has_bos = start[0] == getattr(self._tokenizer, "bos_token_id", None)
                return [start, start[1:]] if has_bos and end > 1 else [start]
        return [list(ids)]

    @functools.cached_property
    def _ids(self) -> Mapping[str, int | None]:
        """Token ids by their text; None for a text that several tokens share."""
        result: dict[str, int | None] = {}
        for token in range(len(self._tokenizer)):
            text = self.text([token])
            result[text] = None if text in result else token
        return result

    def id(self, name: str) -> int | None:
        """Returns the id of the token that a server calls `name`, or None if it is not certain."""
        if name.startswith("token_id:") and name[9:].isdigit():
            return int(name[9:])
        return self._ids.get(name)


class ServerClient(Protocol):
    """A running server.

    Attributes:
        kind: the kind of server, in words.
        adapter: the adapter's name there, None if the server has none.
        base: the base's name there, None if the base cannot be queried.
    """

    kind: str
    adapter: str | None
    base: str | None

    def ask(self, rows: Sequence[Ids], adapted: bool) -> list[ServerLogprobs]:
        """Returns log-probabilities of the texts or of their continuations, with the adapter or with the base alone.

        Raises:
            UnreachableServerError: the server refuses, or its response cannot be used.
        """
        ...


def connect(
    url: str,
    vocabulary: Vocabulary,
    *,
    model: str | None = None,
    base_model: str | None = None,
    api_key: str | None = None,
    timeout: float = 120,
) -> ServerClient:
    """Finds out the kind of server, and the names of the adapter and the base there.

    Args:
        url: its address, with or without /v1.
        vocabulary: the tokens of the base.
        model: the adapter's name there; None for its only adapter.
        base_model: the base's name there; None to use what the server reports.
        api_key: sent as a bearer token.
        timeout: seconds to wait for a response.

    Raises:
        ConfigError: the address is invalid, or a name is missing or unknown; the message lists the names available.
        UnreachableServerError: there is no server that can be queried.
    """
    client = _Client(url, api_key, timeout)
    if isinstance(listed := client.try_get("/lora-adapters"), list):
        return _LlamaCpp(client, listed, model)
    for path in ("/model_info", "/get_model_info"):
        info = client.try_get(path)
        if isinstance(info, dict) and "model_path" in info:
            return _SGLang(client, info, model)
    if isinstance(version := client.try_get("/api/version"), dict) and "version" in version:
        return _Ollama(client, vocabulary, model, base_model)
    return _OpenAI(client, vocabulary, model, base_model)


class _Refused(UnreachableServerError):
    """The server responds with an error."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirects, so that the API key reaches no server other than the one it was given for."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Client:
    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        try:
            parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
        except ValueError:
            good = False
        if not good:
            raise ConfigError(f"the address is {url!r}, expected an address such as http://localhost:8000")
        path = parts.path.rstrip("/").removesuffix("/v1")
        self.url = urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, "", ""))
        self._timeout = timeout
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._opener = urllib.request.build_opener(_NoRedirect)

    def try_get(self, path: str) -> Any:
        """Returns the JSON at a path, or None if the server has no such path."""
        try:
            return self.request(path)
        except _Refused as error:
            if error.status in (401, 403):
                raise
            return None
        except _NotJson:
            return None

    def request(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Returns the JSON response to a GET, or to a POST if there is a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self._headers)
        try:
            with self._opener.open(request, timeout=self._timeout) as answer:
                content = answer.read(_LARGEST + 1)
        except urllib.error.HTTPError as error:
            raise self._refusal(path, error) from None
        except TimeoutError:
            raise UnreachableServerError(
                f"{self.url}{path} gave no answer within {self._timeout:g} seconds; use --timeout to wait longer"
            ) from None
        except (OSError, ValueError) as error:  # urllib and http.client raise both
            reason = getattr(error, "reason", error)
            raise UnreachableServerError(
                f"{self.url} cannot be reached: {reason}. Is the server running, and is the address right?"
            ) from None
        except Exception as error:  # http.client's own errors: what answers does not speak HTTP
            raise UnreachableServerError(f"{self.url} does not speak HTTP: {error!r}") from None
        try:
            if len(content) > _LARGEST:
                raise ValueError(f"more than {_LARGEST >> 20} MiB")
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise _NotJson(
                f"{self.url}{path} answers with something other than JSON ({error}); is it a server of this kind?"
            ) from None

    def _refusal(self, path: str, error: urllib.error.HTTPError) -> _Refused:
        try:
            text = error.read(4096).decode("utf-8", "replace").strip()
        except OSError:
            text = ""
        with_key = " Give --api_key KEY, or set LORALIB_API_KEY." if error.code in (401, 403) else ""
        return _Refused(
            f"{self.url}{path} answers {error.code}: {_message(text) or error.reason}{with_key}", error.code
        )


class _NotJson(UnreachableServerError):
    """The server speaks HTTP but did not return JSON."""


def _message(text: str) -> str:
    """Returns the text of an error response, in OpenAI's format or another."""
    try:
        value = json.loads(text)
    except ValueError:
        return text[:300]
    for key in ("error", "message", "detail"):
        value = value.get(key, value) if isinstance(value, dict) else value
    return (value if isinstance(value, str) else json.dumps(value))[:300]


def _check_read(client: _Client, sent: Ids, read: object) -> None:
    """Checks that a server read the tokens that were sent, if it reports them or their number.

    Raises:
        UnreachableServerError: it read different tokens, so its log-probabilities cannot be compared.
    """
    if read is None or read == (len(sent) if isinstance(read, int) else list(sent)):
        return
    what = f"{read} tokens" if isinstance(read, int) else f"the tokens {read}"
    raise UnreachableServerError(
        f"{client.url} read {what}, but the prompt has {len(sent)}, {list(sent)}: it tokenises differently, adds a "
        "token such as BOS, or puts prompts into a template. So nothing can be said about the adapter; serve it with "
        "the tokenizer that it was trained with"
    )


def _unusable(client: _Client, reasons: Sequence[str]) -> UnreachableServerError:
    return UnreachableServerError(list_faults(f"{client.url} returns no usable log-probabilities", list(reasons), ""))


# --- servers that speak OpenAI's API: loralib, vLLM, and others ------------------------------------------------------


class _OpenAI:
    kind = "OpenAI's API"

    def __init__(self, client: _Client, vocabulary: Vocabulary, model: str | None, base_model: str | None) -> None:
        self._client, self._vocabulary = client, vocabulary
        listed = client.request("/v1/models")
        entries = listed.get("data") if isinstance(listed, dict) else None
        if not isinstance(entries, list):
            raise UnreachableServerError(f"{client.url}/v1/models lists no models; is it a server of this kind?")
        self._models = {str(entry.get("id")): entry.get("parent") for entry in entries if isinstance(entry, dict)}
        self.adapter: str | None = self._known(model, "--model") if model else self._only_adapter()
        self.base: str | None = self._known(base_model, "--base_model") if base_model else self._base()
        self._way: Callable[[Ids, str], ServerLogprobs] | None = None

    def _known(self, name: str, flag: str) -> str:
        if name not in self._models:
            there = ", ".join(self._models) or "none"
            raise ConfigError(
                f"{flag} is {name}, but the server has no such model.{did_you_mean(name, self._models)} It has: {there}"
            )
        return name

    def _only_adapter(self) -> str:
        children = [name for name, parent in self._models.items() if parent is not None]
        if len(children) != 1:
            there = ", ".join(children or self._models) or "none"
            raise ConfigError(f"which of the server's models is the adapter? Give --model NAME. It has: {there}")
        return children[0]

    def _base(self) -> str | None:
        parent = self._models.get(self.adapter or "")
        roots = [name for name, above in self._models.items() if above is None and name != self.adapter]
        if parent in self._models:
            return str(parent)
        return roots[0] if len(roots) == 1 else None

    def ask(self, rows: Sequence[Ids], adapted: bool) -> list[ServerLogprobs]:
        name = self.adapter if adapted else self.base
        assert name is not None
        if self._way is None:
            self._way = self._working(rows[0], name)
        return [self._way(row, name) for row in rows]

    def _working(self, row: Ids, name: str) -> Callable[[Ids, str], ServerLogprobs]:
        reasons = []
        ways = {"echo": self._echoed, "prompt_logprobs": self._of_prompt, "logprobs": self._continued}
        for label, way in ways.items():
            try:
                if way(row, name).values:
                    return way
                reasons.append(f"{label}: the answer contains none")
            except _Refused as error:
                reasons.append(f"{label}: {error}")
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                reasons.append(f"{label}: the answer has an unexpected shape ({error!r})")
        raise _unusable(self._client, reasons)

    def _echoed(self, row: Ids, name: str) -> ServerLogprobs:
        body = {"max_tokens": 0, "echo": True, "logprobs": 1, "return_tokens_as_token_ids": True}
        try:
            choice = self._choice(row, name, body)
        except _Refused as error:
            if error.status not in (400, 422):
                raise
            choice = self._choice(row, name, {**body, "max_tokens": 1})  # some servers must generate at least one token
        tokens, scores = choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"]
        if all(str(token).startswith("token_id:") for token in tokens):
            _check_read(self._client, row, [self._vocabulary.id(token) for token in tokens[: len(row)]])
        named = [self._vocabulary.id(token) for token in tokens[: len(row)]]
        if len(named) < len(row) or any(a not in (None, b) for a, b in zip(named, row, strict=True)):
            raise ValueError("the answer is about different tokens than the prompt's")
        return ServerLogprobs(tuple(row), _values(row, scores))

    def _of_prompt(self, row: Ids, name: str) -> ServerLogprobs:
        choice = self._choice(row, name, {"max_tokens": 1, "prompt_logprobs": 1, "return_token_ids": True})
        entries = choice["prompt_logprobs"]
        scores = [
            None if entry is None else entry[str(token)]["logprob"] for token, entry in zip(row, entries, strict=True)
        ]
        return ServerLogprobs(tuple(row), _values(row, scores))

    def _continued(self, row: Ids, name: str) -> ServerLogprobs:
        start = row[:_PROMPT]
        body = {"max_tokens": _NEW, "logprobs": _TOP, "return_tokens_as_token_ids": True}
        scores = self._choice(start, name, body)["logprobs"]
        steps = zip(scores["tokens"], scores["token_logprobs"], scores["top_logprobs"] or (), strict=True)
        return _continuation(
            start, ((self._vocabulary.id(token), {**(top or {}), token: score}) for token, score, top in steps),
            self._vocabulary.id,
        )  # fmt: skip

    def _choice(self, row: Ids, name: str, body: Mapping[str, Any]) -> Any:
        request = {"model": name, "prompt": list(row), "temperature": 0, **body}
        answer = self._client.request("/v1/completions", request)
        choice = answer["choices"][0]
        _check_read(self._client, row, (answer.get("usage") or {}).get("prompt_tokens"))
        _check_read(self._client, row, choice.get("prompt_token_ids"))
        return choice


def _values(row: Ids, scores: Sequence[float | None]) -> tuple[tuple[int, int, float], ...]:
    """Returns (position, token, log-probability) for the tokens of a text; the first has no log-probability."""
    pairs = enumerate(zip(row, scores[: len(row)], strict=True))
    return tuple((at, token, float(score)) for at, (token, score) in pairs if at and score is not None)


def _continuation(start: Ids, steps: Any, id_of: Callable[[Any], int | None]) -> ServerLogprobs:
    """Returns the log-probabilities reported during a continuation, up to the first token whose id is uncertain."""
    ids, values = list(start), []
    for token, top in steps:
        for name, score in top.items():
            known = id_of(name)
            # Servers report minus infinity as a large negative number such as -9999.
            if known is not None and score is not None and score > -1000:
                values.append((len(ids), known, float(score)))
        if token is None:
            break
        ids.append(token)
    return ServerLogprobs(tuple(ids), tuple(values))


# --- SGLang ----------------------------------------------------------------------------------------------------------


class _SGLang:
    kind = "SGLang"

    def __init__(self, client: _Client, info: Mapping[str, Any], model: str | None) -> None:
        if model is None:
            raise ConfigError(
                "the server's name for the adapter is not known: give --model NAME, as in --lora-paths NAME=DIR"
            )
        self._client = client
        self.adapter: str | None = model.rpartition(":")[2]  # the model name in its OpenAI API is base:adapter
        self.base: str | None = str(info["model_path"])

    def ask(self, rows: Sequence[Ids], adapted: bool) -> list[ServerLogprobs]:
        result = []
        for row in rows:
            body: dict[str, Any] = {
                "input_ids": list(row),
                "sampling_params": {"max_new_tokens": 1, "temperature": 0},
                "return_logprob": True,
                "logprob_start_len": 0,
            }
            if adapted:
                body["lora_path"] = self.adapter
            try:
                entries = self._client.request("/generate", body)["meta_info"]["input_token_logprobs"]
                _check_read(self._client, row, [entry[1] for entry in entries])
                result.append(ServerLogprobs(tuple(row), _values(row, [entry[0] for entry in entries])))
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise _unusable(self._client, [f"/generate: {error!r}"]) from None
        return result


# --- llama.cpp -------------------------------------------------------------------------------------------------------


class _LlamaCpp:
    kind = "llama.cpp"

    def __init__(self, client: _Client, listed: Sequence[Mapping[str, Any]], model: str | None) -> None:
        self._client = client
        self._ids = [int(entry["id"]) for entry in listed]
        names = {str(entry["id"]): _stem(str(entry.get("path", ""))) for entry in listed}
        chosen = [entry for entry in listed if model in (None, str(entry["id"]), names[str(entry["id"])])]
        if listed and len(chosen) != 1:
            there = ", ".join(f"{name} (id {number})" for number, name in names.items())
            wanted = "which adapter? Give" if model is None else f"there is no single adapter {model}; give"
            raise ConfigError(f"{wanted} --model with its id or name. The server has: {there}")
        self._chosen = chosen[0] if chosen else None
        self.adapter: str | None = names[str(chosen[0]["id"])] if chosen else None
        self.base: str | None = "the same with all adapters at scale 0"

    def ask(self, rows: Sequence[Ids], adapted: bool) -> list[ServerLogprobs]:
        scales = dict.fromkeys(self._ids, 0.0)
        if adapted and self._chosen is not None:
            # The scale that the server applies; one set to 0 is applied only on request, so it is requested at 1.
            scales[int(self._chosen["id"])] = float(self._chosen.get("scale") or 1.0)
        lora = [{"id": number, "scale": scale} for number, scale in scales.items()]
        result = []
        for row in rows:
            body: dict[str, Any] = {
                "prompt": list(row[:_PROMPT]),
                "n_predict": _NEW,
                "n_probs": _TOP,
                "temperature": 0,
                "ignore_eos": True,
                "cache_prompt": False,  # the cache may come from another adapter
                "lora": lora,
            }
            try:
                answer = self._client.request("/completion", body)
                _check_read(self._client, body["prompt"], answer.get("tokens_evaluated"))
                tokens = (
                    (step["id"], {top["id"]: top["logprob"] for top in (*step["top_logprobs"], step)})
                    for step in answer["completion_probabilities"]
                )
                result.append(_continuation(row[:_PROMPT], tokens, lambda token: token))
            except (KeyError, TypeError, AttributeError) as error:
                raise _unusable(self._client, [f"/completion: {error!r}"]) from None
        return result


def _stem(path: str) -> str:
    """Returns a file name without its extension; the path may come from another operating system."""
    return (PureWindowsPath(path) if "\\" in path else PurePosixPath(path)).stem


# --- Ollama ----------------------------------------------------------------------------------------------------------


class _Ollama:
    kind = "Ollama"

    def __init__(self, client: _Client, vocabulary: Vocabulary, model: str | None, base_model: str | None) -> None:
        self._client, self._vocabulary = client, vocabulary
        tags = client.request("/api/tags")
        there = [str(each.get("name")) for each in tags.get("models", ())]
        missing = [
            name for name in (model, base_model) if name is not None and not {name, f"{name}:latest"} & set(there)
        ]
        if model is None or missing:
            wanted = f"there is no model {missing[0]}" if missing else "which model has the adapter? Give --model NAME"
            raise ConfigError(f"{wanted}. The server has: {', '.join(there) or 'none'}")
        self.adapter: str | None = model
        self.base: str | None = base_model

    def ask(self, rows: Sequence[Ids], adapted: bool) -> list[ServerLogprobs]:
        return [self._continued(row[:_PROMPT], self.adapter if adapted else self.base) for row in rows]

    def _continued(self, start: Ids, name: str | None) -> ServerLogprobs:
        sendable = self._vocabulary.sendable(start)
        for sent in sendable:
            answer = self._answer(sent, name)
            if (read := answer.get("prompt_eval_count")) in (None, len(sendable[0])):
                break
        _check_read(self._client, sendable[0], read)
        try:
            tops = (
                (self._vocabulary.id(step["token"]), {top["token"]: top["logprob"] for top in (*_tops(step), step)})
                for step in answer["logprobs"]
            )
            return _continuation(sendable[0], tops, self._vocabulary.id)
        except (KeyError, TypeError, AttributeError) as error:
            reason = f"/api/generate: {error!r} (log-probabilities need Ollama 0.12.11 or later)"
            raise _unusable(self._client, [reason]) from None

    def _answer(self, sent: Ids, name: str | None) -> Mapping[str, Any]:
        body = {
            "model": name,
            "prompt": self._vocabulary.text(sent),
            "raw": True,  # no prompt template
            "stream": False,
            "logprobs": True,
            "top_logprobs": _TOP,
            "options": {"temperature": 0, "num_predict": _NEW, "repeat_penalty": 1.0},
        }
        answer = self._client.request("/api/generate", body)
        return answer if isinstance(answer, dict) else {}


def _tops(step: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return step.get("top_logprobs") or ()
