# SPDX-License-Identifier: Apache-2.0
"""One schema for all settings: defaults, then a TOML file or dict, then the environment, then flags.

    [host]                              KVSTORE_HOST__CAPACITY_BYTES=8GiB
    capacity_bytes = "8GiB"
    [mover]
    write = "through"
    [tiers.redis]                       KVSTORE_TIERS__REDIS__URL=redis://cache:6379
    url = "redis://cache:6379"
    [service]                           kvstore serve --set service.max_streams=64
    max_streams = 64

An unknown key is an error that names the known ones. Sizes take suffixes (KiB, MiB, GiB, TiB, kB, MB, GB, TB).
`StoreConfig.explain()` gives every setting with where its value came from, passwords left out.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvstore.clock import check_seconds
from kvstore.errors import ConfigError
from kvstore.mover_options import MoverOptions, WriteMode
from kvstore.policies.standing import PRIORITY
from kvstore.service_options import CLIENT_VARIABLES, ServiceOptions
from kvstore.tiers import TIERS
from kvstore.tiers.host import HostOptions

_MAX_BYTES = 1 << 50
_MAX_NUMBER = 1 << 50
_MAX_IO_THREADS = 256
_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power}


def parse_bytes(value: object, name: str) -> int:
    """`8589934592`, `"8GiB"` or `"8 GB"` as bytes."""
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value <= _MAX_BYTES:
            raise ConfigError(f"{name} is {value}: give a size from 0 to {_MAX_BYTES} bytes")
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    if found is None or found[2].lower() not in _UNITS:
        raise ConfigError(f"{name} is {value!r}: give a number of bytes, or a size such as 8GiB or 500MB")
    size = float(found[1]) * _UNITS[found[2].lower()]
    if size > _MAX_BYTES:
        raise ConfigError(f"{name} is {str(value)[:40]!r}: give a size of at most {_MAX_BYTES} bytes")
    return int(size)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """Settings of matches and loads.

    Attributes:
        hold_s: how long a match keeps what it found, for the load to come.
        lease_s: how long a load may go without progress of its consumer.
        lookup_deadline_s, read_deadline_s: for one question to, one read from a lower tier.
        io_threads: threads that talk to lower tiers: so many for matches, and so many for loads.
        require_tiers: refuse to start when a lower tier does not answer; otherwise say so and start.
    """

    hold_s: float = 10.0
    lease_s: float = 60.0
    lookup_deadline_s: float = 0.25
    read_deadline_s: float = 5.0
    io_threads: int = 4
    require_tiers: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.io_threads <= _MAX_IO_THREADS:
            raise ConfigError(f"request.io_threads is {self.io_threads}: use 1 to {_MAX_IO_THREADS} (4 is the default)")
        for name in ("hold_s", "lease_s", "lookup_deadline_s", "read_deadline_s"):
            check_seconds(f"request.{name}", getattr(self, name))


_SECTIONS: dict[str, type] = {
    "host": HostOptions,
    "mover": MoverOptions,
    "request": RequestOptions,
    "service": ServiceOptions,
}
_ENV_PREFIX = "KVSTORE_"
_OF_KUBERNETES = re.compile(r"KVSTORE_(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")
"""What Kubernetes tells every pod beside a Service that is called kvstore; no settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """Everything a store is told, and its sidecar. Make it with `StoreConfig.load` to have values checked and traced.

    Attributes:
        service: what only the sidecar looks at.
        tiers: lower tiers in the order they are asked, by name in TIERS, each with its class's `Options`.
        sources: where each non-default value came from, by dotted key.
    """

    host: HostOptions = HostOptions()
    mover: MoverOptions = MoverOptions()
    request: RequestOptions = RequestOptions()
    service: ServiceOptions = field(default_factory=ServiceOptions)
    tiers: Mapping[str, object] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        values: Mapping[str, object] | None = None,
        *,
        path: str | Path | None = None,
        environ: Mapping[str, str] | None = None,
        flags: Mapping[str, object] | None = None,
    ) -> StoreConfig:
        """Settings from a TOML file, `values`, the environment and command line `flags`; the last to name a key wins.

        Raises ConfigError for an unknown key or a value of the wrong kind, naming what is accepted.
        """
        tree: dict[str, Any] = {}
        sources: dict[str, str] = {}
        if path is not None:
            _merge(tree, _read_toml(path), f"file {path}", sources)
        _merge(tree, values or {}, "argument", sources)
        for key, text in sorted((os.environ if environ is None else environ).items()):
            if key.startswith(_ENV_PREFIX) and key not in CLIENT_VARIABLES and not _OF_KUBERNETES.fullmatch(key):
                _merge(tree, _nest(key, text), f"environment {key}", sources)
        _merge(tree, flags or {}, "command line", sources)
        unknown = [key for key in tree if key not in _SECTIONS and key != "tiers"]
        if unknown:
            known = ", ".join([*_SECTIONS, "tiers"])
            raise ConfigError(f"unknown section {unknown[0]!r} ({sources_of(unknown[0], sources)}): known are {known}")
        made = {name: _options(kind, tree.get(name, {}), name, sources) for name, kind in _SECTIONS.items()}
        tiers = {
            name: _options(_tier_options(name), section, f"tiers.{name}", sources)
            for name, section in _section(tree.get("tiers", {}), "tiers").items()
        }
        _check_order(made["mover"], tiers.get("redis"))
        return cls(**made, tiers=tiers, sources=sources)

    def explain(self) -> list[tuple[str, object, str]]:
        """Every setting as (dotted key, value, source); passwords in URLs are left out."""
        rows: list[tuple[str, object, str]] = []
        sections: dict[str, Any] = {name: getattr(self, name) for name in _SECTIONS}
        sections |= {f"tiers.{name}": options for name, options in self.tiers.items()}
        for name, options in sections.items():
            for item in dataclasses.fields(options):
                key = f"{name}.{item.name}"
                rows.append((key, _without_password(getattr(options, item.name)), self.sources.get(key, "default")))
        return rows


def _check_order(mover: MoverOptions, redis: object) -> None:
    if mover.mode is WriteMode.ON_EVICT and getattr(redis, "policy", "") == PRIORITY:
        raise ConfigError(
            "tiers.redis.policy priority needs mover.write through or on_reuse, and inclusive tiers: no request says "
            "how long a block is to stay when it goes down at eviction; use lru or returns"
        )


def _without_password(value: object) -> object:
    """The value; of a URL without its password, wherever in it that stands."""
    if not isinstance(value, str) or "://" not in value:
        return value
    value = re.sub(r"://([^:@]*):.*@", r"://\1:***@", value)  # to the last @: a password may hold one, or a /
    return re.sub(r"([?&](?:sentinel_)?password=)[^&]*", r"\1***", value)


def sources_of(key: str, sources: Mapping[str, str]) -> str:
    """Where a key, or anything below it, was set."""
    return next((f"from {source}" for name, source in sources.items() if f"{name}.".startswith(f"{key}.")), "")


def _read_toml(path: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text())
    except OSError as exc:
        raise ConfigError(f"config file {path} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"config file {path} is not UTF-8 text: {exc.reason} at byte {exc.start}") from exc
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"config file {path} is not TOML: {exc}") from exc


def _nest(key: str, text: str) -> dict[str, Any]:
    """KVSTORE_TIERS__REDIS__URL=x as {"tiers": {"redis": {"url": "x"}}}."""
    nested: Any = text
    for name in reversed(key.removeprefix(_ENV_PREFIX).lower().split("__")):
        nested = {name: nested}
    return typing.cast("dict[str, Any]", nested)


def _merge(tree: dict[str, Any], values: Mapping[str, Any], source: str, sources: dict[str, str], at: str = "") -> None:
    for key, value in values.items():
        if isinstance(value, Mapping):
            branch = tree.setdefault(key, {})
            if isinstance(branch, dict):
                _merge(branch, value, source, sources, f"{at}{key}.")
                continue
        tree[key] = value
        sources[f"{at}{key}"] = source


def _section(values: object, name: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name} is {values!r}: it is a section with keys of its own")
    return values


def _tier_options(name: str) -> type:
    return typing.cast(type, typing.cast(Any, TIERS.load(name)).Options)


def _options(kind: type, values: object, section: str, sources: Mapping[str, str]) -> Any:
    """`values` as an instance of the options class `kind`."""
    hints = typing.get_type_hints(kind)
    known = {item.name for item in dataclasses.fields(kind)}
    checked: dict[str, object] = {}
    for key, value in _section(values, section).items():
        if key not in known:
            where = sources_of(f"{section}.{key}", sources)
            raise ConfigError(f"unknown key {section}.{key} ({where}): known are {', '.join(sorted(known))}")
        checked[key] = _coerce(value, hints[key], f"{section}.{key}")
    return kind(**checked)


def _coerce(value: object, kind: object, name: str) -> object:
    """A value from TOML or the environment as the type its field declares."""
    if kind is bool:
        text = str(value).lower()
        if text not in ("true", "false", "1", "0", "yes", "no"):
            raise ConfigError(f"{name} is {value!r}: use true or false")
        return text in ("true", "1", "yes")
    if kind is int:
        if "_bytes" in name.rpartition(".")[2]:
            return parse_bytes(value, name)
        return _number(value, int, name)
    if kind is float:
        return _number(value, float, name)
    if typing.get_origin(kind) is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise ConfigError(f"{name} is {value!r}: give a list, or values with commas between")
        each = typing.get_args(kind)[0]
        return tuple(_coerce(item, each, name) for item in items if item != "")
    if kind is str and not isinstance(value, str):
        raise ConfigError(f"{name} is {value!r}: give a string")
    return value


def _number(value: object, kind: type[int] | type[float], name: str) -> int | float:
    try:
        number = kind(str(value))
        if not 0 <= number <= _MAX_NUMBER:
            raise ConfigError(f"{name} is {str(value)[:40]}: give a number from 0 to {_MAX_NUMBER}")
        return number
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{name} is {value!r}: give a {'whole number' if kind is int else 'number'}") from None
