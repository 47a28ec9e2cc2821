"""Runs all checks and tests on a fresh machine with one command: python scripts/test.py.

Makes .venv if needed, then runs ruff, mypy, mkdocs (the site) and pytest, even if one of them fails.  Tests run in two
processes.  Further arguments go to pytest: python scripts/test.py tests/test_base.py -k hub (add -n 0 to stay in one)
"""

import os
import sys

if sys.version_info < (3, 10):  # noqa: UP036  so this file keeps to what the oldest Python understands
    sys.exit("error: loralib needs Python 3.10 or newer, and this is %d.%d." % sys.version_info[:2])  # noqa: UP031

from environment import ensure, parser, run, say


def main():
    arguments, for_pytest = parser(__doc__).parse_known_args()
    ensure("dev", arguments.torch_index)
    checks = (
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["mkdocs", "build", "--strict", "--quiet"],
        # Last, so that its closing line is.
        ["pytest", "-n", "2", "--dist", "worksteal"] + for_pytest,  # noqa: RUF005
    )
    os.environ.setdefault("NO_MKDOCS_2_WARNING", "1")  # its theme's word about a successor, at every build
    codes = [run(["-m"] + check) for check in checks]  # noqa: RUF005
    failed = [check[0] for check, code in zip(checks, codes) if code]  # noqa: B905
    if failed:
        say("failed: " + ", ".join(failed))
    return next((code for code in reversed(codes) if code), 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
