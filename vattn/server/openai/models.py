"""``/v1/models``."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel

from vattn.server.openai.common import check_model
from vattn.server.state import ServerState, state_of

router = APIRouter()


class ModelCard(BaseModel):
    """A name of the model. ``root`` is what was loaded."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "vattn"
    root: str
    parent: None = None
    max_model_len: int


class ModelList(BaseModel):
    """All names of the model that is served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


@router.get("/v1/models")
async def models(request: Request) -> ModelList:
    """What clients may give as ``model``."""
    state = state_of(request)
    return ModelList(data=[_card(state, name) for name in state.settings.served_model_names])


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> ModelCard:
    """One of them."""
    state = state_of(request)
    return _card(state, check_model(state, name))


def _card(state: ServerState, name: str) -> ModelCard:
    facts = state.llm.facts
    return ModelCard(
        id=name, created=state.created, root=facts.model, max_model_len=facts.max_model_len
    )
