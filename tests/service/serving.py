# SPDX-License-Identifier: Apache-2.0
"""A server for tests, in a process of its own: `python -m tests.service.serving DIRECTORY BLOCKS SECTIONS`.

Ends when its standard input does, with 1 where its store is not healthy, or something is held.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kvstore.service.rights import Gate
from kvstore.service.server import Server
from tests.service.conftest import HELD, config_of


def main(directory: str, num_blocks: str, sections: str) -> int:
    config = config_of(Path(directory), int(num_blocks), json.loads(sections))
    server = Server(config, gate=Gate(config.service))
    server.start()
    print("ready", flush=True)
    sys.stdin.read()
    server.drain(5)
    faults = server.check()
    faults += [f"{name} is {value}" for name, value in server.stats().items() if name in HELD and value]
    server.stop()
    print(faults, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
