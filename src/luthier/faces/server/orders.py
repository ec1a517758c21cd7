"""What a fine-tuning job may ask for, and the settings of Tune that it comes to."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, JsonValue, StringConstraints, model_validator

from luthier.faces.server.drawing import Body
from luthier.faces.server.keys import Key
from luthier.faces.server.refusals import Refusal, unknown
from luthier.faces.server.server import Server
from luthier.faces.server.store import Store, Thing

Auto: TypeAlias = Literal["auto"]
Metadata: TypeAlias = Annotated[
    dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]],
    Field(max_length=16),
]
# What a job says in fields of its own, or what is the server's business.
TAKEN = ("model", "data", "name", "seed", "rate_multiplier")


class Hyperparameters(Body):
    """How to learn; auto: what suits the rows and the model, as for `luthier tune`."""

    n_epochs: Annotated[int, Field(ge=1, le=1000)] | Auto = "auto"
    batch_size: Annotated[int, Field(ge=1, le=4096)] | Auto = "auto"
    learning_rate_multiplier: Annotated[float, Field(gt=0)] | Auto = "auto"
    """Times the learning rate that auto chooses."""


class DpoHyperparameters(Hyperparameters):
    beta: Annotated[float, Field(gt=0)] | Auto = "auto"
    """How strongly the model is held to its start."""


class Supervised(Body):
    hyperparameters: Hyperparameters = Hyperparameters()


class Dpo(Body):
    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class Method(Body):
    """What to learn from: answers (supervised), or pairs of which one is liked better (dpo)."""

    type: Literal["supervised", "dpo"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None

    @model_validator(mode="after")
    def _check(self) -> Method:
        other = "dpo" if self.type == "supervised" else "supervised"
        if getattr(self, other) is not None:
            raise ValueError(f"the type is {self.type!r}, so {other!r} has no meaning; leave it out")
        return self

    @property
    def hyperparameters(self) -> Hyperparameters:
        """Of the type that is asked for."""
        if self.type == "dpo":
            return self.dpo.hyperparameters if self.dpo is not None else DpoHyperparameters()
        return self.supervised.hyperparameters if self.supervised is not None else Hyperparameters()


class JobRequest(Body):
    """What POST /v1/fine_tuning/jobs takes."""

    model: str
    """A model that is served, a tuned one, or a shipped name."""
    training_file: str
    validation_file: str | None = None
    suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] | None = None
    """A part of the tuned model's name."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    """The old place of those of method supervised."""
    metadata: Metadata | None = None
    integrations: list[dict[str, JsonValue]] | None = None
    luthier: dict[str, JsonValue] | None = None
    """Any other settings of `luthier tune`: adapter, objective, optimizer ..."""

    @model_validator(mode="after")
    def _check(self) -> JobRequest:
        if self.hyperparameters is not None and self.method is not None:
            raise ValueError("hyperparameters is the old place of those in method; set one of the two")
        return self

    @property
    def asked_method(self) -> Method:
        """The method, however it was asked for."""
        if self.method is not None:
            return self.method
        given = self.hyperparameters or Hyperparameters()
        return Method(type="supervised", supervised=Supervised(hyperparameters=given))


def source_of(server: Server, store: Store, key: Key, name: str) -> str:
    """What a model's name stands for. Raises Refusal for one that is not known here; those who may all, may name a run, a
    directory or a hub id."""
    served = server.shelf.models.get(name)
    if served is not None:
        return served.source
    kept = store.get("model", name)
    if kept is not None:
        return str(kept.content["source"])
    shipped = sorted(one.parent.name for one in Path(str(files("luthier"))).glob("assets/*/config.json"))
    elsewhere = name.startswith("run:") or "/" in name
    if name in shipped or ("admin" in key.scopes and elsewhere):
        return name
    raise unknown(name, [*server.shelf.models, *(one for one in shipped if one not in server.shelf.models)])


def settings_of(
    body: JobRequest, key: Key, source: str, store: Store, files: tuple[Thing, Thing | None]
) -> dict[str, Any]:
    """The settings of Tune. Raises Refusal for those that do not go together, or are not this key's to choose."""
    own, method = dict(body.luthier or {}), body.asked_method
    _check_own(own, key)
    _check_shapes(method, own, files)
    train, validation = (None if one is None else str(store.path_of(one.content["stored"])) for one in files)
    settings: dict[str, Any] = {"model": source, "data": {"train": train}, "seed": body.seed, **own}
    if validation is not None:
        settings["data"]["validation"] = validation
    hyper = method.hyperparameters
    for theirs, ours in (
        ("n_epochs", "epochs"),
        ("batch_size", "batch_size"),
        ("learning_rate_multiplier", "rate_multiplier"),
    ):
        value = getattr(hyper, theirs)
        if value == "auto":
            continue
        if ours in own:
            raise Refusal(400, f"luthier.{ours}: says the same as {theirs}; set one of the two", param="luthier")
        settings[ours] = value
    if isinstance(hyper, DpoHyperparameters):
        settings["objective"] = _objective(own.get("objective"), hyper)
    return settings


def _objective(given: Any, hyper: DpoHyperparameters) -> dict[str, Any]:
    found = {"kind": given} if isinstance(given, str) else dict(given or {"kind": "dpo"})
    if hyper.beta != "auto":
        if "beta" in found:
            raise Refusal(400, "luthier.objective.beta: says the same as beta; set one of the two", param="luthier")
        found["beta"] = hyper.beta
    return found


def _check_shapes(method: Method, own: dict[str, Any], files: tuple[Thing, Thing | None]) -> None:
    for param, file in zip(("training_file", "validation_file"), files):
        if file is None:
            continue
        if file.content["purpose"] != "fine-tune":
            raise Refusal(
                400, f"{param}: {file.id} was uploaded for {file.content['purpose']!r}, not 'fine-tune'", param=param
            )
        preferences = file.content["shape"] == "preference"
        if method.type == "dpo" and not preferences:
            raise Refusal(
                400, f"{param}: method dpo needs rows of input, preferred_output and non_preferred_output, and those of "
                f"{file.id} are {file.content['shape']!r}", param=param,
            )  # fmt: skip
        if method.type == "supervised" and preferences and "objective" not in own:
            raise Refusal(400, f"{param}: the rows of {file.id} are preferences; set method.type to 'dpo'", param=param)


def _check_own(own: dict[str, Any], key: Key) -> None:
    taken = next((name for name in TAKEN if name in own), None)
    if taken is not None:
        raise Refusal(400, f"luthier.{taken}: the job says this in fields of its own; leave it out", param="luthier")
    if "admin" in key.scopes:
        return
    # Files and code of the server's machine are not everybody's who may tune on it.
    for path, text in _texts(own, "luthier"):
        if "/" in text or "\\" in text or ":" in text or Path(text).suffix:
            raise Refusal(
                403, f"{path}: names of files, runs and code need a key with the scope 'admin'", param="luthier"
            )


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"{path}.{name}")
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, path)
