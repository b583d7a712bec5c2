"""A W&B server on loopback, of which a client needs little: it takes runs, their history, and files."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY, PROJECT = "somebody", "tests"


class FakeWandb(ThreadingHTTPServer):
    """`history`: the rows of the run as they arrived; `alerts`: titles; `entities`: of the starts; `unknown`: requests
    that it does not know and has answered with nothing."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.history: list[dict[str, Any]] = []
        self.alerts: list[str] = []
        self.entities: list[str] = []
        self.unknown: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def steps(self) -> list[int]:
        return [row["_step"] for row in self.history]

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


@contextmanager
def fake_wandb() -> Iterator[FakeWandb]:
    """One that has been asked for nothing it does not know."""
    server = FakeWandb()
    try:
        yield server
        assert server.unknown == []
    finally:
        server.stop()


class _Handler(BaseHTTPRequestHandler):
    server: FakeWandb

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(content) if content.startswith(b"{") else {}  # telemetry is binary
        self._answer(self._stream(body) if self.path.endswith("file_stream") else self._query(body))

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer({})

    def _stream(self, body: dict[str, Any]) -> dict[str, Any]:
        history = body.get("files", {}).get("wandb-history.jsonl")
        if history:
            del self.server.history[history["offset"] :]  # a request that is sent again
            self.server.history += map(json.loads, history["content"])
        return {}

    def _query(self, body: dict[str, Any]) -> dict[str, Any]:
        name = (re.search(r"(?:query|mutation)\s+(\w+)", body.get("query", "")) or ["", self.path])[1]
        rows = self.server.history
        project = {"id": "p", "name": PROJECT, "entity": {"id": "e", "name": ENTITY}}
        run_id = body.get("variables", {}).get("name") or "run"
        match name:
            case "UpsertBucket":
                run = {
                    "id": "r",
                    "name": run_id,
                    "displayName": run_id,
                    "description": None,
                    "config": "{}",
                    "sweepName": None,
                    "project": project,
                    "historyLineCount": len(rows),
                }
                return {"data": {"upsertBucket": {"bucket": run, "inserted": not rows}}}
            case "RunResumeStatus":
                self.server.entities.append(body["variables"]["entity"])
                run = {
                    "id": "r",
                    "name": run_id,
                    "displayName": run_id,
                    "summaryMetrics": json.dumps(rows[-1] if rows else {}),
                    "historyLineCount": len(rows),
                    "eventsLineCount": 0,
                    "logLineCount": 0,
                    "historyTail": json.dumps([json.dumps(rows[-1])] if rows else []),
                    "eventsTail": "[]",
                    "config": "{}",
                    "tags": [],
                    "notes": None,
                    "wandbConfig": json.dumps({"t": 1}),
                }
                return {"data": {"model": {**project, "bucket": run if rows else None}}}
            case "NotifyScriptableRunAlert":
                self.server.alerts.append(body["variables"]["title"])
                return {"data": {"notifyScriptableRunAlert": {"success": True}}}
            case "CreateRunFiles":
                files = [
                    {"name": name, "uploadUrl": f"{self.server.url}/upload"} for name in body["variables"]["files"]
                ]
                return {"data": {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}}
            case "Viewer":  # nobody, and so no tables, for which there would have to be much more here
                return {"data": {"viewer": None}}
            case "OrganizationCoreWeaveOrganizationID" | "/sdk/otel/v1/metrics" | "/sdk/otel/v1/logs":
                return {"data": {}}
            case _:
                self.server.unknown.append(name)
                return {"data": {}}

    def _answer(self, content: dict[str, Any]) -> None:
        encoded = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, *_: Any) -> None:
        """Quiet."""
