"""/metrics, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from luthier.faces.server.engines import Gone
from luthier.faces.server.refusals import RESPONSES
from luthier.faces.server.server import Server, TheServer

routes = APIRouter(tags=["operating"], responses=RESPONSES)
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
# What the processor's own counters hold, in microjoules; where they can be read.
ENERGY = "/sys/class/powercap/intel-rapl:*/energy_uj"


class Metrics:
    """What is counted while a server runs."""

    def __init__(self) -> None:
        self.registry = made = CollectorRegistry()
        self.requests = Counter(
            "luthier_requests", "Requests, by address and status", ["path", "status"], registry=made
        )
        self.seconds = Histogram(
            "luthier_request_seconds", "Seconds until a request was answered", ["path"], buckets=SECONDS, registry=made
        )
        self.first = Histogram(
            "luthier_time_to_first_token_seconds",
            "Seconds until the first token",
            ["model"],
            buckets=SECONDS,
            registry=made,
        )
        self.between = Histogram(
            "luthier_inter_token_seconds", "Mean seconds from one token of an answer to the next", ["model"],
            buckets=SHORT, registry=made,
        )  # fmt: skip
        self.read = Counter("luthier_prompt_tokens", "Tokens of prompts", ["model"], registry=made)
        self.reused = Counter(
            "luthier_reused_tokens", "Of those, tokens that were read for another text before", ["model"], registry=made
        )
        self.written = Counter("luthier_written_tokens", "Tokens that were written", ["model"], registry=made)
        self.running = Gauge("luthier_running_texts", "Texts that are being written", ["model"], registry=made)
        self.waiting = Gauge("luthier_waiting_texts", "Texts that wait", ["model"], registry=made)
        self.held = Gauge("luthier_held_blocks", "Blocks of keys and values that texts hold", ["model"], registry=made)
        self.blocks = Gauge("luthier_blocks", "Blocks of keys and values", ["model"], registry=made)
        self.up = Gauge("luthier_engine_up", "Whether the engine is ready", ["model"], registry=made)
        self.restarts = Gauge("luthier_engine_restarts", "Starts after a break", ["model"], registry=made)
        self.searches = Counter(
            "luthier_searches", "Questions to an index, and whether it knew enough", ["index", "known"], registry=made
        )
        self.searched_seconds = Histogram(
            "luthier_search_seconds", "Seconds of a search", ["index"], buckets=SHORT, registry=made
        )
        self.false = Counter("luthier_removed_citations", "Citations that named no passage", ["model"], registry=made)
        self.found = Gauge("luthier_index_up", "Whether the process of the indexes is ready", registry=made)
        self.found_again = Gauge("luthier_index_restarts", "Its starts after a break", registry=made)
        self.joules = Gauge(
            "luthier_energy_joules",
            "Energy that the processors counted, of the whole machine",
            ["counter"],
            registry=made,
        )

    def answered(self, path: str, status: int, seconds: float) -> None:
        """A request ended."""
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)

    def wrote(self, model: str, usage: dict[str, Any], seconds: float) -> None:
        """An answer was written within so many seconds."""
        self.read.labels(model).inc(usage["prompt"])
        self.reused.labels(model).inc(usage["reused"])
        self.written.labels(model).inc(usage["written"])
        first = usage.get("first_seconds")
        if first is not None:
            self.first.labels(model).observe(first)
            if usage["written"] > 1:
                self.between.labels(model).observe(max(0.0, seconds - first) / (usage["written"] - 1))

    def searched(self, index: str, known: Sequence[bool], seconds: float) -> None:
        """Questions were looked up together."""
        for one in known:
            self.searches.labels(index, "yes" if one else "no").inc()
        self.searched_seconds.labels(index).observe(seconds)

    async def look(self, server: Server) -> None:
        """Ask the engines how busy they are."""
        for name, served in server.shelf.models.items():
            self.up.labels(name).set(served.process.state == "ready")
            self.restarts.labels(name).set(served.process.restarts)
            if served.process.state == "asleep":
                continue
            try:
                state = await served.process.ask("state")
            except Gone:
                continue
            for gauge, key in (
                (self.running, "running"), (self.waiting, "waiting"), (self.held, "blocks_held"), (self.blocks, "blocks"),
            ):  # fmt: skip
                gauge.labels(name).set(state[key])
        process = server.indexes.process
        if process is not None:
            self.found.set(process.state == "ready")
            self.found_again.set(process.restarts)
        for path in Path("/").glob(ENERGY.lstrip("/")):
            try:
                self.joules.labels(path.parent.name).set(int(path.read_text()) / 1e6)
            except (OSError, ValueError):
                continue


@routes.get("/metrics", response_class=PlainTextResponse)
async def read_metrics(server: TheServer) -> PlainTextResponse:
    """Everything that is counted."""
    await server.metrics.look(server)
    content = generate_latest(server.metrics.registry)
    return PlainTextResponse(content, media_type="text/plain; version=0.0.4; charset=utf-8")
