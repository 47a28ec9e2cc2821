"""From a fresh machine to a language model that has learned, with one command: python scripts/demo.py.

Makes .venv if needed, trains an adapter and writes text with it.  With --page it ends in a browser, where the base and
the adapter answer side by side.  Further flags go to run_training.py, as in: python scripts/demo.py --num_epochs 3
"""

import os
import sys

if sys.version_info < (3, 10):  # noqa: UP036  so this file keeps to what the oldest Python understands
    sys.exit("error: loralib needs Python 3.10 or newer, and this is %d.%d." % sys.version_info[:2])  # noqa: UP031

import socket
import threading
import urllib.request
import webbrowser

from environment import ensure, parser, run, say

PORT = 8000  # or another, where this one is taken


def main():
    flags = parser(__doc__)
    flags.add_argument("--output_dir", "--output-dir", default="lora_model", help="where the adapter goes")
    flags.add_argument("--page", action="store_true", help="serve the adapter in the end, with a page in the browser")
    flags.add_argument("--no_browser", "--no-browser", action="store_true", help="with --page: only print its address")
    arguments, for_training = flags.parse_known_args()
    ensure("serve" if arguments.page else "run", arguments.torch_index)
    training = ["examples/NLG/run_training.py", "--output_dir", arguments.output_dir]
    inference = ["examples/NLG/run_inference.py", "--adapter", arguments.output_dir]
    failed = run(training + for_training) or run(inference)
    return failed or (serve(arguments.output_dir, not arguments.no_browser) if arguments.page else 0)


def serve(adapter, with_browser):
    """Serves an adapter until Ctrl-C, and shows the page once it is there; returns the exit code."""
    port = free_port()
    address = "http://127.0.0.1:%d/" % port  # noqa: UP031
    name = os.path.basename(os.path.abspath(adapter))
    over = threading.Event()
    shown = threading.Thread(target=show, args=(address, with_browser, over), daemon=True)
    shown.start()
    try:
        return run(["-m", "loralib", "serve", "--adapter", name + "=" + adapter, "--port", str(port)])
    finally:
        over.set()
        shown.join()


def free_port():
    """Returns the usual port, or one that the system chooses where that is taken."""
    for port in (PORT, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
                return probe.getsockname()[1]
            except OSError:
                pass
    return PORT  # the server says what is wrong


def show(address, with_browser, over):
    """Waits until the server answers, says where it is, and opens a browser if there is one to see it in."""
    while not answers(address + "health"):
        if over.wait(0.2):
            return
    say("the page is at %s (Ctrl-C ends it)" % address)  # noqa: UP031
    if with_browser and has_display():
        webbrowser.open(address)


def answers(address):
    """Tells whether somebody answers at an address; proxies are not asked."""
    try:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address, timeout=2).close()
    except OSError:
        return False
    return True


def has_display():
    """Tells whether a window could be seen: on Linux, a terminal alone cannot show one."""
    return not sys.platform.startswith("linux") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
