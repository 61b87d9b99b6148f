# SPDX-License-Identifier: Apache-2.0
"""Names to classes, loaded on first use: how a tier, policy or codec is added with one file and one line.

A target is `"package.module:Class"`; an out-of-tree target is accepted wherever a name is. Each class carries
a frozen dataclass `Options`; unknown options are refused by naming the known ones.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar, cast

from kvstore.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names of one kind ("tier", "policy", "codec") to classes with an `Options` dataclass."""

    def __init__(self, kind: str, targets: Mapping[str, str]) -> None:
        self.kind = kind
        self._targets = dict(targets)

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __contains__(self, name: str) -> bool:
        return name in self._targets

    def load(self, name: str) -> type[T]:
        """The class behind `name`. Raises ConfigError naming the known names."""
        target = self._targets.get(name, name)
        module_name, colon, class_name = target.partition(":")
        if not colon:
            known = ", ".join(sorted(self._targets))
            raise ConfigError(f"unknown {self.kind} {name!r}: use one of {known}, or 'package.module:Class'")
        try:
            found = getattr(importlib.import_module(module_name), class_name)
        except ValueError as exc:
            raise ConfigError(f"{self.kind} {name!r}: name it as 'package.module:Class'") from exc
        except ImportError as exc:
            raise ConfigError(f"{self.kind} {name!r} needs a package that is not installed: {exc}") from exc
        except AttributeError as exc:
            raise ConfigError(f"{self.kind} {name!r}: module {module_name} has no class {class_name}") from exc
        if not isinstance(found, type):
            raise ConfigError(f"{self.kind} {name!r}: {class_name} of {module_name} is no class")
        return cast("type[T]", found)

    def options(self, name: str, values: Mapping[str, object]) -> object:
        """`values` as the frozen `Options` of `name`, checked key by key."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"the options of {self.kind} {name!r} are {values!r}: give a table of names and values")
        options_class = cast(Any, self.load(name)).Options
        known = {field.name for field in dataclasses.fields(options_class)}
        for key in values:
            if key not in known:
                accepted = ", ".join(sorted(known)) or "none"
                raise ConfigError(f"unknown option {key!r} for {self.kind} {name!r}: known options are {accepted}")
        return cast(object, options_class(**values))
