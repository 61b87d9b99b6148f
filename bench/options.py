# SPDX-License-Identifier: Apache-2.0
"""Values of command-line options, checked where they are parsed: an error names what is accepted."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TypeVar

from kvstore.config import parse_bytes
from kvstore.errors import ConfigError

Number = TypeVar("Number", int, float)


def whole(least: int, most: int) -> Callable[[str], int]:
    """For `type=`: a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return value

    return parse


def size(least: int = 0) -> Callable[[str], int]:
    """For `type=`: a size such as 128MiB, of at least `least` bytes."""

    def parse(text: str) -> int:
        try:
            value = parse_bytes(text, "the size")
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is too small: give at least {least} bytes")
        return value

    return parse


def listed(kind: Callable[[str], Number], known: Sequence[Number]) -> Callable[[str], tuple[Number, ...]]:
    """For `type=`: some of the known numbers, such as 128,512; in their order."""

    def parse(text: str) -> tuple[Number, ...]:
        try:
            wanted = {kind(each) for each in text.split(",")}
        except ValueError:
            wanted = set()
        if not wanted or not wanted <= set(known):
            raise argparse.ArgumentTypeError(f"{text!r} names not only {', '.join(map(str, known))}")
        return tuple(each for each in known if each in wanted)

    return parse
