"""The bodies of requests, as OpenAI and vLLM spell them: what each field may be, and which are refused.

Types are strict: "3" and true are no numbers. What cannot be done is refused unless it asks for nothing (0, null, empty).
Fields that change no text (`user`, `metadata`, `store`, ...) are taken and not used; any other unknown field is an error.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from llama_fast.engine.sampling import Sampling
from llama_fast.serve.errors import refused

MOST_CHOICES = 128


def well_formed(text: str) -> str:
    """The text; ValueError for half a character, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds half a character (a lone surrogate)") from None
    return text


def as_whole(value: Any) -> Any:
    """JSON has one kind of number: 3.0 is 3."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Text = Annotated[str, AfterValidator(well_formed)]
WHOLE = BeforeValidator(as_whole)  # behind the range, which the OpenAPI document then tells
Id = Annotated[int, Field(ge=0, le=2**31 - 1), WHOLE]
Ids = Annotated[list[Id], Field(min_length=1)]
StopText = Annotated[Text, Field(min_length=1)]
Prompts = (
    Text
    | Annotated[list[Text], Field(min_length=1, max_length=MOST_CHOICES)]
    | Ids
    | Annotated[list[Ids], Field(min_length=1, max_length=MOST_CHOICES)]
)
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(BaseModel):
    model_config = STRICT
    include_usage: bool | None = None
    """A last chunk without choices tells the usage."""
    continuous_usage_stats: bool | None = None
    """Every chunk tells the usage until then."""


class Generating(BaseModel):
    """What both ways of generating share."""

    model_config = STRICT
    model: Text | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES), WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1), WHOLE] | None = None
    """-1 and 0 keep all tokens."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1), WHOLE] | None = None
    """Choice i draws with seed + i; a seed is drawn if none is given."""
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[Id], Field(max_length=1024)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # what this server cannot do: only values that ask for nothing
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None

    # what changes no text
    user: Text | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def sampling(self, drawn_seed: int) -> Sampling:
        """The settings of the first choice; OpenAI's default temperature is 1."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k if self.top_k is not None and self.top_k > 0 else None,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=(drawn_seed if self.seed is None else self.seed) % 2**64,
            min_p=0.0 if self.min_p is None else self.min_p,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
        )

    def check(self) -> None:
        """Refuse what cannot be done, by its field's name."""
        for field in ("frequency_penalty", "presence_penalty", "logit_bias"):
            if getattr(self, field):
                raise refused(field, "this server does not have it; repetition_penalty is the penalty it has")
        if self.response_format is not None and self.response_format != {"type": "text"}:
            raise refused("response_format", "this server generates free text only")
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options", "it belongs to a request with stream=true")


class CompletionBody(Generating):
    """The body of /v1/completions."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1), WHOLE] | None = None
    """0 only with `echo`. 16 by default, as with OpenAI."""
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES), WHOLE] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    suffix: Text | None = None

    @property
    def candidates(self) -> int:
        """The rows of a prompt, of which the best `n` are told."""
        return self.choices if self.best_of is None else self.best_of

    def check(self) -> None:
        super().check()
        if self.candidates < self.choices:
            raise refused("best_of", f"{self.candidates} must not be less than n={self.choices}")
        if self.stream and self.candidates > self.choices:
            raise refused("best_of", "the best is known at the end only: it excludes stream=true")
        if self.suffix:
            raise refused("suffix", "this server continues text, and does not fill it in")
        if self.max_tokens == 0 and not self.echo:
            raise refused("max_tokens", "0 new tokens are wanted only with echo=true")


class ContentPart(BaseModel):
    model_config = STRICT
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """A message of a conversation. What a template may know beside role and content is handed to it."""

    model_config = STRICT
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[ContentPart] | None = None
    name: Text | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: Text | None = None

    def plain(self) -> dict[str, Any]:
        """As a template takes it: parts joined, and "developer" by its older name "system"."""
        parts, role = self.content, "system" if self.role == "developer" else self.role
        content = "".join(part.text for part in parts) if isinstance(parts, list) else parts
        more = {"name": self.name, "tool_calls": self.tool_calls, "tool_call_id": self.tool_call_id}
        return {"role": role, "content": content, **{key: value for key, value in more.items() if value is not None}}


Messages = Annotated[list[Message], Field(min_length=1)]


class ChatBody(Generating):
    """The body of /v1/chat/completions."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1), WHOLE] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1), WHOLE] | None = None
    """The newer name of `max_tokens`; without either, what room there is."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise refused("top_logprobs", "it belongs to a request with logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise refused("max_tokens", "it contradicts max_completion_tokens")
        if self.tool_choice not in (None, "auto", "none"):
            raise refused("tool_choice", 'this server calls no tool by force: "auto" or "none"')


class TokenizeBody(BaseModel):
    """The body of /tokenize: a text, or a conversation."""

    model_config = STRICT
    model: Text | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    """Whether a text is led by BOS, if the model's texts start with one; true by default."""


class DetokenizeBody(BaseModel):
    """The body of /detokenize."""

    model_config = STRICT
    model: Text | None = None
    tokens: list[Id]
