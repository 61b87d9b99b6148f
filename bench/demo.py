# SPDX-License-Identifier: Apache-2.0
"""A short form of `ttft`: what the store does, on a real model, in a few minutes."""

from __future__ import annotations

import argparse

from bench.ttft import Settings, present, run

HELP = "a short form of ttft: the store at work on a real model in a few minutes"

SHORT = Settings(
    users=2,
    turns=3,
    documents=1,
    doc_tokens=1000,
    zero_requests=4,
    max_new_tokens=6,
    min_reused=900,
    device_bytes=64 << 20,
)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench demo", description=HELP)
    parser.add_argument("--html", default="build/demo.html", metavar="FILE", help="the report (default: %(default)s)")
    parser.add_argument("--json", default="build/demo.json", metavar="FILE", help="the result (default: %(default)s)")
    options = parser.parse_args(argv)
    print(f"{SHORT.users} users, {SHORT.turns} turns each, SmolLM2-135M in fp32, every arm serves every request.")
    print("The second user's first turn finds what the first one's had in common with it: system prompt and document.")
    print('The arm "store down" has a dead Redis: lines of the log that say so are its own.')
    print("So few requests are noisy: `python -m bench ttft` serves more.")
    rows, summary = run(SHORT)
    present("demo", rows, summary, options.json, options.html)
    return 0
