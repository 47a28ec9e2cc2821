"""Runs all checks and tests on a fresh machine with one command: python scripts/test.py.

Makes .venv if needed, then runs pytest in two processes (a third gains nothing), and beside it ruff, mypy and mkdocs
(the site), even if one of them fails.  Further arguments go to pytest (-n 0 stays in one process):
python scripts/test.py tests/test_base.py -k hub
"""

import os
import sys

if sys.version_info < (3, 10):  # noqa: UP036  so this file keeps to what the oldest Python understands
    sys.exit("error: loralib needs Python 3.10 or newer, and this is %d.%d." % sys.version_info[:2])  # noqa: UP031

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from environment import ROOT, ensure, parser, run, run_aside, say

CACHE = ROOT / ".pytest_cache" / "d" / "loralib"  # where tests look for it, unless LORALIB_CACHE is set


def main():
    flags = parser(__doc__)
    flags.add_argument("--prepare", action="store_true", help="make the environment, and run nothing")
    arguments, for_pytest = flags.parse_known_args()
    os.environ.setdefault("LORALIB_CACHE", str(CACHE))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # processes share the cores: no thread spins while it waits
    ensure("run", arguments.torch_index)
    with ThreadPoolExecutor(1) as aside:  # pip leaves a core idle
        converting = aside.submit(convert)
        ensure("dev", arguments.torch_index)
    if arguments.prepare:
        return 0
    if converting.result():
        os.environ["LORALIB_CONVERTED_ALONE"] = os.environ["LORALIB_CACHE"]
    os.environ.setdefault("NO_MKDOCS_2_WARNING", "1")  # its theme's word about a successor, at every build
    checks = (
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["mkdocs", "build", "--strict", "--quiet"],
    )
    tests = ["pytest", "-n", "2", "--dist", "worksteal"] + for_pytest  # noqa: RUF005
    with ThreadPoolExecutor(1) as aside:  # tests leave a core idle while they begin
        results = [aside.submit(run_aside, ["-m"] + check) for check in checks]  # noqa: RUF005
        tested = run(["-m"] + tests)  # noqa: RUF005
    codes = [result.result() for result in results] + [tested]
    failed = [check[0] for check, code in zip(checks + (tests,), codes) if code]  # noqa: B905, RUF005
    if failed:
        say("failed: " + ", ".join(failed))
    return next((code for code in reversed(codes) if code), 0)


def convert():
    """Converts the default base, unless it is there; tells whether it is, converted with no package but the demo's.

    Tests that run side by side would each convert it anew, in the same time.
    """
    done = Path(os.environ["LORALIB_CACHE"], "converted-alone")
    if not done.exists():
        code = "from loralib.bases import load_tokenizer; load_tokenizer('smollm2-135m')"
        if run_aside(["tests/alone.py", "-c|" + code]):
            return False  # tests will report it
        done.touch()
    return True


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
