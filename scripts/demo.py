"""From a fresh machine to a language model that has learned, with one command: python scripts/demo.py.

Makes .venv if needed, then trains an adapter (into lora_model) and writes text with it.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036  so this file keeps to what the oldest Python understands
    sys.exit("error: loralib needs Python 3.10 or newer, and this is %d.%d." % sys.version_info[:2])  # noqa: UP031

from environment import ensure, parser, run

JOBS = ("examples/NLG/run_training.py", "examples/NLG/run_inference.py")


def main():
    arguments = parser(__doc__).parse_args()
    ensure("run", arguments.torch_index)
    for job in JOBS:
        code = run([job])
        if code:
            return code
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
