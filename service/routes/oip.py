"""The Open Inference Protocol v2: what is served, and inference over sequences or with a past of its own.

    GET  /v2, /v2/health/live, /v2/health/ready
    GET  /v2/models/{m}[/versions/1], .../config, .../ready
    POST /v2/models/{m}[/versions/1]/infer

A request outside of a sequence has a session of its own that ends with it: its past is imported, one append runs, the
present is exported. So nothing here computes anything.
"""

from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from typing import Any, NamedTuple

from fastapi import APIRouter, Request, Response

from engine.batch import AppendResult, Array, ExportPast, ImportPast, Once
from engine.errors import ModelNotFound, PoolExhausted, SessionGone, SessionNotFound
from engine.past import check_past
from engine.specs import ModelSpec
from engine.stats import SessionInfo
from keypast.oip import (
    EXTENSIONS,
    HEADER,
    ConfigTensor,
    ConfigText,
    InferRequest,
    ModelConfig,
    ModelMetadata,
    SequenceBatching,
    ServerMetadata,
    TensorMetadata,
    header_size,
    read_infer,
    write_infer,
)
from keypast.schemas import Reply
from keypast.wire import JSON_TYPE, LONGEST_NAME, OCTETS_TYPE, AppendBody, MalformedError, parse_if_match, reply_headers
from service.auth import Tenant
from service.bodies import coding_asked, packed
from service.errors import BodyTooLarge
from service.lifecycle import Service, service_of
from service.limits import json_limit, read_body
from service.logs import audit
from service.oip import (
    VERSION,
    Call,
    Sequence,
    Tensor,
    call_of,
    further_outputs,
    inputs_of,
    outputs_of,
    outputs_told,
    present_of,
    told_of_pasts,
)
from service.once import once_of, replay_headers
from service.openapi import Documented, infer_reply, infer_request, refusals, reply
from service.routes.inference import append_of, coded, reply_of, size_of, told_of
from service.text import TextModel

PLATFORM = "keypast"

router = APIRouter(prefix="/v2", tags=["open inference protocol"], default_response_class=Response)

_Handler = Callable[..., Any]
_READY: Documented = {200: {"description": "It takes work."}, 503: {"description": "It takes none."}}
_UNSHOWN: dict[str, Any] = {"include_in_schema": False}


def _model_route(method: str, what: str, responses: Documented, extra: dict[str, Any] | None = None) -> _Handler:
    """Of a model, whose name may have slashes, and of its version, which the reference leaves out."""

    def routed(handler: _Handler) -> _Handler:
        documented: dict[str, Any] = {"methods": [method], "responses": responses, "openapi_extra": extra}
        router.add_api_route(f"/models/{{model:path}}/versions/{{version}}{what}", handler, **documented, **_UNSHOWN)
        router.add_api_route(f"/models/{{model:path}}{what}", handler, **documented)
        return handler

    return routed


# ---- what is served -------------------------------------------------------------------------------------------------


@router.get("", responses={200: reply(ServerMetadata, "The service, and the extensions that it has."), **refusals()})
async def server_metadata() -> Response:
    return _told(ServerMetadata(name=PLATFORM, version=version("keypast"), extensions=list(EXTENSIONS)))


@router.get("/health/live", responses={200: {"description": "The process answers."}, **refusals()})
async def live() -> Response:
    """The status says it all. There is no body, as Triton has none: its asyncio client leaves a body unread, and then
    loses the connection."""
    return Response()


@router.get("/health/ready", responses=_READY)
async def ready(request: Request) -> Response:
    return _ready(service_of(request))


@_model_route("GET", "/ready", {**_READY, **refusals(404)})
async def model_ready(request: Request, model: str) -> Response:
    _spec(request, model)
    return _ready(service_of(request))


def _ready(service: Service) -> Response:
    return Response() if service.status == "ready" else Response(None, 503, {"Retry-After": "1"})


@_model_route("GET", "/config", {200: reply(ModelConfig, "In Triton's words."), **refusals(404, 503)})
async def model_config(request: Request, model: str) -> Response:
    spec, settings = _spec(request, model), service_of(request).settings
    reads_text = _reads_text(request, spec)
    further = ConfigText(string_value=",".join(further_outputs(spec)))
    config = ModelConfig(
        name=spec.name,
        platform=PLATFORM,
        backend=PLATFORM,
        max_batch_size=0,
        input=[_config(tensor, tensor.optional) for tensor in inputs_of(spec, reads_text)],
        output=[_config(tensor) for tensor in outputs_of(spec, reads_text)],
        sequence_batching=SequenceBatching(max_sequence_idle_microseconds=int(settings.sequence_seconds * 1e6)),
        parameters={"further_outputs": further},
    )
    return _told(config)


@_model_route("GET", "", {200: reply(ModelMetadata, "Its tensors."), **refusals(404, 503)})
async def model_metadata(request: Request, model: str) -> Response:
    spec = _spec(request, model)
    reads_text = _reads_text(request, spec)

    def shown(tensors: list[Tensor]) -> list[TensorMetadata]:
        return [TensorMetadata(name=each.name, datatype=each.datatype, shape=each.shape) for each in tensors]

    inputs, outputs = shown(inputs_of(spec, reads_text)), shown(outputs_of(spec, reads_text))
    return _told(ModelMetadata(name=spec.name, versions=[VERSION], platform=PLATFORM, inputs=inputs, outputs=outputs))


def _config(tensor: Tensor, optional: bool | None = None) -> ConfigTensor:
    kind = "STRING" if tensor.datatype == "BYTES" else tensor.datatype
    return ConfigTensor(name=tensor.name, data_type=f"TYPE_{kind}", dims=tensor.shape, optional=optional)


def _told(body: Reply, status: int = 200) -> Response:
    return Response(body.model_dump_json(exclude_none=True), status, media_type=JSON_TYPE)


def _spec(request: Request, model: str) -> ModelSpec:
    """Raises ModelNotFound, NotReady."""
    specs = service_of(request).engine.specs
    asked = request.path_params.get("version", VERSION)
    if model not in specs or asked != VERSION:
        named = model if asked == VERSION else f"{model} version {asked}"
        raise ModelNotFound(named[:LONGEST_NAME], sorted(specs))
    return specs[model]


def _reads_text(request: Request, spec: ModelSpec) -> bool:
    return service_of(request).text_model(spec.name) is not None


# ---- inference ------------------------------------------------------------------------------------------------------


class _Asking(NamedTuple):
    """A call on its way."""

    request: Request
    service: Service
    spec: ModelSpec
    tenant: str
    call: Call


class _Answer(NamedTuple):
    """What it gave. `presents` by name, those that were asked for."""

    result: AppendResult
    text: TextModel | None
    presents: dict[str, Array]

    @property
    def size(self) -> int:
        return size_of(self.result) + sum(array.nbytes for array in self.presents.values())


@_model_route(
    "POST",
    "/infer",
    {200: infer_reply(), **refusals(400, 404, 409, 410, 412, 413, 422, 429, 500, 503)},
    infer_request(),
)
async def infer(request: Request, model: str, tenant: Tenant) -> Response:
    """One append: in the sequence that `parameters.sequence_id` names, or on its own, with the past that it brings."""
    spec, service = _spec(request, model), service_of(request)
    body, header = await _body(request, service)
    reads_text = _reads_text(request, spec)

    def parsed() -> tuple[InferRequest, Call, Once]:
        asked = read_infer(body, header)
        call = call_of(spec, reads_text, asked)
        return asked.request, call, once_of(request, b"" if call.sequence is None else body)

    asked, call, once = await coded(len(body), parsed)
    asking = _Asking(request, service, spec, tenant, call)
    answer = await (_alone(asking) if call.sequence is None else _in_sequence(asking, call.sequence, once))
    coding = coding_asked(request.headers.get("accept-encoding", ""))
    return await coded(answer.size, lambda: _response(spec, call, asked, answer, coding, replay_headers(once)))


async def _body(request: Request, service: Service) -> tuple[bytes, int | None]:
    """And how much of it is JSON; None: all. Raises MalformedError, BodyTooLarge and what `read_body` raises."""
    header = header_size(request.headers.getlist(HEADER))
    most = json_limit(service.settings)
    if header is not None and header > most:
        raise BodyTooLarge(most)
    return await read_body(request, most if header is None else service.settings.max_body_bytes), header


async def _in_sequence(asking: _Asking, sequence: Sequence, once: Once) -> _Answer:
    """Raises MalformedError where there is no such sequence and none is started."""
    info = _started(asking, sequence) if sequence.start else _found(asking, sequence)
    try:
        expected = None if sequence.start else parse_if_match(asking.request.headers.get("if-match"))
        answer = await _append(asking, info, not sequence.start, expected, once)
    except BaseException:
        if sequence.start:  # what could not begin is not there
            _close(asking, info)
        raise
    if sequence.end:
        _close(asking, info)
    return answer


def _started(asking: _Asking, sequence: Sequence) -> SessionInfo:
    """As in Triton, whatever has the id ends."""
    engine = asking.service.engine
    with suppress(SessionNotFound, SessionGone):
        engine.delete_session(sequence.session_id, asking.tenant)
        audit(asking.request, "delete", sequence.session_id)
    info = engine.create_session(
        asking.spec.name,
        tenant=asking.tenant,
        session_id=sequence.session_id,
        batch_size=asking.call.rows,
        ttl_seconds=asking.service.settings.sequence_seconds,
        labels={"sequence_id": str(sequence.given)},
    )
    audit(asking.request, "create", info.id, model=info.model)
    return info


def _found(asking: _Asking, sequence: Sequence) -> SessionInfo:
    try:
        return asking.service.engine.session(sequence.session_id, asking.tenant)
    except (SessionNotFound, SessionGone) as error:
        how = f" ({error})" if isinstance(error, SessionGone) else ""
        raise MalformedError(
            "sequence_id", f"no sequence has it{how}; the first request of a sequence has sequence_start"
        ) from None


def _close(asking: _Asking, info: SessionInfo) -> None:
    """Unless it is gone, and another may have its id."""
    engine = asking.service.engine
    with suppress(SessionNotFound, SessionGone):
        if engine.session(info.id, asking.tenant).created_at == info.created_at:
            engine.delete_session(info.id, asking.tenant)
            if asking.call.sequence is not None:
                audit(asking.request, "delete", info.id)


async def _alone(asking: _Asking) -> _Answer:
    """In a session of its own. Raises PoolExhausted where that had to make room for others halfway."""
    _, service, spec, tenant, call = asking
    info = service.engine.create_session(spec.name, tenant=tenant, batch_size=call.rows)
    try:
        with told_of_pasts():
            await _bring(asking, info)
        begun = call.past is not None and all(call.past.valid_length)
        answer = await _append(asking, info, begun)
        if not call.presents:
            return answer
        export = await service.worker.export_past(ExportPast(info.id, tenant), asking.request.receive)
        slots = 0 if call.past is None else call.past.arrays["key_past.0"].shape[3]
        presents = {name: present_of(export.past, name, slots) for name in call.presents}
        return answer._replace(presents=presents)
    except SessionGone:
        raise PoolExhausted("its blocks were needed elsewhere; try again") from None
    finally:
        _close(asking, info)


async def _bring(asking: _Asking, info: SessionInfo) -> None:
    """The past of the call, if it has any. Raises InvalidInput and its children."""
    past, rows = asking.call.past, len(info.valid_length)
    if past is None:
        return
    if any(past.valid_length):
        operation = ImportPast(info.id, past, asking.tenant)
        await asking.service.worker.import_past(operation, asking.request.receive)
    else:
        check_past(asking.spec, past, rows)


async def _append(
    asking: _Asking, info: SessionInfo, begun: bool, expected: int | None = None, once: Once | None = None
) -> _Answer:
    request, service, spec, tenant, call = asking
    body = AppendBody(call.append(spec, begun=begun), dict(call.arrays), "nested")
    operation, text = append_of(service, info.id, tenant, expected, once, body)
    return _Answer(await service.worker.append(operation, request.receive), text, {})


# ---- the reply ------------------------------------------------------------------------------------------------------


def _response(
    spec: ModelSpec, call: Call, asked: InferRequest, answer: _Answer, coding: str | None, headers: dict[str, str]
) -> Response:
    reply, arrays = reply_of(answer.result, answer.text)
    given = {**outputs_told(reply, arrays), **answer.presents}
    told: dict[str, Any] = {"model_name": spec.name, "model_version": VERSION}
    if asked.id is not None:
        told["id"] = asked.id
    if call.sequence is not None:
        told["parameters"] = {"sequence_id": call.sequence.given, "version": reply.version}
        headers = headers | reply_headers(told_of(answer.result))
    outputs = {name: given[name] for name in call.outputs if name in given}
    written = write_infer(told, outputs, call.binary)
    if written.header is not None:
        headers[HEADER] = str(written.header)
    body = written.body
    if coding is not None:
        headers["Content-Encoding"] = coding
        body = packed(body, coding)
    return Response(body, 200, headers, JSON_TYPE if written.header is None else OCTETS_TYPE)
