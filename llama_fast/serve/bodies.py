"""The bodies of requests, as OpenAI and vLLM spell them: what each field may be, and which are refused.

Types are strict: "3" and true are no numbers. What cannot be done is refused unless it asks for nothing (0, null, empty).
Fields that change no text (`user`, `metadata`, `store`, ...) are taken and not used; any other unknown field is an error.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from llama_fast.engine.sampling import Sampling
from llama_fast.grammars.asked import ANY_OBJECT, Choice, Grammar, JsonSchema, Lark, Regex
from llama_fast.serve.errors import refused

MOST_CHOICES = 128
MOST_TOOLS = 128


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
Biases = Annotated[
    dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=1024, json_schema_extra={"additionalProperties": False}),
]
"""By token ids, which JSON spells as text."""
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(BaseModel):
    model_config = STRICT
    include_usage: bool | None = None
    """A last chunk without choices tells the usage."""
    continuous_usage_stats: bool | None = None
    """Every chunk tells the usage until then."""


class TextFormat(BaseModel):
    model_config = STRICT
    type: Literal["text"]


class JsonFormat(BaseModel):
    """Any JSON object."""

    model_config = STRICT
    type: Literal["json_object"]


class NamedSchema(BaseModel):
    model_config = STRICT
    name: Annotated[Text, Field(min_length=1, max_length=64)]
    of: dict[str, Any] | bool = Field(alias="schema")
    description: Text | None = None
    strict: bool | None = None
    """Taken and not used: a schema is always kept."""


class SchemaFormat(BaseModel):
    """A JSON value of a schema."""

    model_config = STRICT
    type: Literal["json_schema"]
    json_schema: NamedSchema


class StructuredOutputs(BaseModel):
    """What the answer must be, in vLLM's words: one of the first five."""

    model_config = STRICT
    json_: dict[str, Any] | bool | Text | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: Text | None = None
    choice: Annotated[list[StopText], Field(min_length=1, max_length=1024)] | None = None
    grammar: Text | None = None
    """In llguidance's dialect of Lark."""
    disable_any_whitespace: bool | None = None
    """Of JSON: no white space between its tokens."""

    def asked(self) -> Grammar:
        """The one grammar that is asked for."""
        spaced = not self.disable_any_whitespace
        kinds: list[Grammar] = []
        if self.json_ is not None:
            kinds.append(JsonSchema(self.json_, spaced))
        if self.json_object:
            kinds.append(JsonSchema(ANY_OBJECT.schema, spaced))
        if self.regex is not None:
            kinds.append(Regex(self.regex))
        if self.choice is not None:
            kinds.append(Choice(self.choice))
        if self.grammar is not None:
            kinds.append(Lark(self.grammar))
        if len(kinds) != 1:
            raise refused(
                "structured_outputs", "exactly one of json, json_object, regex, choice and grammar is asked for"
            )
        return kinds[0]


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

    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Biases | None = None
    response_format: Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")] | None = None
    structured_outputs: StructuredOutputs | None = None

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
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
        )

    def grammar(self) -> tuple[str, Grammar] | None:
        """What the answer must be, and the field that says so; None for free text."""
        form = self.response_format
        if form is not None and not isinstance(form, TextFormat):
            if self.structured_outputs is not None:
                raise refused("structured_outputs", "response_format asks for a form already")
            schema = form.json_schema.of if isinstance(form, SchemaFormat) else None
            return "response_format", ANY_OBJECT if schema is None else JsonSchema(schema)
        if self.structured_outputs is not None:
            return "structured_outputs", self.structured_outputs.asked()
        return None

    def check(self) -> None:
        """Refuse what cannot be done, by its field's name."""
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


class CalledFunction(BaseModel):
    model_config = STRICT
    name: Text
    arguments: Text | dict[str, Any]


class Called(BaseModel):
    """A call that the assistant made."""

    model_config = STRICT
    type: Literal["function"] = "function"
    id: Text | None = None
    function: CalledFunction

    def plain(self) -> dict[str, Any]:
        """As a template takes it: the arguments, which OpenAI spells as text, are an object."""
        arguments = self.function.arguments
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                arguments = ""
        if not isinstance(arguments, dict):
            raise refused("messages", "the arguments of a tool call are no JSON object")
        named = {} if self.id is None else {"id": self.id}
        return {**named, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class Function(BaseModel):
    model_config = STRICT
    name: Annotated[Text, Field(min_length=1, max_length=256)]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of an object; None takes none."""
    strict: bool | None = None
    """Taken and not used: the parameters of a call by force are always kept."""


class Tool(BaseModel):
    model_config = STRICT
    type: Literal["function"]
    function: Function


class FunctionName(BaseModel):
    model_config = STRICT
    name: Text


class ToolByName(BaseModel):
    model_config = STRICT
    type: Literal["function"]
    function: FunctionName


class Message(BaseModel):
    """A message of a conversation. What a template may know beside role and content is handed to it."""

    model_config = STRICT
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[ContentPart] | None = None
    name: Text | None = None
    tool_calls: Annotated[list[Called], Field(max_length=MOST_TOOLS)] | None = None
    tool_call_id: Text | None = None
    refusal: None = None
    """OpenAI's client sends an answer back with the nulls that it came with."""
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def plain(self) -> dict[str, Any]:
        """As a template takes it: parts joined, and "developer" by its older name "system"."""
        parts, role = self.content, "system" if self.role == "developer" else self.role
        content = "".join(part.text for part in parts) if isinstance(parts, list) else parts
        calls = None if self.tool_calls is None else [call.plain() for call in self.tool_calls]
        more = {"name": self.name, "tool_calls": calls, "tool_call_id": self.tool_call_id}
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
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolByName | None = None
    parallel_tool_calls: bool | None = None
    """False: of several calls the first is told."""

    @property
    def offered(self) -> list[Tool]:
        """The tools that the answer may call."""
        return [] if self.tool_choice == "none" else list(self.tools or ())

    @property
    def forced(self) -> list[Tool]:
        """The tools of which the answer must call one."""
        if isinstance(self.tool_choice, ToolByName):
            name = self.tool_choice.function.name
            return [tool for tool in self.offered if tool.function.name == name]
        return self.offered if self.tool_choice == "required" else []

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise refused("top_logprobs", "it belongs to a request with logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise refused("max_tokens", "it contradicts max_completion_tokens")
        if self.tool_choice not in (None, "auto", "none") and not self.forced:
            raise refused("tool_choice", "there is no such tool")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise refused("tools", "two of them have one name")
        if self.offered and (asked := self.grammar()) is not None:
            raise refused(asked[0], 'it cannot be had with tools that may be called: tool_choice="none"')


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
