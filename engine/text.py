"""Text to token ids and back, on top of a model's own tokenizer.json and chat template.

What a caller writes is text and nothing else. Control tokens such as <|im_start|> steer a model, so a caller who could
write one could forge a turn or end one; here `encode` takes them apart as ordinary characters unless it is asked not
to, and in a chat only the template's own are tokens (see `_Guard`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from engine.chat import MAX_CHARACTERS, ChatTemplate, read_messages, valid_text
from engine.errors import InvalidInput

if TYPE_CHECKING:  # which brings torch; until there are models, /livez and /readyz answer without it
    from engine.checkpoints.weights import Checkpoint

_REPLACEMENT = "\ufffd"  # what bytes that are not UTF-8, or not yet, decode to
_HELD_TOKENS = 64  # bytes that are no character after so many tokens will not become one
_PRIVATE_USE = range(0xE000, 0xF900)


class Tokenizer:
    """`encode` and `render_chat` raise InvalidInput naming the field; nothing here is changed after construction."""

    def __init__(
        self, tokenizer_json: str, chat_template: str | None = None, special_tokens: Mapping[str, str] | None = None
    ) -> None:
        """`special_tokens`: what the template may name. Raises InvalidInput("model", ...) for a broken file."""
        # Two of them, because whether control tokens are parsed is a property of the object: a switch between
        # calls would race between threads.
        self._parsing = _load(tokenizer_json)
        self._plain = _load(tokenizer_json)
        self._plain.encode_special_tokens = True
        self._control = {
            token.content: (i, token)
            for i, token in self._parsing.get_added_tokens_decoder().items()
            if token.special and token.content
        }
        self._special_ids = frozenset(i for i, _ in self._control.values())
        unknown = getattr(self._plain.model, "unk_token", None)  # what cannot be encoded becomes it: text, not control
        self._control_ids = frozenset(i for content, (i, _) in self._control.items() if content != unknown)
        self._guard = _Guard(self._control)
        self._template = ChatTemplate(chat_template, special_tokens or {}) if chat_template is not None else None

    @classmethod
    def open(cls, checkpoint: Checkpoint) -> Tokenizer | None:
        """None for a checkpoint without a tokenizer.json."""
        if checkpoint.tokenizer_path is None:
            return None
        text = _read(checkpoint.tokenizer_path)
        return cls(text, checkpoint.chat_template, checkpoint.special_tokens)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """`add_special`: with what the model expects around a text (BOS). `parse_special`: <|...|> in it is control."""
        if len(text) > MAX_CHARACTERS:
            raise InvalidInput("text", f"is longer than {MAX_CHARACTERS} characters")
        tokenizer = self._parsing if parse_special else self._plain
        encoding = tokenizer.encode(valid_text("text", text), add_special_tokens=add_special)
        ids: list[int] = encoding.ids
        if not parse_special and not self._control_ids.isdisjoint(ids):
            mask: list[int] = encoding.special_tokens_mask  # 1 for what `add_special` added
            if any(i in self._control_ids and not added for i, added in zip(ids, mask, strict=True)):
                raise InvalidInput("text", "would become a control token of this model")
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        text: str = self._parsing.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def is_special(self, token: int) -> bool:
        """Whether it is a control token, which `decode` leaves out."""
        return token in self._special_ids

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, continuing: bool = False) -> list[int]:
        """The ids of a conversation up to where the assistant's reply begins.

        `continuing`: the messages come after a reply that is already in the session, without the token that ended it.
        The ids begin with what closes that reply (<|im_end|> and a line break, say), and no system prompt is repeated.
        """
        if self._template is None:
            raise InvalidInput("messages", "this model has no chat template; give it text")
        read = read_messages(messages)
        unused = _unused_characters([self._template.source, *self._control, *(m["content"] for m in read)])
        mark, reply = next(unused), next(unused)
        guarded = [{**message, "content": self._guard.protect(message["content"], mark)} for message in read]
        if continuing:
            earlier = [{"role": "user", "content": "."}, {"role": "assistant", "content": reply}]
            _, found, text = self._template.render([*earlier, *guarded]).partition(reply)
            if not found or reply in text:
                raise InvalidInput("messages", "the model's chat template does not repeat earlier replies")
        else:
            text = self._template.render(guarded)
        return self._encode_guarded(text, mark) if mark in text else self.encode(text, parse_special=True)

    def _encode_guarded(self, text: str, mark: str) -> list[int]:
        """The control tokens that no mark breaks are the template's; all between them is plain, without the marks."""
        ids: list[int] = []
        at, strip = 0, False
        for match in self._guard.pattern.finditer(text):
            i, token = self._control[match[0]]
            between = text[at : match.start()].replace(mark, "")
            between = between.lstrip() if strip else between
            ids += self.encode(between.rstrip() if token.lstrip else between)
            ids.append(i)
            at, strip = match.end(), token.rstrip
        rest = text[at:].replace(mark, "")
        return ids + self.encode(rest.lstrip() if strip else rest)


class _Guard:
    """Keeps contents from forging control tokens while a template handles them.

    A mark (a character that occurs nowhere else) is put inside every control token's text in a content, and at an end
    of a content that could make one together with its neighbour. The template sees the content otherwise as it is, so
    that its own tests and trimming work; after it the marks tell the template's tokens from the caller's, and go.
    A template that deletes characters from inside a content is the operator's to trust.
    """

    def __init__(self, control: Iterable[str]) -> None:
        tokens = sorted(control, key=len, reverse=True)  # the longest wins, as in tokenizers
        self.tokens = tokens
        self.pattern = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        self.longest = len(tokens[0]) if tokens else 0
        self.starts = {token[:k] for token in tokens for k in range(1, len(token))}
        self.ends = {token[-k:] for token in tokens for k in range(1, len(token))}

    def protect(self, content: str, mark: str) -> str:
        while self.pattern.search(content):  # again, for tokens that overlap
            content = self.pattern.sub(lambda match: self._broken(match[0], mark), content)
        core = content.strip()  # templates trim, so what matters is what is inside the blanks
        if not core:
            return content
        before, after = content[: content.index(core)], content[content.index(core) + len(core) :]
        lengths = range(1, min(self.longest, len(core) + 1))
        if any(core[-k:] in self.starts for k in lengths):
            core += mark
        if any(core[:k] in self.ends for k in lengths) or any(core in token for token in self.tokens):
            core = mark + core
        return before + core + after

    def _broken(self, token: str, mark: str) -> str:
        if len(token) == 1:
            raise InvalidInput("messages", f"hold {token!r}, which is a control token of this model")
        return token[0] + mark + token[1:]


class StreamDecoder:
    """Token ids one by one to text, only whole characters: `feed(a) + feed(b) + ... + flush() == decode([a, b, ...])`.

    What follows a token can change how it decodes (a character's missing bytes, a word's leading blank), so the last
    emitted tokens are decoded again in front of the held ones, and a text ending in U+FFFD waits. Where the pieces may
    differ from the whole is in bytes that are not UTF-8, which some tokenizers spoil their valid neighbours for.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._context: list[int] = []  # emitted tokens that still decide how the next ones decode
        self._held: list[int] = []
        self._emitted = 0  # characters of decode(context + held) that are out

    def feed(self, token: int) -> str:
        if self._skip_special and self._tokenizer.is_special(token):
            return ""
        self._held.append(token)
        text = self._decode()
        stable = text if len(self._held) > _HELD_TOKENS else text.rstrip(_REPLACEMENT)
        new = stable[self._emitted :]
        self._emitted = max(self._emitted, len(stable))
        if len(stable) == len(text):
            # A token that showed nothing may still decide about the next one: a first blank is not shown.
            self._context = self._held if new else self._context + self._held
            self._held = []
            self._emitted = len(self._decode())
        return new

    def flush(self) -> str:
        """What was held, bytes that are no character as U+FFFD."""
        new = self._decode()[self._emitted :]
        self._context, self._held, self._emitted = [], [], 0
        return new

    def _decode(self) -> str:
        return self._tokenizer.decode(self._context + self._held, skip_special=self._skip_special)


class StopStrings:
    """A StreamDecoder that ends before the first of `stops` to be complete, and holds back what could become one."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        if not all(stops):
            raise InvalidInput("stop", "must not hold an empty text")
        self._decoder = StreamDecoder(tokenizer)
        self._stops = list(stops)
        self._held = ""
        self.matched: str | None = None

    def feed(self, token: int) -> tuple[str, bool]:
        """(text to emit now, whether a stop string is complete); after it nothing more is to be fed."""
        return self._cut(self._decoder.feed(token))

    def flush(self) -> str:
        """The end of a reply that no stop string ended."""
        text, stopped = self._cut(self._decoder.flush())
        if not stopped:
            text, self._held = text + self._held, ""
        return text

    def _cut(self, new: str) -> tuple[str, bool]:
        text = self._held + new
        found = [(text.index(stop) + len(stop), text.index(stop), stop) for stop in self._stops if stop in text]
        if found:
            _, at, self.matched = min(found)  # where it ends: the same whether characters come one by one or in tokens
            self._held = ""
            return text[:at], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin `stop`."""
    return next((k for k in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:k])), 0)


def _unused_characters(texts: Iterable[str]) -> Iterator[str]:
    used: set[str] = set().union(*texts)
    free = [chr(code) for code in _PRIVATE_USE if chr(code) not in used]
    if len(free) < 2:
        raise InvalidInput("messages", "use every private-use character there is")
    return iter(free)


def _load(tokenizer_json: str) -> Any:  # noqa: ANN401  tokenizers is not typed
    try:
        tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the only class the tokenizers package raises
        raise InvalidInput("model", f"tokenizer.json cannot be used: {error}") from error
    tokenizer.no_truncation()  # a file may ask to cut or pad every text; a session's ids are exactly its text's
    tokenizer.no_padding()
    return tokenizer


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InvalidInput("model", f"{path} cannot be read: {error}") from error
