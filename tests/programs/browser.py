"""Pages of this folder in a headless browser, which gets all it needs from a server of this process and from nowhere else."""

from __future__ import annotations

import json
import queue
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from node_programs import FOLDER

__all__ = ["CHROMIUM", "run_page"]

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
"""What it may be called."""

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
    # Whatever is not served here must not be needed.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


def run_page(chromium: str, page: str, model: Path, request: Mapping[str, Any], *, timeout: float = 300) -> Any:
    """What the page answers to the request about the model folder.

    Raises RuntimeError with the page's error, or with what the browser wrote if there is no answer in `timeout` seconds.
    """
    with tempfile.TemporaryDirectory() as temporary:
        root, profile = Path(temporary) / "root", Path(temporary) / "profile"
        (root / "models").mkdir(parents=True)
        (root / "models" / "model").symlink_to(model)
        (root / "programs").symlink_to(FOLDER)
        (root / "request.json").write_text(json.dumps(request), encoding="utf-8")
        with serve(root) as (port, answers):
            command = [chromium, *FLAGS, f"--user-data-dir={profile}", f"http://127.0.0.1:{port}/programs/{page}"]
            with (Path(temporary) / "log").open("w+b") as log:
                browser = subprocess.Popen(command, stdout=log, stderr=log)
                try:
                    answer = answers.get(timeout=timeout)
                except queue.Empty:
                    log.seek(0)
                    raise RuntimeError(f"no answer in {timeout:g} s:\n{log.read().decode(errors='replace')}") from None
                finally:
                    browser.terminate()
                    try:
                        browser.wait(30)
                    except subprocess.TimeoutExpired:
                        browser.kill()
                        browser.wait()
    if "error" in answer:
        raise RuntimeError(f"the page failed: {answer['error']}")
    return answer


@contextmanager
def serve(root: Path) -> Iterator[tuple[int, queue.Queue[Any]]]:
    """Serve a folder on 127.0.0.1: the port, and what is posted there."""
    answers: queue.Queue[Any] = queue.Queue()

    class Handler(SimpleHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(204)
            self.end_headers()
            answers.put(json.loads(body))

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(root))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port, answers
        finally:
            server.shutdown()
            thread.join()
