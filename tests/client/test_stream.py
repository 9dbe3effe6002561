"""The parser and the reader of server-sent events, however the bytes are cut."""

import pytest

from keypast import errors
from keypast._stream import EventParser, StreamReader
from keypast.schemas import Code, StreamEnd, StreamToken, Timings

from .fake import event, problem

EVENTS = (
    ": ping\n\n"
    "event: x\nid: 7\nretry: 5\n\n"
    "data: one\r\n\r\n"
    "data:two\rdata:  dos\r\r"
    "data: é\u2028ü\n"
    "\n"
    "data\n\n"
    "data: [DONE]\n\n"
    "data: never ended"
).encode()
WANTED = ["one", "two\n dos", "é\u2028ü", "", "[DONE]"]
TOKEN = StreamToken(token_ids=[1, None], text=["é", ""], valid_length=[3, 2], version=4)
END = StreamEnd(
    finish_reason=["length", "stop"],
    past_length=[2, 2],
    valid_length=[3, 2],
    version=4,
    computed=[1, 0],
    reused=[2, 2],
    shared=[0, 0],
    timings=Timings(queue_ms=0, compute_ms=1),
)


@pytest.mark.parametrize("cut", range(len(EVENTS) + 1))
def test_events_cut_at_every_byte(cut: int) -> None:
    parser = EventParser()
    assert [*parser.feed(EVENTS[:cut]), *parser.feed(EVENTS[cut:])] == WANTED


def test_events_byte_by_byte() -> None:
    parser = EventParser()
    assert [data for at in range(len(EVENTS)) for data in parser.feed(EVENTS[at : at + 1])] == WANTED


class Moves(list[tuple[int, list[int]]]):
    def __call__(self, version: int, valid_length: list[int]) -> None:
        self.append((version, valid_length))


def test_tokens_and_the_end() -> None:
    moves = Moves()
    reader = StreamReader(moves)
    [token] = reader.feed(event(TOKEN) + event(END) + b"data: [DONE]\n\ndata: dropped\n\n")
    assert (token.text, token.texts, token.token_id, token.token_ids) == ("é", ["é", ""], 1, [1, None])
    assert moves == [(4, [3, 2]), (4, [3, 2])]
    assert reader.end == END
    assert list(reader.feed(b"data: dropped too\n\n")) == []
    reader.finish()


def test_held_back_text_comes_as_a_last_token() -> None:
    reader = StreamReader(Moves())
    end = END.model_copy(update={"text": ["st", ""]})
    [token] = reader.feed(event(end))
    assert (token.text, token.token_ids, token.valid_length) == ("st", [None, None], [3, 2])
    assert list(reader.feed(event(END.model_copy(update={"text": ["", ""]})))) == []


@pytest.mark.parametrize("sent", [b"", event(TOKEN), event(END), b"data: [DONE]\n\n"])
def test_too_early_an_end(sent: bytes) -> None:
    reader = StreamReader(Moves())
    list(reader.feed(sent))
    with pytest.raises(errors.StreamBroken):
        reader.finish()


def test_an_error_event_after_tokens() -> None:
    reader = StreamReader(Moves())
    body = problem(Code.SESSION_GONE, "gone", reason="deleted").content
    tokens = reader.feed(event(TOKEN) + b"data: " + body + b"\n\ndata: [DONE]\n\n")
    assert next(tokens).text == "é"
    with pytest.raises(errors.SessionGone, match="gone") as caught:
        next(tokens)
    assert caught.value.reason == "deleted"


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b'{"error": {"message": "no", "type": "x", "code": "model_failed"}}', errors.ModelFailed),
        (b'{"error": {"message": "no", "type": "x"}}', errors.ServerError),
        (b'{"error": "no"}', errors.ProtocolError),
        (b"{", errors.ProtocolError),
        (b"7", errors.ProtocolError),
        (b"[]", errors.ProtocolError),
        (b'{"text": []}', errors.ProtocolError),
        (b'{"finish_reason": "stop"}', errors.ProtocolError),
    ],
)
def test_other_events(data: bytes, kind: type[errors.KeypastError]) -> None:
    with pytest.raises(kind):
        list(StreamReader(Moves()).feed(b"data: " + data + b"\n\n"))
