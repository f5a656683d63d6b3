"""`GET /v1/depthpar/plan` and `/v1/depthpar/stats` (vLLM's group `vllm.endpoint_plugins`).

vLLM loads this only where VLLM_PLUGINS names `depthpar`. The paths begin with /v1 because vLLM's
--api-key guards those and leaves others open. Both only read: nothing here reaches the engine.
"""

from __future__ import annotations

from argparse import Namespace
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, HTTPException, Query, Request
from pydantic import BaseModel, Field
from starlette.datastructures import State
from vllm.config import VllmConfig
from vllm.engine.protocol import EngineClient

from vllm_depthpar.errors import UserError
from vllm_depthpar.metrics import collector
from vllm_depthpar.plan.attached import plan_of, shape_of, source_of
from vllm_depthpar.plan.drawing import draw
from vllm_depthpar.predict import cost_model
from vllm_depthpar.predict.devices import THIS, device_named
from vllm_depthpar.predict.links import LINKS, link_named
from vllm_depthpar.predict.machines import Deployment, Workload
from vllm_depthpar.serving.stats import Stats, stats_of


class Error(BaseModel):
    """vLLM's form of an error."""

    error: dict[str, Any]


class Prediction(BaseModel):
    """How much faster than plain vLLM the plan decodes, computed and not measured."""

    device: str = Field(description="a name that `depthpar predict --device` takes")
    link: str | None = Field(description="between the ranks; null: one rank")
    batch: int
    context: int
    speedup: float = Field(description="over plain vLLM at the same tensor-parallel size")


class PlanAnswer(BaseModel):
    """The plan that this server runs."""

    model: str
    digest: str = Field(description="equal for equal plans")
    name: str
    source: str = Field(description="where the plan was given")
    plan: dict[str, Any] = Field(description="the plan's normal form; can be served as it is")
    layers: int = Field(description="layers of the checkpoint")
    effective_depth: int
    tensor_parallel_size: int
    picture: str = Field(description="the plan as `depthpar plan show` draws it")
    predicted: Prediction | None = Field(
        description="null where the machine or its link is not known"
    )


router = APIRouter(
    prefix="/v1/depthpar",
    tags=["depthpar"],
    responses={404: {"model": Error, "description": "the model that is served has no plan"}},
)


@router.get("/plan", responses={400: {"model": Error, "description": "no such device or link"}})
def get_plan(
    request: Request,
    device: Annotated[
        str, Query(description="whose speed to predict; `this`: as `depthpar predict` measured it")
    ] = THIS,
    link: Annotated[
        str | None,
        Query(
            description=f"between the ranks: {', '.join(LINKS)}, or latency=0.2ms,bandwidth=1gbit"
        ),
    ] = None,
    batch: Annotated[int, Query(ge=1, description="sequences that decode")] = 1,
    context: Annotated[int, Query(ge=0, description="tokens that each has in its cache")] = 1024,
) -> PlanAnswer:
    """Show the resolved plan, drawn, and its predicted speed-up for a machine that is known."""
    config = _served(request)
    plan, shape = plan_of(config.model_config), shape_of(config)
    tp = config.parallel_config.tensor_parallel_size
    source = str(source_of(config.model_config))
    try:
        predicted = _predict(config, device, link, batch, context)
    except UserError as error:
        raise HTTPException(HTTPStatus.BAD_REQUEST, str(error)) from error
    return PlanAnswer(
        model=config.model_config.served_model_name,
        digest=plan.digest,
        name=plan.name,
        source=source,
        plan=plan.to_spec(),
        layers=plan.layers,
        effective_depth=plan.depth,
        tensor_parallel_size=tp,
        picture=draw(plan, shape, tp, source),
        predicted=predicted,
    )


@router.get("/stats")
def get_stats(request: Request) -> Stats:
    """Show what `/metrics` says of the plan and of the engines' forward passes, as JSON."""
    _served(request)
    return stats_of(collector.collect())


def _predict(
    config: VllmConfig, device: str, link: str | None, batch: int, context: int
) -> Prediction | None:
    plan, shape = plan_of(config.model_config), shape_of(config)
    tp = config.parallel_config.tensor_parallel_size
    joins = link_named(link) if link is not None and tp > 1 else None
    if tp > 1 and joins is None:
        return None
    try:
        runs_on = device_named(device)
    except UserError:
        if device == THIS:  # not measured; nobody asked for it either
            return None
        raise
    return Prediction(
        device=runs_on.name,
        link=joins.name if joins is not None else None,
        batch=batch,
        context=context,
        speedup=cost_model.speedup(
            shape, plan, Deployment(runs_on, joins, tp), Workload(batch, context)
        ),
    )


def _served(request: Request) -> VllmConfig:
    """Read the config of a restructured model."""
    config: VllmConfig | None = request.app.state.depthpar
    if config is None or source_of(config.model_config) is None:
        raise HTTPException(HTTPStatus.NOT_FOUND, "the model that is served has no plan")
    return config


class DepthParEndpoints:
    """vLLM's `EndpointPlugin`."""

    name = "depthpar"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes; and the metrics, whose own entry point VLLM_PLUGINS may not name."""
        collector.register()
        app.include_router(router)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Keep what the routes read; a server without an engine has none."""
        state.depthpar = engine_client.vllm_config if engine_client is not None else None
