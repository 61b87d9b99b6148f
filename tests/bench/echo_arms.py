# SPDX-License-Identifier: Apache-2.0
"""A process that `bench.vllm_engines.Engine` can run in place of an engine: answers each order with its process id."""

import json
import os
import sys

row = "ROW " + json.dumps({"pid": os.getpid(), "kept": os.environ.get("KEPT", "")})
print(row, flush=True)
for _ in sys.stdin:
    print(row, flush=True)
