"""luthier schema"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from luthier.core.errors import ConfigError, did_you_mean
from luthier.faces.cli.flags import Parser, make_parser
from luthier.faces.cli.results import print_json

VERBS = {
    "tune": "luthier.verbs.tune:Tune",
    "evaluate": "luthier.verbs.evaluate:Evaluate",
    "generate": "luthier.verbs.generate:Generate",
    "index": "luthier.verbs.index:Index",
    "merge": "luthier.verbs.merge:Merge",
    "report": "luthier.verbs.report:Report",
}
CATALOGS = {
    "objective": "luthier.training.objectives:OBJECTIVES",
    "reward": "luthier.training.rewards:REWARDS",
    "loss": "luthier.training.losses:LOSSES",
    "optimizer": "luthier.training.optimizers:OPTIMIZERS",
    "schedule": "luthier.training.schedules:SCHEDULES",
    "adapter": "luthier.models.adapters:ADAPTERS",
}


def parser() -> Parser:
    made = make_parser("schema", "Every setting of a verb as JSON schema, with the parts that fit each catalog.")
    made.add_argument("verb", help=f"one of {', '.join(VERBS)}")
    return made


def run(arguments: Sequence[str]) -> int:
    found = parser().parse(arguments)
    if found.verb not in VERBS:
        raise ConfigError(f"there is no verb {found.verb!r}; {did_you_mean(found.verb, VERBS)}")
    schema: dict[str, Any] = _find(VERBS[found.verb]).model_json_schema()
    if found.verb == "tune":
        schema["parts"] = {}
        for noun, where in CATALOGS.items():
            catalog = _find(where)
            schema["parts"][noun] = {name: catalog.load(name).model_json_schema() for name in catalog.names()}
    print_json(schema)
    return 0


def _find(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)
