"""The settings of an adapter: `LoraConfig`, with PEFT's field names, meanings and defaults."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from .errors import AdapterError, ConfigError, did_you_mean, list_faults
from .settings import check, setting, settings_class

__all__ = [
    "ALL_LINEAR",
    "HUB_NAMES",
    "LoraConfig",
    "as_pattern",
    "first_match",
    "is_plain_name",
    "matches",
    "matching_steps",
    "parse_enable_lora",
    "parse_target_modules",
    "parse_token_indices",
    "with_ranks",
]

ALL_LINEAR = "all-linear"

# Our names of bases, mapped to the Hub models that they are quantised copies of, which other tools know.
HUB_NAMES: Final[Mapping[str, str]] = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}

# Keys in adapter_config.json, written by other tools, that do not affect what the adapter computes.
_HARMLESS = frozenset(
    """auto_mapping corda_config eva_config inference_mode loftq_config lora_ga_config megatron_config megatron_core
    peft_type peft_version qalora_group_size revision runtime_config velora_config""".split()
)


_LISTS: Final = (
    "target_modules",
    "target_parameters",
    "modules_to_save",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
)
_MAX_RANK: Final = 1_000_000  # wider than any layer
_MAX_ENTRIES: Final = 20_000
_MAX_KEY: Final = 1000  # maximum length of a key in a file, in characters


@settings_class
@dataclass(frozen=True, repr=False)
class LoraConfig:
    """The settings of one LoRA adapter (Hu et al. 2021, arXiv:2106.09685).

    Every field but `enable_lora` is PEFT's: same name, meaning and default.  A layer of weight W (out, in) computes
    ``W x + scaling * B A x`` with A (r, in), B (out, r) and ``scaling = lora_alpha / r``.

    Raises:
        ConfigError: one or more settings are invalid; the message lists all of them.

    >>> LoraConfig(r=4, lora_alpha=32, target_modules=["c_attn"], enable_lora={"c_attn": [True, False, True]}).r
    4
    >>> LoraConfig(r=0)
    Traceback (most recent call last):
        ...
    loralib.errors.ConfigError: 1 setting of the adapter is invalid:
      r is 0, expected a whole number of at least 1 (4 to 64 are usual)
    """

    r: int = setting(
        8,
        "rank of the update: the inner size of A (r, in) and B (out, r)",
        at_least=1,
        at_most=_MAX_RANK,
        expected="a whole number of at least 1 (4 to 64 are usual)",
    )
    lora_alpha: float = setting(
        8, "scale the update by lora_alpha / r", rule=bool, expected="a number other than 0 (often 2 * r)"
    )
    target_modules: str | Sequence[str] | None = setting(
        None,
        "modules to adapt: a list of names or name endings, a regular expression for the whole name, or 'all-linear'",
        rule=bool,
        expected="a list of names, a regular expression or 'all-linear'",
    )
    lora_dropout: float = setting(
        0.0, "dropout probability for the inputs of the LoRA path during training", at_least=0, below=1
    )
    bias: str = setting(
        "none",
        "biases to train as well: 'none', 'all' or 'lora_only' (those of adapted layers)",
        choices=("none", "all", "lora_only"),
    )
    use_rslora: bool = setting(False, "scale by lora_alpha / sqrt(r) instead (rsLoRA, arXiv:2312.03732)")
    target_parameters: Sequence[str] | None = setting(
        None,
        "expert weights to adapt that are parameters, not modules: a list of names or name endings, such as "
        "'experts.gate_up_proj'; 'all-linear' includes them all",
    )
    modules_to_save: Sequence[str] | None = setting(None, "modules to train in full and save with the adapter")
    exclude_modules: str | Sequence[str] | None = setting(
        None, "modules not to adapt: a list of names or name endings, or a regular expression"
    )
    layers_to_transform: int | Sequence[int] | None = setting(None, "indices of the layers to adapt; None adapts all")
    layers_pattern: str | Sequence[str] | None = setting(None, "name of the list of layers, such as 'layers' or 'h'")
    rank_pattern: Mapping[str, int] = setting(
        {}, "a different r for modules whose names end in a key; the first match wins", at_least=1, at_most=_MAX_RANK
    )
    alpha_pattern: Mapping[str, float] = setting(
        {},
        "a different lora_alpha for modules whose names end in a key; the first match wins",
        rule=bool,
        expected="a number other than 0",
    )
    enable_lora: Mapping[str, Sequence[bool]] = setting(
        {},
        "for fused projections: which equal blocks of the output to adapt, as in {'c_attn': [True, False, True]}",
        rule=any,
        expected="a table of lists of booleans, at least one of them true",
    )
    init_lora_weights: bool | str = setting(
        True,
        "how A and B start. True: A random and B zero; 'pissa', 'pissa_niter_16' (fast) or 'olora': part of the base "
        "weight; 'eva': A from the data",
    )
    fan_in_fan_out: bool = setting(False, "the base weight is stored (in, out); detected automatically for Conv1D")
    use_dora: bool = setting(
        False, "train the magnitudes and directions of the weight's rows separately (DoRA, arXiv:2402.09353)"
    )
    lora_bias: bool = setting(False, "train a bias of B as well")
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = setting(
        None,
        "rows of the input embedding to train on their own, such as those of new tokens, even if the head is tied to "
        "it; or a table of module names and rows",
        at_least=0,
        expected="a list of row numbers, counted from 0, or a table of such lists",
    )
    eva_config: Mapping[str, float | bool] | None = setting(
        None, "for init_lora_weights 'eva': rho (2.0), tau (0.99) and use_label_mask (true), as in PEFT"
    )
    task_type: str | None = setting(
        None,
        "what the model is for, such as 'CAUSAL_LM'; with 'SEQ_CLS', 'TOKEN_CLS' or 'QUESTION_ANS' its head trains too",
    )
    base_model_name_or_path: str | None = setting(None, "the base model the adapter belongs to; never a cache path")

    def __post_init__(self) -> None:
        for name in _LISTS:
            value = getattr(self, name)
            if isinstance(value, (set, frozenset)):  # sets have no order
                value = sorted(value)
            if name != "target_modules" and value in ("", [""], ("",)):
                value = []  # PEFT treats an empty string as none
            if name == "target_modules" and value in ([ALL_LINEAR], (ALL_LINEAR,)):
                value = ALL_LINEAR  # settings from YAML and flags arrive as a list
                object.__setattr__(self, name, value)
            if isinstance(value, (list, tuple)):
                # PEFT writes empty lists for unused settings; without a target, however, there is nothing to adapt.
                object.__setattr__(self, name, tuple(value) if value or name == "target_modules" else None)
        if self.target_parameters and self.target_modules == ():
            object.__setattr__(self, "target_modules", None)  # PEFT's way of saying: only these parameters
        rows = self.trainable_token_indices
        if isinstance(rows, (list, tuple, Mapping)):
            rows = {key: _tuple(item) for key, item in rows.items()} if isinstance(rows, Mapping) else tuple(rows)
            object.__setattr__(self, "trainable_token_indices", rows or None)
        for name in ("rank_pattern", "alpha_pattern", "enable_lora"):
            value = getattr(self, name)
            if isinstance(value, Mapping) or value is None:
                entries = (value or {}).items()
                value = {key: _tuple(item) for key, item in entries}
                object.__setattr__(self, name, value)
        check(self, "the adapter", self._faults)

    def _faults(self) -> list[str]:
        """Finds strings that would garble a terminal, lists that are too long, and invalid regular expressions."""
        values = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}
        texts = {
            name: (value,) if isinstance(value, str) else value
            for name, value in values.items()
            if isinstance(value, (str, tuple, dict))
        }
        faults = [
            f"{name} has {len(entries):,} entries, expected at most {_MAX_ENTRIES:,}"
            for name, entries in texts.items()
            if len(entries) > _MAX_ENTRIES
        ] or [
            f"{name} holds {text!r}"[:200] + ", expected printable text"
            for name, entries in texts.items()
            for text in entries
            if isinstance(text, str) and not text.isprintable()
        ]
        if faults:
            return faults
        named = ("target_modules", "exclude_modules")
        keyed = ("rank_pattern", "alpha_pattern", "enable_lora")
        layers = texts.get("layers_pattern", ())
        expressions = [(name, values[name]) for name in named if isinstance(values[name], str)]
        expressions += [(f"a key of {name}", key) for name in keyed for key in values[name]]
        expressions += [("layers_pattern", pattern) for pattern in layers]
        rows = self.trainable_token_indices or ()
        for name, indices in rows.items() if isinstance(rows, Mapping) else [("", rows)]:
            if twice := [index for index, count in Counter(indices).items() if count > 1 or index < 0]:
                place = f"trainable_token_indices[{name!r}]" if name else "trainable_token_indices"
                faults.append(f"{place} holds {twice[:5]}, expected each row once, counted from 0")
        if (self.eva_config or {}).get("rho", 1) < 1:
            faults.append(f"eva_config has rho {(self.eva_config or {})['rho']}, expected at least 1 (1: equal ranks)")
        if layers and self.layers_to_transform is None:
            faults.append(f"layers_pattern is {self.layers_pattern!r}, which needs layers_to_transform")
        return faults + [fault for name, text in expressions if (fault := _expression_fault(name, text))]

    def __repr__(self) -> str:
        """Shows the settings that differ from the defaults.

        >>> LoraConfig(r=4, target_modules=["q_proj"])
        LoraConfig(r=4, target_modules=('q_proj',))
        """
        values = {s.name: getattr(self, s.name) for s in dataclasses.fields(self)}
        chosen = {name: value for name, value in values.items() if value != getattr(_defaults(), name)}
        return f"LoraConfig({', '.join(f'{name}={_short(value)}' for name, value in chosen.items())})"

    def rank_of(self, name: str) -> int:
        """Returns r for the module with this dotted name."""
        key = _first_match_of_layer(self.rank_pattern, name)
        return self.r if key is None else self.rank_pattern[key]

    def alpha_of(self, name: str) -> float:
        """Returns lora_alpha for the module with this dotted name."""
        key = _first_match_of_layer(self.alpha_pattern, name)
        return self.lora_alpha if key is None else self.alpha_pattern[key]

    def blocks_of(self, name: str) -> tuple[bool, ...] | None:
        """Returns which output blocks of the module are adapted; None if it is plain (not fused)."""
        key = first_match(self.enable_lora, name)
        return None if key is None else tuple(self.enable_lora[key])

    def saves(self, name: str) -> bool:
        """Whether a module is in modules_to_save: its name ends with an entry, with or without a dot (PEFT's rule)."""
        return any(name.endswith(entry) for entry in self.modules_to_save or ())

    def saved_part(self, name: str) -> str:
        """Returns the outermost module in modules_to_save that contains the parameter; "" if there is none."""
        parts = name.split(".")
        modules = (".".join(parts[:count]) for count in range(1, len(parts)))
        return next((module for module in modules if self.saves(module)), "")

    @property
    def changes_base(self) -> bool:
        """Whether the initialisation changes the base weights (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA).

        Other initialisations only choose A and B; once trained, such adapters do not differ.
        """
        start = self.init_lora_weights
        return isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga"))

    def with_start(self) -> LoraConfig:
        """Returns the settings of the equivalent plain adapter, of twice the rank, which includes the base's change."""
        factor = math.sqrt(2) if self.use_rslora else 2
        return self.replace(
            r=2 * self.r,
            lora_alpha=factor * self.lora_alpha,
            rank_pattern={key: 2 * r for key, r in self.rank_pattern.items()},
            alpha_pattern={key: factor * alpha for key, alpha in self.alpha_pattern.items()},
            init_lora_weights=True,
        )

    def replace(self, **changes: Any) -> LoraConfig:
        """Returns a copy with some values replaced."""
        return dataclasses.replace(self, **changes)

    def targeting(self, modules: str | Sequence[str] | None) -> LoraConfig:
        """Returns a copy that adapts exactly these modules, without the settings that would narrow the selection."""
        return self.replace(target_modules=modules, exclude_modules=None, layers_to_transform=None, layers_pattern=None)

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of adapter_config.json, using only keys that old versions of PEFT know.

        `enable_lora` is left out (PEFT has no fused blocks); fields newer than PEFT 0.5 appear only if they are set.

        >>> LoraConfig(r=4, target_modules=["q_proj"]).to_dict()["target_modules"]
        ['q_proj']
        """
        values: dict[str, Any] = {"peft_type": "LORA"}
        defaults = LoraConfig()
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            newer = spec.name in _NEWER and value == getattr(defaults, spec.name)
            if newer or spec.name in ("enable_lora", "eva_config"):
                continue
            values[spec.name] = _list(value)
        if self.target_parameters and self.target_modules is None:
            values["target_modules"] = []  # otherwise PEFT would choose some
        values["lora_alpha"] = _whole(self.lora_alpha)
        values["alpha_pattern"] = {key: _whole(alpha) for key, alpha in self.alpha_pattern.items()}
        values["inference_mode"] = True
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraConfig:
        """Reads the content of an adapter_config.json.

        Args:
            values: PEFT's keys.  Keys that do not affect the result are ignored.

        Raises:
            AdapterError: this is not a LoRA adapter, or it uses a feature that would be lost silently.
            ConfigError: a value is out of range.
        """
        kind = values.get("peft_type", "LORA")
        if str(kind).upper().rsplit(".", 1)[-1] != "LORA":
            raise AdapterError(
                f"adapter_config.json has peft_type {kind!r}, expected 'LORA'; other kinds cannot be loaded"
            )
        if faults := _unknown_fields(cls, values, _READING):
            raise AdapterError(
                list_faults(
                    "adapter_config.json uses settings that loralib does not know, and ignoring them would change "
                    "the result",
                    list(faults.values()),
                    _MERGE_IN_PEFT if all(_merges_in_peft(key, values) for key in faults) else "",
                )
            )
        return cls._chosen({key: value for key, value in values.items() if key != "eva_config"})

    @classmethod
    def of(cls, config: LoraConfig | Any) -> LoraConfig:
        """Returns a config for training; a `peft.LoraConfig` is converted field by field.

        Raises:
            ConfigError: it is something else, or uses features that loralib does not train; lists each with a way out.
        """
        if isinstance(config, cls):
            return config
        to_dict = getattr(config, "to_dict", None)
        values = to_dict() if callable(to_dict) else None
        kind = str((values or {}).get("peft_type")).upper().rsplit(".", 1)[-1]
        if values is None or kind != "LORA":
            raise ConfigError(
                f"the config is a {type(config).__name__}, expected a loralib.LoraConfig or PEFT's class of the "
                "same name"
            )
        if faults := _unknown_fields(cls, values, _TRAINING):
            title = "the config asks for features that loralib does not train"
            raise ConfigError(list_faults(title, list(faults.values())))
        return cls._chosen(values)

    @classmethod
    def _chosen(cls, values: Mapping[str, Any]) -> LoraConfig:
        known = {spec.name for spec in dataclasses.fields(cls)}
        chosen = {key: value for key, value in values.items() if key in known and value is not None}
        if "eva_config" in chosen:
            eva = chosen["eva_config"]
            eva = eva if isinstance(eva, Mapping) else vars(eva)
            chosen["eva_config"] = {key: eva[key] for key in ("rho", "tau", "use_label_mask") if key in eva}
        if "task_type" in chosen:  # PEFT uses a string enum
            chosen["task_type"] = str(getattr(chosen["task_type"], "value", chosen["task_type"]))
        return cls(**chosen)


def _unknown_fields(known: type, values: Mapping[str, Any], ways: Mapping[str, str]) -> dict[str, str]:
    """Describes by name unknown fields whose meaning would be lost, each with a way out if there is one."""
    names = {spec.name for spec in dataclasses.fields(known)}
    return {
        key: f"{key} = {str(value)[:80]!r}" + (f": {ways[key]}" if key in ways else did_you_mean(key, names))
        for key, value in values.items()
        if key not in names and key not in _HARMLESS and not _is_off(value) and not _ties_nothing(key, values)
    }


def _ties_nothing(key: str, values: Mapping[str, Any]) -> bool:
    """Whether this is ``ensure_weight_tying`` without effect: PEFT ties only adapters and copies of these tables."""
    return key == "ensure_weight_tying" and not any(
        _names_a_table(values.get(name)) for name in ("target_modules", "modules_to_save")
    )


def _merges_in_peft(key: str, values: Mapping[str, Any]) -> bool:
    """Whether PEFT merges correctly what it trained with this field."""
    if key == "ensure_weight_tying":  # two tied tables with one update: merging adds it twice
        return not _names_a_table(values.get("target_modules"))
    return key in ("kasa_config", "monteclora_config", "use_bdlora")


def _names_a_table(modules: Any) -> bool:
    """Whether names of modules, or an expression for them, include a table of tokens as PEFT knows it."""
    tables = ("embed_tokens", "lm_head")
    if isinstance(modules, str):
        return any(re.fullmatch(modules, table) for table in tables)
    return any(str(name).rpartition(".")[2] in tables for name in modules or ())


_MERGE_IN_PEFT: Final = (
    "PEFT can merge what it trained into the base's weights: peft.PeftModel.from_pretrained(base, "
    "directory).merge_and_unload().save_pretrained(merged); then use `merged` as the base model, without an adapter."
)
# What to do instead of using one of PEFT's fields: when reading an adapter that has it, and when training one.
_READING: Final = {
    "alora_invocation_tokens": "an activated LoRA acts only after these tokens and cannot be merged; PEFT can run it",
    "arrow_config": "PEFT routes between several adapters; use each of them by itself, or run them in PEFT",
    "ensure_weight_tying": "the tied embedding and head are trained as one; PEFT can run it, and can merge it only if "
    "modules_to_save, not target_modules, names them",
    "kasa_config": "KaSA also changes the base's weights",
    "layer_replication": "the repeated layers share the base's weights but have updates of their own, so it cannot be "
    "merged; PEFT can run it",
    "monteclora_config": "MonteCLoRA also learns the spread of its factors",
    "use_bdlora": "BD-LoRA stores block-diagonal factors",
    "use_qalora": "QALoRA reads averages of the inputs of a quantised base, so it cannot be merged; PEFT can run it",
}
_TRAINING: Final = {
    "alora_invocation_tokens": "loralib does not train activated LoRA; leave it out for plain LoRA, or train with PEFT",
    "layer_replication": "loralib does not repeat layers; repeat them in the model first, and leave this out",
    "ensure_weight_tying": "leave it out: a head and an embedding in modules_to_save are trained separately",
    "use_qalora": "leave it out: plain LoRA is trained",
    "use_bdlora": "leave it out: plain LoRA is trained",
    "arrow_config": "loralib does not route between adapters; train each one separately",
}


@functools.cache
def _defaults() -> LoraConfig:
    return LoraConfig()


def _short(value: Any) -> str:
    """Formats a value; for a large collection, only the number of entries."""
    many = isinstance(value, (tuple, dict)) and len(value) > _MOST_SHOWN
    return f"<{len(value)} entries>" if many else repr(value)


_MOST_SHOWN: Final = 12


def with_ranks(config: LoraConfig, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> LoraConfig:
    """Returns a config with these ranks and alphas by full module name; the most common become r and lora_alpha."""
    if not ranks:
        return config.replace(rank_pattern={}, alpha_pattern={})
    r = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return config.replace(
        r=r, lora_alpha=alpha, rank_pattern=as_pattern(ranks, r), alpha_pattern=as_pattern(alphas, alpha)
    )


def as_pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Returns a pattern for the values that differ from the default; keys are name endings where these suffice."""
    by_ending: dict[str, set[Any]] = {}
    endings = set[str]()
    for name, value in values.items():
        by_ending.setdefault(name.rpartition(".")[2], set()).add(value)
        parts = name.split(".")
        endings.update(".".join(parts[i:]) for i in range(1, len(parts)))
    pattern: dict[str, Any] = {}
    for name, value in values.items():
        # The value for an attention also applies to its out_proj.
        if value == default or (name.endswith(".out_proj") and values.get(name.removesuffix(".out_proj")) == value):
            continue
        ending = name.rpartition(".")[2]
        if len(by_ending[ending]) == 1:
            key = _literal(ending)
        else:  # "^" marks a name that is also an ending of others, as "0" is of "block.0"
            key = f"^{_literal(name)}" if name in endings else _literal(name)
        pattern[key] = value
    return pattern


def _literal(name: str) -> str:
    return name if is_plain_name(name) else re.escape(name)


def parse_target_modules(text: str) -> str | list[str]:
    """Parses target_modules, or exclude_modules, as written on the command line and in TOML files.

    Args:
        text: names separated by commas, of which ``all-linear`` is one, or one regular expression that matches whole
            names.

    Returns:
        What `LoraConfig` takes: a list of names, or the text itself.

    >>> parse_target_modules("self_attn.q_proj,mlp.down_proj")
    ['self_attn.q_proj', 'mlp.down_proj']
    >>> parse_target_modules(r".*[qv]_proj"), parse_target_modules("all-linear")
    ('.*[qv]_proj', 'all-linear')
    >>> parse_target_modules("all-linear,lm_head")
    ['all-linear', 'lm_head']
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    parts = [part for name in names if name != ALL_LINEAR for part in name.split(".")]
    are_names = all(part.isidentifier() or part.isdigit() for part in parts)
    return names if are_names and names != [ALL_LINEAR] else text


def parse_token_indices(text: str) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    """Parses trainable_token_indices as written on the command line and in TOML files.

    Args:
        text: row numbers, as in ``5,6``; or with names of tables, as in ``embed_tokens=5,6;lm_head=6``.

    Returns:
        What `LoraConfig` takes.

    Raises:
        ConfigError: the text has another form.

    >>> parse_token_indices("5,6"), parse_token_indices("wte=5;lm_head=5,6")
    ((5, 6), {'wte': (5,), 'lm_head': (5, 6)})
    """
    named: dict[str, tuple[int, ...]] = {}
    for entry in filter(None, map(str.strip, text.split(";"))):
        name, _, rows = entry.rpartition("=")
        numbers = [number.strip() for number in rows.split(",") if number.strip()]
        if not numbers or not all(map(str.isdecimal, numbers)) or name.strip() in named or bool(name) != ("=" in text):
            raise ConfigError(
                f"trainable_token_indices is {text!r}, expected row numbers, as in 5,6; or row numbers by table, as "
                "in embed_tokens=5,6;lm_head=6"
            )
        named[name.strip()] = tuple(map(int, numbers))
    return named.get("", named)


def parse_enable_lora(text: str, targets: str | Sequence[str] | None) -> dict[str, tuple[bool, ...]]:
    """Parses enable_lora as written on the command line and in TOML files.

    Args:
        text: the blocks of each fused projection, as in ``c_attn=1,0,1;other=1,1,0``; ``1,0,1`` alone is for all
            targets.
        targets: the target modules.

    Returns:
        What `LoraConfig` takes.

    Raises:
        ConfigError: the text has another form.

    >>> parse_enable_lora("c_attn=1,0,1", None)
    {'c_attn': (True, False, True)}
    >>> parse_enable_lora("1,1,0", ["qkv"])
    {'qkv': (True, True, False)}
    """
    blocks = {}
    for entry in filter(None, map(str.strip, text.split(";"))):
        names, equals, flags = entry.rpartition("=")
        values = [_FLAGS.get(flag.strip().lower()) for flag in flags.split(",") if flag.strip()]
        keys = [names.strip()] if equals else [] if targets is None or isinstance(targets, str) else targets
        if not keys or not all(keys) or not values or None in values:
            raise ConfigError(
                f"enable_lora is {text!r}, expected a 1 or 0 for each block of each projection: c_attn=1,0,1; or just "
                "1,0,1 if target_modules is a list of names"
            )
        blocks.update(dict.fromkeys(keys, tuple(value is True for value in values)))
    return blocks


_FLAGS: Final = {"1": True, "0": False, "true": True, "false": False}

# Fields that PEFT added after 0.5: written only if they are set.
_NEWER = frozenset(
    {"use_rslora", "use_dora", "lora_bias", "exclude_modules", "target_parameters", "trainable_token_indices"}
)


def matches(pattern: str | Sequence[str] | None, name: str) -> str | None:
    """Tells which entry of a list of names, or whether a regular expression, matches a dotted module name.

    A list entry matches a whole name or an ending after a dot; a string must match the whole name (PEFT's rule).

    Returns:
        The matching entry, or None.

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
    """Returns the first key K for which ``(.*\\.)?(K)$`` matches a dotted module name (PEFT's rule), or None.

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
    """Returns the positions of plain names, for lookup, and those of regular expressions, to be tried one by one."""
    plain = {key: number for number, key in enumerate(keys) if is_plain_name(key)}
    return plain, [(n, re.compile(rf"(.*\.)?({key})$")) for n, key in enumerate(keys) if key not in plain]


def _first_match_of_layer(patterns: Mapping[str, Any], name: str) -> str | None:
    """Like `first_match`; the out_proj of an nn.MultiheadAttention falls back to the attention's key (PEFT's rule)."""
    key = first_match(patterns, name)
    return first_match(patterns, name.removesuffix(".out_proj")) if key is None else key


def is_plain_name(key: str) -> bool:
    """Whether a pattern is a plain dotted name, which is compared instead of being used as a regular expression."""
    return re.fullmatch(r"[\w.-]+", key) is not None


def matching_steps(patterns: Iterable[str], names: Sequence[str]) -> float:
    """Returns an upper bound for the steps that `first_match` takes on patterns and names read from a file.

    A regular expression may try every way to split a name between its repeats, for every choice of alternatives.

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
        # Escapes and sets match a single character each; only repeats, groups and alternatives multiply the steps.
        bare = re.sub(r"\\.|\[\^?(?:\\.|.)(?:\\.|[^]\\])*\]", "x", pattern[:_MAX_KEY]).replace("(?:", "(")
        repeats, groups = len(re.findall(r"[*+?{]+", bare)), bare.count("(") + 1
        if len(pattern) > _MAX_KEY or repeats > 9 or groups > 9 or re.search(r"\)[*+{]|\(\?", bare):
            return math.inf
        total += (bare.count("|") / groups + 1) ** groups * float(length) ** repeats * dots
    return total * len(names)


def _expression_fault(name: str, expression: str) -> str | None:
    if is_plain_name(expression):  # skips compiling: thousands of modules may be listed by name
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        return f"{name} is {expression[:80]!r}, which is not a valid regular expression: {error}"
    return None


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _list(value: Any) -> Any:
    """Returns a value in the form that JSON stores."""
    if isinstance(value, Mapping):
        return {key: _list(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _is_off(value: object) -> bool:
    return value is None or value is False or value == {} or value == [] or value == ""


def _whole(value: float) -> float:
    """Turns 16.0 into 16: readers of adapter_config.json expect an integer where possible."""
    return int(value) if float(value).is_integer() else value
