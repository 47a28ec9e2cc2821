"""From a fresh machine to a language model that has learned, with one command: python scripts/demo.py.

Makes .venv if needed, trains an adapter and writes text with it.  Further flags go to run_training.py, as in:
python scripts/demo.py --num_epochs 3
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036  so this file keeps to what the oldest Python understands
    sys.exit("error: loralib needs Python 3.10 or newer, and this is %d.%d." % sys.version_info[:2])  # noqa: UP031

from environment import ensure, parser, run


def main():
    flags = parser(__doc__)
    flags.add_argument("--output_dir", "--output-dir", default="lora_model", help="where the adapter goes")
    arguments, for_training = flags.parse_known_args()
    ensure("run", arguments.torch_index)
    training = ["examples/NLG/run_training.py", "--output_dir", arguments.output_dir]
    inference = ["examples/NLG/run_inference.py", "--adapter", arguments.output_dir]
    return run(training + for_training) or run(inference)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
