"""A server on loopback that answers what the wandb package asks for a run, until it is told to fail."""

from __future__ import annotations

import json
import threading
from http.server import ThreadingHTTPServer
from typing import Any

from loopback_server import Handler

_VIEWER = {"id": "1", "entity": "me", "username": "me", "email": "me@localhost", "admin": False, "flags": "{}"}
_PROJECT = {"id": "1", "name": "tests", "entity": {"id": "1", "name": "me"}}


class FakeWandbServer(ThreadingHTTPServer):
    """Attributes: failing: every request is answered with status 500. rows: history rows that were uploaded."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.failing = False
        self.rows: list[dict[str, Any]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(Handler):
    server: FakeWandbServer

    def do_GET(self) -> None:
        self._answer({})

    def do_PUT(self) -> None:
        self._body()
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if self.server.failing:
            self._answer({"errors": [{"message": "broken"}]}, status=500)
        elif "file_stream" in self.path:
            for chunk in json.loads(body).get("files", {}).values():
                self.server.rows += [json.loads(line) for line in chunk.get("content", []) if "_step" in line]
            self._answer({"limits": {}})
        elif self.path == "/graphql":
            request = json.loads(body)
            self._answer({"data": self._data(request["query"], request.get("variables") or {})})
        else:
            self._answer({})

    def _data(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        if "UpsertBucket" in query:
            run = {"id": "1", "name": variables.get("name"), "displayName": "fake", "config": "{}"}
            return {"upsertBucket": {"bucket": run | {"historyLineCount": 0, "project": _PROJECT}, "inserted": True}}
        if "RunResumeStatus" in query:
            return {"model": _PROJECT | {"bucket": None}}
        if "CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.server.url}/upload"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        return {"viewer": _VIEWER | {"teams": {"edges": []}}}

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, body: dict[str, Any], status: int = 200) -> None:
        self.answer(status, json.dumps(body).encode(), {"Content-Type": "application/json"})
