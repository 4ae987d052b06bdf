"""`/v1/models`: the models that the key may use and that are served or, with `?all=true`, known."""

from typing import Any

from events.money import usd
from events.schema import Price
from rift.catalogue import Catalogue
from rift.gateway.admission.admission import Admission
from rift.gateway.asgi.errors import HTTPError
from rift.gateway.asgi.request import Request
from rift.gateway.state import LogState

MILLION = 1_000_000


class ModelRoutes:
    """The default model comes first, as in the catalogue."""

    def __init__(self, state: LogState, models: Catalogue, admission: Admission) -> None:
        self._book = state.book
        self._fleet = state.fleet
        self._models = models
        self._admission = admission

    async def all(self, request: Request) -> None:
        key = self._admission.auth.authenticate(request, None).key
        whole = request.asks("all")
        allowed = [name for name in self._models if self._admission.auth.may_use(name, key)]
        names = [name for name in allowed if whole or self._admission.serves(name)]
        await request.answer(200, {"object": "list", "data": [self._shown(name) for name in names]})

    async def one(self, request: Request, id: str) -> None:
        key = self._admission.auth.authenticate(request, None).key
        if id not in self._models:
            message = f"model {id!r} was not found; see /v1/models?all=true"
            raise HTTPError(404, message, code="model_not_found", param="model")
        self._admission.auth.check_model(id, key)
        await request.answer(200, self._shown(id))

    def _shown(self, name: str) -> dict[str, Any]:
        model = self._models[name]
        price = self._book.price(name)
        shown = {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "rift",
            "title": model.title,
            "context_tokens": model.context_tokens,
            "max_model_len": model.context_tokens,
            "default": name == next(iter(self._models)),
            "ready": self._fleet.is_ready(name),
            "replicas": self._fleet.count(name, "ready"),
            "starting": self._fleet.count(name, "starting"),
        }
        if price is not None:
            shown |= _prices(price)
        return shown


def _prices(price: Price) -> dict[str, Any]:
    """Return all prices of a model: in nano-USD, and in USD per million tokens and per second."""
    cached, second = price.cached_prompt_nanousd, price.second_nanousd
    nanousd = {
        "prompt_token": price.prompt_nanousd,
        # Without a price of their own, cached tokens cost as much as others.
        "cached_prompt_token": price.prompt_nanousd if cached is None else cached,
        "output_token": price.output_nanousd,
    }
    per_million = {f"million_{name}s": usd(each * MILLION) for name, each in nanousd.items()}
    return {
        "price_nanousd": {**nanousd, "second": second},
        "price_usd": {**per_million, "second": None if second is None else usd(second)},
    }
