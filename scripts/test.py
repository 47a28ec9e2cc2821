"""Runs all checks and tests on a fresh machine with one command: python scripts/test.py.

Makes .venv if needed, then runs pytest in two processes, and beside it ruff, mypy and mkdocs (the site), even if one of
them fails.  Further arguments go to pytest: python scripts/test.py tests/test_base.py -k hub (add -n 0 to stay in one)
"""

import os
import sys

if sys.version_info < (3, 10):  # noqa: UP036  so this file keeps to what the oldest Python understands
    sys.exit("error: loralib needs Python 3.10 or newer, and this is %d.%d." % sys.version_info[:2])  # noqa: UP031

from concurrent.futures import ThreadPoolExecutor

from environment import ensure, parser, run, run_aside, say


def main():
    arguments, for_pytest = parser(__doc__).parse_known_args()
    ensure("dev", arguments.torch_index)
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


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
