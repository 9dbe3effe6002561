"""What is loaded, and how much room it has."""

import dataclasses

from fastapi import APIRouter, Request, Response

from engine.specs import ModelSpec, TensorSpec
from engine.stats import ModelCapacity
from keypast.schemas import Capacity, ModelCard, ModelList, OwnBlocks, PoolUsage, Quota, QuotaUse, TensorInfo, Usage
from keypast.wire import JSON_TYPE
from service.auth import Tenant
from service.lifecycle import service_of
from service.openapi import problems, reply

router = APIRouter(prefix="/v1", tags=["models"], default_response_class=Response)


@router.get("/models", responses={200: reply(ModelList, "The loaded models."), **problems(503)})
async def list_models(request: Request) -> Response:
    """The loaded models, in OpenAI's list shape."""
    service = service_of(request)
    cards = [_card(spec, int(service.loaded_at)) for spec in service.engine.specs.values()]
    return Response(ModelList(data=cards).model_dump_json(exclude_none=True), media_type=JSON_TYPE)


@router.get("/capacity", responses={200: reply(Capacity, "Blocks and bytes of every pool."), **problems(503)})
async def capacity(request: Request, tenant: Tenant) -> Response:
    """Blocks and bytes: free, used, shared, reserved; the caller's quota, and what it uses of it."""
    shown = service_of(request).engine.capacity(tenant)
    use = QuotaUse(
        sessions=shown.use.sessions,
        pinned=shown.use.pinned,
        concurrent_appends=shown.use.appends,
        positions=shown.use.owed,
    )
    own = Capacity(
        pools=[_pool(model) for model in shown.models],
        sessions=use.sessions,
        quota=Quota(**dataclasses.asdict(shown.quota)),
        use=use,
    )
    return Response(own.model_dump_json(), media_type=JSON_TYPE)


def _card(spec: ModelSpec, created: int) -> ModelCard:
    return ModelCard(
        id=spec.name,
        created=created,
        kind=spec.kind,
        max_length=spec.max_length,
        dtype=spec.dtype,
        device=spec.device,
        fingerprint=spec.fingerprint,
        inputs=[_tensor(tensor) for tensor in spec.inputs],
        outputs=[_tensor(tensor) for tensor in spec.outputs],
        vocab_size=spec.vocab_size,
    )


def _tensor(tensor: TensorSpec) -> TensorInfo:
    shape = ["B", tensor.axis, *tensor.trailing]
    return TensorInfo(name=tensor.name, dtypes=list(tensor.dtypes), shape=shape, required=tensor.required)


def _pool(model: ModelCapacity) -> PoolUsage:
    def usage(unit: int) -> Usage:
        return Usage(
            total=model.total * unit,
            free=model.free * unit,
            used=model.used * unit,
            shared=model.shared * unit,
            reserved=model.reserved * unit,
        )

    return PoolUsage(
        model=model.model,
        block_size=model.block_size,
        blocks=usage(1),
        bytes=usage(model.block_bytes),
        own=OwnBlocks(used=model.own, available=model.available),
    )
