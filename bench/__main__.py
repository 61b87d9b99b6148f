# SPDX-License-Identifier: Apache-2.0
"""``python -m bench NAME [options]``: find the benchmark called NAME and run it.

A benchmark is a module of this package with ``HELP: str``, one line for the list,
and ``main(argv: list[str]) -> int``. Adding one is adding its file.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from pathlib import Path


def help_line(source: Path) -> str | None:
    """Return the string a module assigns to ``HELP``, None where it has none.

    Read from the syntax tree, because importing every benchmark to print one line
    each would load torch and fail where an optional package is missing.
    """
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="HELP")], value=ast.Constant(value=str(line))):
                return line
            case ast.AnnAssign(target=ast.Name(id="HELP"), value=ast.Constant(value=str(line))):
                return line
    return None


def benchmarks() -> dict[str, str]:
    """Map each benchmark's name to its one-line help."""
    found = {}
    for source in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        line = help_line(source)
        if line is not None:
            found[source.stem] = line
    return found


def main(argv: list[str]) -> int:
    """Run the benchmark that argv names; list them all where it names none."""
    known = benchmarks()
    if argv and argv[0] in known:
        module = importlib.import_module(f"bench.{argv[0]}")
        return int(module.main(argv[1:]))
    width = max((len(name) for name in known), default=0)
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure what reusing KV caches buys.",
        epilog="\n".join(
            ["benchmarks:"]
            + [f"  {name:<{width}}  {line}" for name, line in known.items()]
            + ["", "python -m bench NAME --help shows a benchmark's options."]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="benchmark to run")
    asked = parser.parse_args(argv)
    if asked.name is not None:
        parser.error(f"no benchmark is called {asked.name!r}; known: {', '.join(known)}")
    parser.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
