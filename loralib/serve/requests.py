"""Requests for both generating endpoints: their fields, and conversion to sampling settings.

Unknown fields that would change the result are refused by name.  Fields that common clients send and that do not affect
the result are accepted: from `user` on in `TextRequest`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import Field, WithJsonSchema, model_validator
from pydantic.json_schema import SkipJsonSchema

from ..errors import did_you_mean
from ..generation import Sampling
from .bodies import WHOLE, Body
from .errors import RequestError

__all__ = ["ChatRequest", "CompletionRequest", "TextRequest", "sampling_of"]

# Fields of OpenAI's and vLLM's APIs that this server does not support, and what to do instead.
_REFUSED: Final = {
    "audio": "this server generates text only",
    "best_of": "request n texts and choose among them",
    "functions": "this server does not call functions; use response_format for JSON of a given shape",
    "function_call": "this server does not call functions",
    "tools": "this server does not call tools; use response_format for JSON of a given shape",
    "tool_choice": "this server does not call tools",
    "suffix": "this server continues texts, but does not fill gaps",
    "prediction": "this server does not decode speculatively",
    "reasoning_effort": "this server has no such setting",
    "verbosity": "this server has no such setting",
    "web_search_options": "this server does not search the web",
    "modalities": "this server generates text only",
    "use_beam_search": "the server has no beam search; use loralib generate --num_beams",
    "length_penalty": "it belongs to beam search; use loralib generate",
    "prompt_logprobs": "use echo with logprobs on /v1/completions",
    "guided_json": "use response_format",
    "guided_regex": "use response_format",
    "guided_choice": "use response_format",
    "structured_outputs": "use response_format",
    "chat_template": "the server sets it (--chat_template)",
    "chat_template_kwargs": "the template receives only the messages",
    "lora": "give the adapter's name as the model",
}
_COLDEST: Final = 1e-3  # below this temperature, scaled logits overflow, so the most likely token is used


TokenId = Annotated[int, Field(ge=0, lt=2**31), WHOLE]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    WithJsonSchema(
        {
            "type": "object",
            "patternProperties": {"^[0-9]{1,9}$": {"type": "number", "minimum": -100, "maximum": 100}},
            "additionalProperties": False,
        }
    ),
]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class StreamOptions(Body):
    """Options for streaming: whether a last chunk has the token counts; obfuscation is accepted and ignored."""

    include_usage: bool | None = None
    include_obfuscation: SkipJsonSchema[bool | None] = None


class JsonSchema(Body):
    """A schema that the text must follow."""

    name: str = Field(max_length=64)
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Body):
    """The required form of the text: anything, a JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def text(self) -> str | None:
        """The schema as text; None: there is none."""
        if self.type == "text":
            return None
        schema = self.json_schema.schema_ if self.json_schema is not None else None
        if self.type == "json_schema" and schema is None:
            raise RequestError("response_format has no json_schema with a schema", param="response_format")
        return json.dumps(schema or {})


class TextRequest(Body):
    """The fields of both endpoints."""

    model: str = Field(max_length=300, description="the base, or an adapter: what GET /v1/models lists")
    n: Annotated[int, Field(ge=1, le=1024), WHOLE] | None = 1
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    seed: Annotated[int, WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1, le=2**31), WHOLE] | None = Field(None, description="0 or -1: all")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Penalty | None = 0.0
    frequency_penalty: Penalty | None = 0.0
    logit_bias: LogitBias | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31), WHOLE] | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    return_tokens_as_token_ids: bool | None = Field(None, description="write tokens in logprobs as token_id:7")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, values: Any) -> Any:
        """Refuses unknown fields by name."""
        if not isinstance(values, Mapping):
            return values
        known = {name: value for name, value in values.items() if not (name in _REFUSED and value is None)}
        fields = cls.model_fields
        for name in known:
            if name in fields:
                continue
            why = _REFUSED.get(name)
            words = f"{name} is not supported: {why}" if why else f"there is no field {name[:80]!r}."
            raise RequestError(words if why else words + did_you_mean(name, fields), 400, "unknown_field", name[:80])
        return known

    @property
    def shows_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(TextRequest):
    """A text to continue."""

    prompt: (
        Annotated[str, Field(max_length=20_000_000)]
        | Annotated[list[str], Field(min_length=1)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=2**31), WHOLE] | None = Field(None, description="0: only read the prompt")
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each as a text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """A turn of a chat."""

    role: str = Field(max_length=64)
    content: str | list[TextPart] | None = None
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, values: Any) -> Any:
        """Refuses parts that are not text."""
        if not isinstance(values, Mapping):
            return values
        kept = {name: value for name, value in values.items() if value not in (None, [])}
        unknown = [name for name in kept if name not in cls.model_fields]
        if unknown:
            raise RequestError(
                f"messages: {unknown[0][:80]} is not supported in a message, which has a role and content",
                param="messages",
            )
        content = kept.get("content")
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, Mapping) else None
            if isinstance(kind, str) and kind != "text":
                raise RequestError(f"messages: {kind[:80]!r} is not supported, expected parts of type text",
                                   param="messages")  # fmt: skip
        return {"content": "", **kept} if values.get("role") == "assistant" else kept

    @property
    def text(self) -> str:
        """Its parts, joined."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatRequest(TextRequest):
    """A chat to continue."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31), WHOLE] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31), WHOLE] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None

    @property
    def turns(self) -> list[dict[str, str]]:
        """The messages in the form that chat templates take."""
        return [
            {"role": turn.role, "content": turn.text, **({} if turn.name is None else {"name": turn.name})}
            for turn in self.messages
        ]


def sampling_of(body: CompletionRequest | ChatRequest, most_tokens: int) -> Sampling:
    """Returns the sampling settings of a request; without a seed, a random one.

    Args:
        body: the request.
        most_tokens: the maximum number of tokens that it may request.

    Raises:
        RequestError: fields contradict each other, or exceed limits.
        ConfigError: a setting is invalid.
    """
    chat = isinstance(body, ChatRequest)
    wanted, field = body.max_tokens, "max_tokens"
    if isinstance(body, ChatRequest) and body.max_completion_tokens is not None:
        if wanted not in (None, body.max_completion_tokens):
            raise RequestError("max_tokens and max_completion_tokens differ; give only one of them", param="max_tokens")
        wanted, field = body.max_completion_tokens, "max_completion_tokens"
    if wanted is not None and wanted > most_tokens:
        raise RequestError(
            f"{field} is {wanted}, but this server allows at most {most_tokens} (--max_tokens)", param=field
        )
    tokens = (most_tokens if chat else min(16, most_tokens)) if wanted is None else wanted
    echoes = isinstance(body, CompletionRequest) and bool(body.echo)
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options is given, but stream is not true", param="stream_options")
    least = tokens if body.ignore_eos else body.min_tokens or 0
    if least > tokens:
        raise RequestError(f"min_tokens is {least}, expected at most {field}, which is {tokens}", param="min_tokens")
    temperature = 1.0 if body.temperature is None else body.temperature
    return Sampling(
        max_new_tokens=tokens,
        min_new_tokens=least,
        stop=_listed(body.stop),
        temperature=temperature if temperature >= _COLDEST else 0.0,
        top_k=max(body.top_k or 0, 0),
        top_p=max(1.0 if body.top_p is None else body.top_p, 1e-9),
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
        json_schema=None if body.response_format is None else body.response_format.text,
        logprobs=_logprobs(body),
        prompt_logprobs=tokens == 0 or (echoes and _logprobs(body) is not None),
        seed=secrets.randbits(63) if body.seed is None else body.seed,
    )


def _logprobs(body: CompletionRequest | ChatRequest) -> int | None:
    if isinstance(body, CompletionRequest):
        return body.logprobs
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs is given, but logprobs is not true", param="top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def _listed(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
