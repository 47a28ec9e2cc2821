"""A server is killed (SIGKILL) at 20 random moments during training: jobs end with the bytes of an undisturbed run.

They also have every event exactly once.  Every other time, the processes started by the server are killed with it;
otherwise they notice by themselves.

python benchmarks/serve_kills.py       about ten minutes; writes benchmarks/serve_kills.json
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from machine import machine

from loralib.console import say
from loralib.training.report import read_metrics

MODEL = "scratch-32x1-seed0"
EXAMPLES = "".join(f'{{"prompt": "Number {n} is", "completion": "{n * n} when squared"}}\n' for n in range(40))
SETTINGS = {
    "rank": 4, "lr": 5e-3, "batch_size": 4, "num_epochs": 40, "save_steps": 3, "eval_steps": 7, "dtype": "fp32",
    "lora_dropout": 0.1, "valid_fraction": 0.2,
}  # fmt: skip


class Served:
    """`loralib serve` in a separate process."""

    def __init__(self, state_dir: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "loralib", "serve", "--model", MODEL, "--port", str(port), "--no_page"]
        log = state_dir.with_suffix(".log")
        with log.open("ab") as file:
            self.process = subprocess.Popen([*command, "--state_dir", str(state_dir)], stdout=file, stderr=file)
        while not self._is_up():
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended:\n{log.read_text('utf-8')}")
            time.sleep(0.02)

    def _is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=60):
                return True
        except OSError:
            return False

    def ask(self, path: str, body: Any = None, content_type: str = "application/json") -> Any:
        """Sends a request to the API."""
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/v1/{path}", data, {"Content-Type": content_type})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def upload(self, text: str) -> str:
        """Uploads a file of examples and returns its id."""
        form = 'Content-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--limit\r\n'
        form += f'Content-Disposition: form-data; name="file"; filename="data.jsonl"\r\n\r\n{text}\r\n--limit--\r\n'
        return str(self.ask("files", f"--limit\r\n{form}".encode(), "multipart/form-data; boundary=limit")["id"])

    def job(self, file: str, settings: Mapping[str, Any]) -> str:
        """Creates a job and returns its id."""
        return str(self.ask("fine_tuning/jobs", {"model": MODEL, "training_file": file, "loralib": settings})["id"])

    def finish(self, job: str, patience: float = 300.0) -> float:
        """Waits until a job has succeeded, and returns the seconds that it took."""
        started = time.monotonic()
        while (answer := self.ask(f"fine_tuning/jobs/{job}"))["status"] != "succeeded":
            if answer["status"] == "failed" or time.monotonic() - started > patience:
                raise SystemExit(f"{job} is {answer['status']}: {answer['error']}")
            time.sleep(0.02)
        return time.monotonic() - started

    def kill(self, with_children: bool) -> int:
        """Kills the server, and returns how many children it had."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        for process in [self.process, *(children if with_children else [])]:
            process.send_signal(signal.SIGKILL)
        self.process.wait()
        return len(children)

    def events(self, job: str) -> list[str]:
        """Returns a job's update events from the API, in order, without times."""
        events = self.ask(f"fine_tuning/jobs/{job}/events?limit=10000")["data"]
        return sorted(event["message"] for event in events if event["type"] == "metrics")


def outcome(served: Served, state_dir: Path, job: str) -> dict[str, Any]:
    """What must be identical: the adapters' bytes, and every event except for its time."""
    run = state_dir / "jobs" / job / "run"
    files = ("adapter_model.safetensors", "best/adapter_model.safetensors", "adapter_config.json", "pytorch_model.bin")
    metrics = [{k: v for k, v in e.items() if k != "step_s"} for e in read_metrics(run / "metrics.jsonl")]
    return {**{name: (run / name).read_bytes() for name in files}, "metrics": metrics, "events": served.events(job)}


def trials(folder: Path, moments: Sequence[float]) -> dict[str, Any]:
    """Runs one job per moment (a fraction of an undisturbed job's duration): killed then, restarted, compared."""
    state_dir = folder / "state"
    served = Served(state_dir)
    file = served.upload(EXAMPLES)
    whole = served.job(file, SETTINGS)
    lasts = served.finish(whole)
    truth = outcome(served, state_dir, whole)
    with_children = running = same = 0
    resumed_at = []
    try:
        for number, moment in enumerate(moments):
            job = served.job(file, SETTINGS)
            time.sleep(moment * lasts)
            had = served.kill(with_children=number % 2 == 0)
            running += had > 0
            with_children += number % 2 == 0
            served = Served(state_dir)
            served.finish(job)
            same += outcome(served, state_dir, job) == truth
            log = (state_dir / "jobs" / job / "output.log").read_text("utf-8").splitlines()
            resumed_at += [line for line in log if line.startswith("Resuming from")][:1]
    finally:
        served.kill(with_children=True)
    return {
        "kills": len(moments),
        "of_them_with_children": with_children,
        "while_a_process_trained": running,
        "resumed_from_a_checkpoint": len(resumed_at),
        "same_bytes_and_events": same,
        "undisturbed_s": round(lasts, 1),
    }


def main() -> int:
    """Runs the trials and writes the JSON beside this file."""
    rng = random.Random(0)
    folder = Path(tempfile.mkdtemp(prefix="serve-kills-"))
    try:
        result = trials(folder, [rng.uniform(0.02, 0.98) for _ in range(20)])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    say(f"{result['kills']} kills of the server: {result['same_bytes_and_events']} jobs ended with the same bytes")
    Path(__file__).with_suffix(".json").write_text(
        json.dumps({"machine": machine(), "seed": 0, **result}, indent=2) + "\n", encoding="utf-8"
    )
    return 0 if result["same_bytes_and_events"] == result["kills"] else 1


if __name__ == "__main__":
    sys.exit(main())
