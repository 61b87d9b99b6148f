# SPDX-License-Identifier: Apache-2.0
"""The record of a benchmark: percentiles of a sample, and the JSON file. Needs nothing but numpy."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

Scalar = str | int | float | bool | None
Row = Mapping[str, object]


def percentiles(values: Iterable[float]) -> dict[str, float]:
    """Return p50, p90, p99, max and count of a sample.

    Every figure is one that was measured: no interpolation makes a p99 of ten values
    look better than the worst of them. Raises ValueError where there are none.
    """
    ordered = sorted(float(value) for value in values)
    if not ordered:
        raise ValueError("no percentiles of no values")
    count = len(ordered)
    figures = {
        # Nearest rank; in whole numbers, because 0.9 * 10 is not 9 in every rounding.
        f"p{share}": ordered[-(-share * count // 100) - 1]
        for share in (50, 90, 99)
    }
    return {**figures, "max": ordered[-1], "count": count}


def write_json(
    path: Path | str,
    name: str,
    env: Mapping[str, Scalar],
    rows: Sequence[Row],
    summary: Mapping[str, Scalar],
) -> None:
    """Write a result as ``{name, env, rows, summary}``, whole or not at all.

    Raises TypeError where the summary is not flat, ValueError for NaN and infinity.
    """
    for key, value in summary.items():
        if not isinstance(value, str | int | float | bool | np.generic | None):
            raise TypeError(f"summary[{key!r}] is a {type(value).__name__}, not one figure")
    record = {"name": name, "env": dict(env), "rows": list(rows), "summary": dict(summary)}
    text = json.dumps(record, indent=1, allow_nan=False, default=_plain)
    write_text(Path(path), text + "\n")


def _plain(value: object) -> object:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no place in a result")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}-", delete=False
    ) as file:
        file.write(text)
    # mkstemp keeps files private; a result is for everyone who may read the directory.
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
