"""What a Prometheus server scrapes."""

import asyncio

from fastapi import APIRouter, Depends, Request, Response

from service.auth import METRICS, metrics_reader
from service.metrics import Exposition
from service.openapi import Documented

router = APIRouter(tags=["operations"], default_response_class=Response, dependencies=[Depends(metrics_reader)])

_RESPONSES: Documented = {
    200: {"description": "Prometheus text, or OpenMetrics as `Accept` asks.", "content": {"text/plain": {}}}
}


@router.get(METRICS, responses=_RESPONSES)
async def metrics(request: Request) -> Response:
    """What the service holds and has done, in numbers; also while it loads or drains."""
    exposition: Exposition = request.app.state.exposition
    body, content_type = await asyncio.to_thread(exposition.render, request.headers.get("accept", ""))
    return Response(body, headers={"Content-Type": content_type, "Cache-Control": "no-store"})
