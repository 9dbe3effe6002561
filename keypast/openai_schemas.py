"""The wire models of the OpenAI-compatible routes, as far as they are served.

Their requests are read as OpenAI's clients send them: a null is a field left out, and a field that is not known is not
looked at. One that is known and would change the answer in a way that is not served is refused.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, StringConstraints, field_validator, model_validator

from keypast.schemas import MAX_INT, MAX_MESSAGES, SESSION_ID_PATTERN, Count, Problem, Reply, Request, Stop, Stops

MAX_PROMPTS = 256
MAX_CHOICES = 128  # of one prompt
MAX_LOGPROBS = 20

TokenIds = Annotated[list[Count], Field(min_length=1, fail_fast=True)]
PromptTexts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
PromptIds = Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
SessionName = Annotated[str, StringConstraints(pattern=SESSION_ID_PATTERN)]


NOT_SERVED = ("presence_penalty", "frequency_penalty", "logit_bias", "suffix", "tools", "functions")


class Lenient(Request):
    """A request of another protocol."""

    model_config = ConfigDict(extra="ignore")


class StreamOptions(Lenient):
    include_usage: bool | None = Field(default=None, description="a last chunk without choices that has the usage")
    continuous_usage_stats: bool | None = Field(default=None, description="the usage so far in every chunk")


class TextRequest(Lenient):
    """What both kinds of request have."""

    model: str | None = Field(default=None, description="the first that reads text, when left out")
    session_id: SessionName | None = Field(
        default=None, description="the session that the turn is appended to; `X-Session-ID` makes it if it is not there"
    )
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES, description="replies to each prompt; 1 with a session")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | Stops | None = None
    seed: int | None = Field(default=None, description="of the first reply; the next ones count up from it")
    temperature: float | None = Field(default=None, ge=0, le=100, description="1 when left out; 0 takes the likeliest")
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=MAX_INT, description="0 or -1 keeps all")
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    ignore_eos: bool | None = None
    presence_penalty: float | None = Field(default=None, description="not served, but for 0")
    frequency_penalty: float | None = Field(default=None, description="not served, but for 0")
    logit_bias: dict[str, Any] | None = Field(default=None, description="not served, but for {}")

    @model_validator(mode="after")
    def _can_be_served(self) -> Self:
        for name in NOT_SERVED:
            if getattr(self, name, None):
                raise ValueError(f"{name} is not served; leave it out")
        return self


class CompletionRequest(TextRequest):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "smollm2-135m", "prompt": "The capital of France is"}]}
    )

    prompt: str | PromptTexts | TokenIds | PromptIds = Field(description="text, token ids, or a list of either")
    max_tokens: Count | None = Field(default=None, description="16 when left out")
    echo: bool | None = Field(default=None, description="the prompt comes first in the text")
    logprobs: int | None = Field(
        default=None, ge=0, le=MAX_LOGPROBS, description="of each token, and of so many that were likeliest"
    )
    suffix: str | None = Field(default=None, description="not served")
    best_of: int | None = Field(default=None, description="not served, but for n")

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of must be n: all replies are given")
        if self.echo and self.stream and self.logprobs is not None:
            raise ValueError("echo with logprobs is not streamed")
        return self


class ChatMessage(Lenient):
    """`content` is text, or parts of which each is text."""

    role: str
    content: str | list[dict[str, Any]] | None = None

    @field_validator("role")
    @classmethod
    def _known(cls, role: str) -> str:
        return "system" if role == "developer" else role


class ResponseFormat(Lenient):
    type: Literal["text"] = Field(description="others are not served")


class ChatRequest(TextRequest):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "smollm2-135m", "messages": [{"role": "user", "content": "What is a river?"}]}]
        }
    )

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_tokens: Count | None = Field(default=None, description="until the model's max_length when left out")
    max_completion_tokens: Count | None = Field(default=None, description="the same, and it counts")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS, description="needs logprobs")
    tools: list[Any] | None = Field(default=None, description="not served, but for []")
    functions: list[Any] | None = Field(default=None, description="not served, but for []")
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class TokenizeRequest(Lenient):
    """Text, or messages as a chat would give them to the model."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "The capital of France is"}]})

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    add_special_tokens: bool | None = Field(default=None, description="true when left out, as for a completion")
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of prompt and messages")
        return self


class DetokenizeRequest(Lenient):
    model_config = ConfigDict(json_schema_extra={"examples": [{"tokens": [504, 3575, 282]}]})

    model: str | None = None
    tokens: Annotated[list[Count], Field(max_length=1 << 20, fail_fast=True)]


# ---- replies --------------------------------------------------------------------------------------------------------


class PromptDetails(Reply):
    cached_tokens: int = Field(description="of the prompt, what the model did not compute for this request")


class TokenUsage(Reply):
    """With a session, its past counts as prompt."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = Field(default=None, description="once it is known")


class CompletionLogprobs(Reply):
    """null for the first position of all, which nothing foretells."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Reply):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = Field(default=None, description="stop, length; cancelled: see `problem`")


class CompletionReply(Reply):
    """A completion, or a chunk of one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: TokenUsage | None = None
    session_id: str | None = None
    problem: Problem | None = Field(
        default=None, description="what ended a session's turn before its time; the text above is in the session"
    )


class LikelyToken(Reply):
    token: str
    logprob: float
    bytes: list[int] | None = Field(default=None, description="null for a part of a character")


class ToldToken(LikelyToken):
    top_logprobs: list[LikelyToken]


class ChatLogprobs(Reply):
    content: list[ToldToken]


class ChatAnswer(Reply):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(Reply):
    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None = None
    finish_reason: str = Field(description="stop, length; cancelled: see `problem`")


class ChatReply(Reply):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: TokenUsage
    session_id: str | None = None
    problem: Problem | None = Field(
        default=None, description="what ended a session's turn before its time; the text above is in the session"
    )


class ChatDelta(Reply):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Reply):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(Reply):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: TokenUsage | None = None


class Tokenized(Reply):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(Reply):
    prompt: str
