"""Every error that loralib raises on purpose.

    LoraError
    ├── ConfigError (ValueError)             a setting has a value it cannot have
    │   └── BiasModeError (NotImplementedError)
    ├── TargetError (ValueError)             what should be adapted cannot be
    ├── AdapterError (ValueError)            an adapter does not fit, or cannot be expressed
    │   ├── FormatError                      a file is not what it claims to be
    │   └── BaseMismatchError                the adapter was trained on another base model
    ├── MergeError (RuntimeError)            weights cannot be merged or unmerged
    ├── DataError (ValueError)               a data file or an example is wrong
    ├── BaseModelError (OSError)             a base model cannot be found or read
    ├── TrainingError (RuntimeError)         training cannot go on
    │   ├── NothingLearnedError              no gradient reaches a layer, or nothing changed
    │   └── InterruptedRunError              a signal stopped the run, after it saved itself
    ├── BusyModelError (RuntimeError)        a model is in use in another way at the moment
    ├── BusyServerError (RuntimeError)       too many requests are waiting; later there may be room
    ├── UnreachableServerError (OSError)     another server cannot be asked
    ├── UnsupportedModelError (RuntimeError) a model computes in a way that is not known here
    ├── OutputError (OSError)                a result cannot be written
    └── MissingDependencyError (ImportError) an optional package is not installed

Each is also a builtin exception, so ``except ValueError`` keeps working for callers who do not know this module.  The
command line prints the message of a `LoraError` without a traceback and exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "AdapterError",
    "BaseMismatchError",
    "BaseModelError",
    "BiasModeError",
    "BusyModelError",
    "BusyServerError",
    "ConfigError",
    "DataError",
    "FormatError",
    "InterruptedRunError",
    "LoraError",
    "MergeError",
    "MissingDependencyError",
    "NothingLearnedError",
    "OutputError",
    "TargetError",
    "TrainingError",
    "UnreachableServerError",
    "UnsupportedModelError",
    "did_you_mean",
    "first_line",
    "list_faults",
]


class LoraError(Exception):
    """Base class of every error that loralib raises on purpose.

    Attributes:
        is_told_elsewhere: whether another one of several cooperating processes reports it to the user.
    """

    is_told_elsewhere = False


class ConfigError(LoraError, ValueError):
    """A setting has a value that it cannot have."""


class BiasModeError(ConfigError, NotImplementedError):
    """``bias`` is not 'none', 'all' or 'lora_only' (Microsoft's loralib raises NotImplementedError)."""


class TargetError(LoraError, ValueError):
    """A module that should be adapted does not exist, or cannot be adapted."""


class AdapterError(LoraError, ValueError):
    """An adapter does not fit a model, or cannot be expressed in a format."""


class FormatError(AdapterError):
    """A file is not what it claims to be: truncated, corrupt, malicious or of another type."""


class BaseMismatchError(AdapterError):
    """An adapter was trained on a base model other than the one it is loaded into."""


class MergeError(LoraError, RuntimeError):
    """Adapter and base weights cannot be merged, or are in the wrong state for the request."""


class DataError(LoraError, ValueError):
    """A data file, or a line in it, is not what the reader expects."""


class BaseModelError(LoraError, OSError):
    """A base model cannot be found, fetched or read."""


class TrainingError(LoraError, RuntimeError):
    """Training cannot start or continue."""


class NothingLearnedError(TrainingError):
    """An adapted layer receives no gradient, or the adapter is unchanged after training."""


class InterruptedRunError(TrainingError):
    """A signal stopped a run, which saved its state first.

    Attributes:
        exit_code: the exit code for the program: 128 + the signal number.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class BusyModelError(LoraError, RuntimeError):
    """A model is in use: it cannot generate while it is being trained, nor change its adapter while it does either."""


class BusyServerError(LoraError, RuntimeError):
    """A server has reached its limit of requests, or is shutting down; the same request may be accepted later."""


class UnreachableServerError(LoraError, OSError):
    """Another server cannot be used: it is unreachable, refuses, or returns nothing usable."""


class UnsupportedModelError(LoraError, RuntimeError):
    """A model computes something in an unknown way; training and generation have slower fallbacks for it."""


class OutputError(LoraError, OSError):
    """A result cannot be written to its destination."""


class MissingDependencyError(LoraError, ImportError):
    """An optional package is required but not installed; the message says what to install."""


def list_faults(heading: str, faults: Sequence[str], fix: str = "", most: int = 20) -> str:
    """Joins all faults of one kind into one message.

    Args:
        heading: what is wrong, without a final colon.
        faults: one line per fault.
        fix: what to do about it.
        most: maximum number of faults to list; the rest are only counted.

    Returns:
        ``heading``, one indented line per fault, and the fix.

    >>> print(list_faults("2 tensors do not fit", ["a: (1,), expected (2,)", "b: missing"], "Use another base."))
    2 tensors do not fit:
      a: (1,), expected (2,)
      b: missing
    Use another base.
    """
    lines = [f"{heading}:", *(f"  {fault}" for fault in faults[:most])]
    if len(faults) > most:
        lines.append(f"  ... and {len(faults) - most} more")
    if fix:
        lines.append(fix)
    return "\n".join(lines)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" with the closest known words, or an empty string.

    >>> did_you_mean("lora_dropuot", ["lora_dropout", "lora_alpha"])
    " Did you mean 'lora_dropout'?"
    >>> did_you_mean("zzz", ["lora_dropout"])
    ''
    """
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""


def first_line(error: BaseException) -> str:
    """Returns the first line of another library's error, without a period; if it has no message, its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(". ")
