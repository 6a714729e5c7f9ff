"""Three firings published to an online wandb run whose server falls silent once the run has begun.

    python -m tests.publish.hanging FOLDER

The server runs on this machine: it answers that the run is known, takes every later request, and never answers one.
Prints as JSON how many requests were answered, which ones were waiting, and what was published beside them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

RUN = {"id": "run", "name": "run", "displayName": "run", "config": "{}", "historyLineCount": 0}
PROJECT = {"id": "project", "name": "project", "entity": {"id": "someone", "name": "someone"}}
BEGUN = {"data": {"upsertBucket": {"bucket": {**RUN, "project": PROJECT}, "inserted": True}}}

answered: list[str] = []
waiting: list[str] = []
silent = threading.Event()


class Silent(BaseHTTPRequestHandler):
    """Answers the first request of a run."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("content-length") or 0))
        if b"upsertBucket" in asked and not answered:
            answered.append(self.path)
            body = json.dumps(BEGUN).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        self.do_GET()

    def do_GET(self) -> None:
        waiting.append(self.path)
        silent.set()
        threading.Event().wait()

    def log_message(self, *_: object) -> None:
        """Nothing: the output is the result."""


def main(folder: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ.update(
        {
            "WANDB_MODE": "online",
            "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}",
            "WANDB_API_KEY": "0" * 40,  # of no one: this server asks for none
            "WANDB_SILENT": "true",
            "WANDB_DIR": str(folder),
        }
    )
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    from lightning_slt.publish import RunPublisher
    from lightning_slt.publish.publisher import is_online
    from lightning_slt.publish.wandb_logger import WandbSink
    from tests.publish.helpers import make_estimate, make_influence, pictures_of

    run = wandb.init(project="project", settings=wandb.Settings(console="off", x_disable_stats=True))
    publisher = RunPublisher([WandbLogger(experiment=run)], folder / "slt")
    online = [is_online(sink) for _, sink in publisher._sinks]
    publisher.start({})
    # from here on a request is waiting for its answer
    silent.wait()
    for step in (10, 20, 30):
        influence = make_influence(step=step)
        publisher.estimate(make_estimate(step=step, x=step - 1))
        publisher.influence(influence, pictures_of(influence))
    found = {
        "online": online,
        "tables wait": [not sink._later.wait(0.0) for _, sink in publisher._sinks if isinstance(sink, WandbSink)],
        "answered": answered,
        "waiting": waiting,
        "pictures": sorted(path.name for path in (folder / "slt" / "figures").iterdir()),
        "handed over": len(list((Path(run.dir) / "media" / "images" / "slt" / "media").glob("*.png"))),
    }
    print(json.dumps(found), flush=True)
    end_the_service()
    os._exit(0)  # the end of an online run does wait for its server


def end_the_service() -> None:
    """wandb's own process waits for the server too, and would outlive this one."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                name, parent = (entry / "comm").read_text(), (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
            except OSError:  # it has just ended
                continue
            if name.startswith("wandb-core") and int(parent) == os.getpid():
                os.kill(int(entry.name), signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
