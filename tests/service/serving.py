# SPDX-License-Identifier: Apache-2.0
"""A server for tests, in a process of its own: `python -m tests.service.serving DIRECTORY BLOCKS SECTIONS`.

Ends when its standard input does, with 1 where its store is not healthy, or something is held.
"""

from __future__ import annotations

import faulthandler
import json
import signal
import sys
from pathlib import Path

from kvstore.service.rights import Gate
from kvstore.service.server import Server
from tests.service.conftest import config_of, held_by
from tests.waiting import eventually


def main(directory: str, num_blocks: str, sections: str) -> int:
    faulthandler.register(signal.SIGUSR1)  # says where every thread is, for a server that does not end
    config = config_of(Path(directory), int(num_blocks), json.loads(sections))
    server = Server(config, gate=Gate(config.service))
    server.start()
    print("ready", *server.addresses, flush=True)
    sys.stdin.read()
    server.drain(5)
    eventually(lambda: not held_by(server))
    faults = server.check()
    faults += [f"{name} is {value}" for name, value in held_by(server).items()]
    server.stop()
    print(faults, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
