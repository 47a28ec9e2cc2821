"""`python scripts/demo.py --page`: what it runs, and that it opens the page once the server answers."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture
def demo(load_file: Callable[[Path], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/demo.py, with what it would run and open recorded; the server that it starts answers once."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = load_file(SCRIPTS / "demo.py")
    module.done, module.opened = [], threading.Event()  # type: ignore[attr-defined]

    def ensure(wanted: str, torch_index: str | None) -> None:
        module.done.append(wanted)

    def run(command: list[str]) -> int:
        module.done.append(" ".join(command))
        if "serve" in command:
            answer(int(command[-1]))
        return 0

    def answer(port: int) -> None:
        class Health(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        with HTTPServer(("127.0.0.1", port), Health) as server:
            server.handle_request()
        module.told.wait(10)

    module.told = threading.Event()  # type: ignore[attr-defined]
    monkeypatch.setattr(module, "ensure", ensure)
    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(module, "say", lambda text: (module.done.append(text), module.told.set()))
    monkeypatch.setattr(module.webbrowser, "open", lambda address: module.done.append(f"opened {address}"))
    monkeypatch.setattr(module, "has_display", lambda: True)
    return module


def called(demo: ModuleType, monkeypatch: pytest.MonkeyPatch, *flags: str) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["demo.py", *flags])
    assert demo.main() == 0
    return demo.done


TRAINING = "examples/NLG/run_training.py --output_dir mine"
INFERENCE = "examples/NLG/run_inference.py --adapter mine"


def test_without_page_nothing_is_served(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert called(demo, monkeypatch, "--output_dir", "mine") == ["run", TRAINING, INFERENCE]


def test_page_serves_the_adapter_and_opens_a_browser(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    done = called(demo, monkeypatch, "--page", "--output_dir", "mine", "--num_epochs", "2")
    port = done[3].rpartition(" ")[2]
    assert done == [
        "serve", f"{TRAINING} --num_epochs 2", INFERENCE, f"-m loralib serve --adapter mine=mine --port {port}",
        f"the page is at http://127.0.0.1:{port}/ (Ctrl-C ends it)", f"opened http://127.0.0.1:{port}/",
    ]  # fmt: skip


def test_no_browser_prints_the_address_only(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    done = called(demo, monkeypatch, "--page", "--no_browser")
    assert "the page is at" in done[-1]


def test_a_port_that_is_taken_is_left_alone(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(demo, "PORT", taken.getsockname()[1])
        assert demo.free_port() != demo.PORT


def test_linux_without_a_display_opens_nothing(
    load_file: Callable[[Path], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    fresh = load_file(SCRIPTS / "demo.py")
    monkeypatch.setattr(fresh.sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert not fresh.has_display()
    monkeypatch.setenv("DISPLAY", ":0")
    assert fresh.has_display()
