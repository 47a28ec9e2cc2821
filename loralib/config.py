"""What an adapter is: `LoraConfig`, with PEFT's field names, meanings and defaults."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import AdapterError, ConfigError, did_you_mean, list_faults

__all__ = ["ALL_LINEAR", "LoraConfig", "first_match", "is_plain_name", "matches", "matching_steps"]

ALL_LINEAR = "all-linear"

# Keys other tools write into adapter_config.json that change nothing about what the adapter computes.
_HARMLESS = frozenset(
    """auto_mapping corda_config eva_config inference_mode loftq_config lora_ga_config megatron_config megatron_core
    peft_type peft_version qalora_group_size revision runtime_config velora_config""".split()
)


def _knob(default: Any, text: str) -> Any:
    """Declares a field once: its default and the help text that flags, TOML keys and docs are made from."""
    if isinstance(default, dict):
        return field(default_factory=dict, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class LoraConfig:
    """The settings of one LoRA adapter (Hu et al. 2021, arXiv:2106.09685).

    Every field but `enable_lora` is PEFT's: same name, meaning and default.  A layer of weight W (out, in) computes
    ``W x + scaling * B A x`` with A (r, in), B (out, r) and ``scaling = lora_alpha / r``.

    Raises:
        ConfigError: one or more fields hold a value they cannot have; all are reported together.

    >>> LoraConfig(r=4, lora_alpha=32, target_modules=["c_attn"], enable_lora={"c_attn": [True, False, True]}).r
    4
    >>> LoraConfig(r=0)
    Traceback (most recent call last):
        ...
    loralib.errors.ConfigError: 1 setting of the adapter cannot be used:
      r is 0, expected a whole number of at least 1 (the rank of the update; 4 to 64 are usual)
    """

    r: int = _knob(8, "rank of the update: the inner size of A (r, in) and B (out, r)")
    lora_alpha: float = _knob(8, "the update is scaled by lora_alpha / r")
    target_modules: str | Sequence[str] | None = _knob(
        None, "modules to adapt: names or name endings, one regular expression for the whole name, or 'all-linear'"
    )
    lora_dropout: float = _knob(0.0, "probability of dropping an input of the low-rank path while training")
    bias: str = _knob("none", "which biases train too: 'none', 'all' or 'lora_only' (those of adapted layers)")
    use_rslora: bool = _knob(False, "scale by lora_alpha / sqrt(r) instead (rsLoRA, arXiv:2312.03732)")
    modules_to_save: Sequence[str] | None = _knob(None, "modules trained in full and saved with the adapter")
    exclude_modules: str | Sequence[str] | None = _knob(None, "modules left alone: names, endings or one expression")
    layers_to_transform: int | Sequence[int] | None = _knob(None, "numbers of the layers to adapt; default: all")
    layers_pattern: str | Sequence[str] | None = _knob(None, "name of the list of layers, as 'layers' or 'h'")
    rank_pattern: Mapping[str, int] = _knob({}, "another r for modules whose name ends so; the first match counts")
    alpha_pattern: Mapping[str, float] = _knob({}, "another lora_alpha for modules whose name ends so")
    enable_lora: Mapping[str, Sequence[bool]] = _knob(
        {}, "for fused projections: which equal blocks of the output to adapt, as {'c_attn': [True, False, True]}"
    )
    init_lora_weights: bool | str = _knob(True, "True: A random and B zero, so that training starts from the base")
    fan_in_fan_out: bool = _knob(False, "the base weight is stored (in, out); found out by itself for Conv1D")
    use_dora: bool = _knob(False, "weight-decomposed LoRA (arXiv:2402.09353); read and converted, not trained here")
    lora_bias: bool = _knob(False, "B has a bias; read, not trained here")
    task_type: str | None = _knob(None, "what the model is for, as 'CAUSAL_LM'; a note for other tools")
    base_model_name_or_path: str | None = _knob(None, "the base model the adapter belongs to; never a cache path")

    def __post_init__(self) -> None:
        for name in ("target_modules", "modules_to_save", "exclude_modules", "layers_to_transform", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, (set, frozenset)):  # a set has no order of its own
                value = sorted(value)
            if isinstance(value, (list, tuple)):
                # PEFT writes empty lists for what is not used; without a target there is nothing to adapt, though.
                object.__setattr__(self, name, tuple(value) if value or name == "target_modules" else None)
        for name in ("rank_pattern", "alpha_pattern", "enable_lora"):
            value = getattr(self, name)
            if isinstance(value, Mapping) or value is None:
                object.__setattr__(self, name, dict(value or {}))
        faults = self._type_faults()
        if not faults:
            object.__setattr__(self, "enable_lora", {key: tuple(blocks) for key, blocks in self.enable_lora.items()})
            faults = self._faults()
        if faults:
            count = f"{len(faults)} setting{'s' if len(faults) > 1 else ''}"
            raise ConfigError(list_faults(f"{count} of the adapter cannot be used", faults))

    def _type_faults(self) -> list[str]:
        """Names the fields whose values are not of the kind that the other checks expect."""
        flag, name, names = ("True or False", _is_flag), ("a text", _is_text), ("a list of names", _is_texts)
        either = ("a name or a list of names", lambda value: _is_text(value) or _is_texts(value))
        numbers = ("a whole number or a list of such", _is_ints)
        keyed = ("values by name", lambda value: isinstance(value, dict) and _is_texts(tuple(value)))
        start = ("True, False or a name", lambda value: isinstance(value, (bool, str)))
        kinds: dict[str, tuple[str, Callable[[Any], bool]]] = {
            **dict.fromkeys(("use_rslora", "fan_in_fan_out", "use_dora", "lora_bias"), flag),
            **dict.fromkeys(("task_type", "base_model_name_or_path"), name),
            **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), either),
            **dict.fromkeys(("rank_pattern", "alpha_pattern", "enable_lora"), keyed),
            "modules_to_save": names,
            "layers_to_transform": numbers,
            "init_lora_weights": start,
        }
        values = {field: getattr(self, field) for field in kinds}
        faults = [
            f"{field} is {list(value) if isinstance(value, tuple) else value!r}"[:200] + f", expected {kinds[field][0]}"
            for field, value in values.items()
            if not kinds[field][1](value)
        ]
        if not faults:
            odd = [key for key, blocks in self.enable_lora.items() if not isinstance(blocks, (list, tuple))]
            faults += [f"enable_lora[{key!r}] is {self.enable_lora[key]!r}, expected a list of booleans" for key in odd]
        return faults

    def _faults(self) -> list[str]:
        faults = []
        if not _is_int(self.r) or self.r < 1:
            faults.append(
                f"r is {self.r!r}, expected a whole number of at least 1 (the rank of the update; 4 to 64 are usual)"
            )
        elif self.r > _MAX_R:
            faults.append(f"r is above {_MAX_R:,}, wider than any layer")
        if not _is_number(self.lora_alpha) or self.lora_alpha == 0:
            faults.append(f"lora_alpha is {self.lora_alpha!r}, expected a finite number other than 0 (often 2 * r)")
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            faults.append(f"lora_dropout is {self.lora_dropout!r}, expected a probability from 0 to below 1")
        if self.bias not in ("none", "all", "lora_only"):
            faults.append(f"bias is {self.bias!r}, expected 'none', 'all' or 'lora_only'")
        if self.target_modules is not None and not self.target_modules:
            faults.append("target_modules is empty, expected at least one name, or 'all-linear'")
        layers = (self.layers_pattern,) if isinstance(self.layers_pattern, str) else self.layers_pattern
        faults += self._pattern_faults(layers or ())
        if layers and self.layers_to_transform is None:
            faults.append(f"layers_pattern is {list(layers)!r}, which says nothing without layers_to_transform")
        for key, rank in self.rank_pattern.items():
            if not _is_int(rank) or not 1 <= rank <= _MAX_R:
                faults.append(f"rank_pattern[{key!r}] is {str(rank)[:80]}, expected a whole number of at least 1")
        for key, alpha in self.alpha_pattern.items():
            if not _is_number(alpha) or alpha == 0:
                faults.append(f"alpha_pattern[{key!r}] is {alpha!r}, expected a finite number other than 0")
        for key, blocks in self.enable_lora.items():
            if not blocks or not all(isinstance(block, bool) for block in blocks) or not any(blocks):
                faults.append(f"enable_lora[{key!r}] is {list(blocks)!r}, expected booleans, at least one of them True")
        return faults

    def _pattern_faults(self, layers: Sequence[str]) -> list[str]:
        """Lists settings that are too long, and regular expressions that are none."""
        keyed = ("rank_pattern", "alpha_pattern", "enable_lora")
        named = ("target_modules", "exclude_modules")
        lists = (*named, "modules_to_save", "layers_to_transform", "layers_pattern", *keyed)
        faults = [
            f"{name} has {len(value):,} entries, expected at most {_MAX_ENTRIES:,}"
            for name, value in ((name, getattr(self, name)) for name in lists)
            if isinstance(value, (tuple, dict)) and len(value) > _MAX_ENTRIES
        ]
        if faults:
            return faults
        expressions = [(name, getattr(self, name)) for name in named if isinstance(getattr(self, name), str)]
        expressions += [(f"a key of {name}", key) for name in keyed for key in getattr(self, name)]
        expressions += [("layers_pattern", pattern) for pattern in layers]
        return [fault for name, expression in expressions if (fault := _expression_fault(name, expression))]

    def rank_of(self, name: str) -> int:
        """Returns r for the module of that dotted name."""
        key = _first_match_of_layer(self.rank_pattern, name)
        return self.r if key is None else self.rank_pattern[key]

    def alpha_of(self, name: str) -> float:
        """Returns lora_alpha for the module of that dotted name."""
        key = _first_match_of_layer(self.alpha_pattern, name)
        return self.lora_alpha if key is None else self.alpha_pattern[key]

    def blocks_of(self, name: str) -> tuple[bool, ...] | None:
        """Returns which output blocks of the module are adapted, or None for a plain (not fused) one."""
        key = first_match(self.enable_lora, name)
        return None if key is None else tuple(self.enable_lora[key])

    def saves(self, name: str) -> bool:
        """Whether modules_to_save holds the module: any name that ends so, with or without a dot (PEFT's rule)."""
        return any(name.endswith(entry) for entry in self.modules_to_save or ())

    @property
    def changes_base(self) -> bool:
        """Whether the start belongs to another base weight than the model's (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA).

        The other starts only choose A and B: once trained, they are all alike.
        """
        start = self.init_lora_weights
        return isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))

    def replace(self, **changes: Any) -> LoraConfig:
        """Returns a copy with other values."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Returns what adapter_config.json holds: PEFT's keys, and only such that old versions of PEFT know.

        `enable_lora` is left out (PEFT knows no fused blocks); fields newer than PEFT 0.5 only appear when set.

        >>> LoraConfig(r=4, target_modules=["q_proj"]).to_dict()["target_modules"]
        ['q_proj']
        """
        values: dict[str, Any] = {"peft_type": "LORA"}
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if spec.name == "enable_lora" or (spec.name in _NEWER and value == _default(spec)):
                continue
            values[spec.name] = list(value) if isinstance(value, tuple) else value
        values["lora_alpha"] = _whole(self.lora_alpha)
        values["alpha_pattern"] = {key: _whole(alpha) for key, alpha in self.alpha_pattern.items()}
        values["inference_mode"] = True
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraConfig:
        """Reads the content of an adapter_config.json.

        Args:
            values: PEFT's keys.  Keys that change nothing about the result are passed over.

        Raises:
            AdapterError: not a LoRA adapter, or it uses a feature that would be lost silently.
            ConfigError: a value is out of range.
        """
        kind = values.get("peft_type", "LORA")
        if str(kind).upper().rsplit(".", 1)[-1] != "LORA":
            raise AdapterError(f"adapter_config.json says peft_type {kind!r}, expected 'LORA'; other kinds do not load")
        known = {spec.name: spec for spec in dataclasses.fields(cls)}
        faults = [
            f"{key} = {str(value)[:80]!r}" + did_you_mean(key, known)
            for key, value in values.items()
            if key not in known and key not in _HARMLESS and not _is_off(value)
        ]
        if faults:
            raise AdapterError(
                list_faults(
                    "adapter_config.json uses what loralib does not know, and leaving it out would change the result",
                    faults,
                    "Export the adapter without it (merge it, or train without it), and load that.",
                )
            )
        chosen = {key: value for key, value in values.items() if key in known and value is not None}
        return cls(**chosen)


# Fields that PEFT learned after 0.5: written only when they say something.
_NEWER = frozenset({"use_rslora", "use_dora", "lora_bias", "exclude_modules", "enable_lora"})


def matches(pattern: str | Sequence[str] | None, name: str) -> str | None:
    """Tells which entry of a list of names, or whether a regular expression, fits a dotted module name.

    A list entry fits exactly or as an ending after a dot; a string is an expression for the whole name (PEFT's rule).

    Returns:
        The entry that fits, or None.

    >>> matches(["c_attn", "mlp.c_proj"], "h.0.mlp.c_proj")
    'mlp.c_proj'
    >>> matches(r".*\\.c_(attn|fc)", "h.0.mlp.c_proj") is None
    True
    """
    if pattern is None:
        return None
    if isinstance(pattern, str):
        return pattern if re.fullmatch(pattern, name) else None
    for entry in pattern:
        if name == entry or name.endswith(f".{entry}"):
            return entry
    return None


def first_match(patterns: Iterable[str], name: str) -> str | None:
    """Returns the first key K for which ``(.*\\.)?(K)$`` fits a dotted module name (PEFT's rule), or None.

    >>> first_match({"layers.1.q_proj": 4, "q_proj": 8}, "model.layers.1.q_proj")
    'layers.1.q_proj'
    """
    keys = tuple(patterns)
    plain, expressions = _by_kind(keys)
    endings = (name, *(name[dot + 1 :] for dot, letter in enumerate(name) if letter == "."))
    fitting = [plain[ending] for ending in endings if ending in plain]
    fitting += [number for number, expression in expressions if expression.match(name)]
    return keys[min(fitting)] if fitting else None


@functools.lru_cache(maxsize=16)
def _by_kind(keys: tuple[str, ...]) -> tuple[dict[str, int], list[tuple[int, re.Pattern[str]]]]:
    """Returns the places of names, which are looked up, and those of expressions, which are run one by one."""
    plain = {key: number for number, key in enumerate(keys) if is_plain_name(key)}
    return plain, [(n, re.compile(rf"(.*\.)?({key})$")) for n, key in enumerate(keys) if key not in plain]


def _first_match_of_layer(patterns: Mapping[str, Any], name: str) -> str | None:
    """As `first_match`; the out_proj of an nn.MultiheadAttention takes what is said of the attention (PEFT's rule)."""
    key = first_match(patterns, name)
    return first_match(patterns, name.removesuffix(".out_proj")) if key is None else key


def is_plain_name(key: str) -> bool:
    """Whether a pattern is just a dotted name, which is compared and not run as a regular expression."""
    return re.fullmatch(r"[\w.-]+", key) is not None


def matching_steps(patterns: Iterable[str], names: Sequence[str]) -> float:
    """Bounds how many steps `first_match` takes, for patterns and names that come from a file.

    A regular expression tries every way to share a name between its repeats, for every choice of alternatives.

    >>> matching_steps(["q_proj", r"layers\\.[01]\\..*_proj"], ["layers.0.q_proj"])
    49.0
    >>> matching_steps(["(a*)*"], ["a"])
    inf
    """
    length = max(map(len, names), default=0) + 1
    dots = max((name.count(".") for name in names), default=0) + 1
    total = 0.0
    for pattern in patterns:
        if is_plain_name(pattern):
            total += 1
            continue
        # Escapes and sets stand for one letter each: repeats, groups and alternatives are left.
        bare = re.sub(r"\\.|\[\^?(?:\\.|.)(?:\\.|[^]\\])*\]", "x", pattern[:_MAX_KEY]).replace("(?:", "(")
        repeats, groups = len(re.findall(r"[*+?{]+", bare)), bare.count("(") + 1
        if len(pattern) > _MAX_KEY or repeats > 9 or groups > 9 or re.search(r"\)[*+{]|\(\?", bare):
            return math.inf
        total += (bare.count("|") / groups + 1) ** groups * float(length) ** repeats * dots
    return total * len(names)


def _expression_fault(name: str, expression: str) -> str | None:
    if is_plain_name(expression):  # thousands of modules may be named one by one
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        return f"{name} is {expression[:80]!r}, which is not a regular expression: {error}"
    return None


_MAX_ENTRIES = 20_000
_MAX_KEY = 1000  # characters of a key in a file
_MAX_R = 1_000_000


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_text(value: object) -> bool:
    return value is None or (isinstance(value, str) and value.isprintable())


def _is_texts(value: object) -> bool:
    return value is None or (
        isinstance(value, tuple) and all(item and isinstance(item, str) and item.isprintable() for item in value)
    )


def _is_ints(value: object) -> bool:
    return value is None or _is_int(value) or (isinstance(value, tuple) and all(_is_int(item) for item in value))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _is_off(value: object) -> bool:
    return value is None or value is False or value == {} or value == [] or value == ""


def _whole(value: float) -> float:
    """Returns 16 for 16.0: readers of adapter_config.json want an integer where there is one."""
    return int(value) if float(value).is_integer() else value


def _default(spec: dataclasses.Field[Any]) -> Any:
    return spec.default if spec.default is not dataclasses.MISSING else {}
