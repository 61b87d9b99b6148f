# SPDX-License-Identifier: Apache-2.0
"""What a tenant keeps in Redis under all its namespaces together.

A tenant is a salt. Which salts a client may use is granted to it; adapters and revisions of models it names itself,
each a namespace of its own, so limits of namespaces do not limit a tenant.

    kvs2:{000}:t:<tenant>    sorted set: root that the tenant wrote under, time of the last such write

<tenant> is 16 hex digits that do not give the salt away. Nothing is counted that was not counted before: what a tenant
keeps is the sum of its namespaces' own accounts, so there is no second account that a killed writer could leave wrong,
and writes and evictions do what they did. That sum costs one command a stripe, and is asked for four times a second at
most unless the limit is near. (An account for each tenant would be had in one command a stripe, too, but every script
that accounts or removes would have to know whose each root is: one more read a part.)

A writer notes its root before the first value goes, and again every minute, so the list heals of whatever it loses. A
root stays in it for an hour after its last write, and then as long as anything lies there; the list of a tenant who
writes nothing goes after thirty days.
"""

from __future__ import annotations

import hashlib
import hmac
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from kvstore.block import Root
from kvstore.tiers.redis_names import prefix, root_tag
from kvstore.tiers.redis_nodes import Talk
from kvstore.tiers.redis_wire import command, real

_MAX_KNOWN = 65_536
_NOTE_EVERY_S = 60.0
_KEPT_S = 3600.0
"""Of a root without a byte. Much longer than any write takes, or lies between two notes of one writer."""
_GOOD_FOR_S = 0.25

# KEYS: the tenant's list. ARGV: time, roots that are about to be written under. A server without memory answers all the
# same. What lies there and is no list is another program's.
_NOTE = """
local kind = redis.call('TYPE', KEYS[1]).ok
if kind ~= 'zset' and kind ~= 'none' then redis.call('UNLINK', KEYS[1]) end
for i = 2, #ARGV do redis.pcall('ZADD', KEYS[1], 'GT', ARGV[1], ARGV[i]) end
redis.pcall('EXPIRE', KEYS[1], 2592000)
return redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
"""

# KEYS: the tenant's list. ARGV: time before which roots were written under last, roots.
_FORGET = """
for i = 2, #ARGV do
  local noted = redis.call('ZSCORE', KEYS[1], ARGV[i])
  if noted and tonumber(noted) < tonumber(ARGV[1]) then redis.call('ZREM', KEYS[1], ARGV[i]) end
end
"""


def tenant_tag(root: Root) -> str:
    """How the tenant of a root is named."""
    digest = hashlib.sha256(b"kvstore tenant\0" + root.salt).digest()
    return (hmac.digest(root.secret, digest, "sha256") if root.secret else digest)[:8].hex()


def list_of(tenant: str) -> str:
    return f"{prefix(0)}t:{tenant}"


class Tenants:
    """Whose which namespace is. Thread-safe; Redis keeps the truth.

    Args:
        capacity_bytes: what each may keep; 0 for no limit, and then nothing is noted.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._of: OrderedDict[str, str] = OrderedDict()
        self._noted_at: dict[str, float] = {}
        self._sums: dict[str, tuple[int, float]] = {}

    def learn(self, root: Root) -> None:
        """What is written under this root is its salt's."""
        tag = root_tag(root.id)
        if not self.capacity_bytes or tag in self._of:
            return
        with self._lock:
            self._of[tag] = tenant_tag(root)
            if len(self._of) > _MAX_KNOWN:
                self._noted_at.pop(self._of.popitem(last=False)[0], None)

    def shares(self, num_bytes: Mapping[str, int]) -> dict[str, dict[str, int]]:
        """`num_bytes` of roots, by tenant; without roots of which nothing is known."""
        found: dict[str, dict[str, int]] = {}
        with self._lock:
            for root, share in num_bytes.items():
                tenant = self._of.get(root)
                if tenant is not None:
                    self._of.move_to_end(root)
                    found.setdefault(tenant, {})[root] = share
        return found

    def fits(self, tenant: str, shares: Mapping[str, int]) -> bool:
        """Whether so much more fits for sure, without asking; if so it counts as written."""
        now, more_bytes = time.monotonic(), sum(shares.values())
        with self._lock:
            sum_bytes, read_at = self._sums.get(tenant, (0, float("-inf")))
            oldest = min(self._noted_at.get(root, float("-inf")) for root in shares)
            fresh = now - read_at < _GOOD_FOR_S and now - oldest < _NOTE_EVERY_S
            if not fresh or sum_bytes + more_bytes > self.capacity_bytes:
                return False
            self._sums[tenant] = sum_bytes + more_bytes, read_at
            return True

    def note_sum(self, tenant: str, num_bytes: int) -> None:
        """So much the tenant has, or will have once it has written."""
        with self._lock:
            if len(self._sums) > _MAX_KNOWN:
                self._sums.clear()
            self._sums[tenant] = num_bytes, time.monotonic()

    def roots(self, talk: Talk, tenant: str, own: Sequence[str], now_s: float, deadline: float) -> dict[str, bool]:
        """The roots that a tenant wrote under, `own` among them, from now on; whether each was written under lately.

        As far as its node answers: of `own` alone it is known anyway.
        """
        (reply,) = talk.ask([command("EVAL", _NOTE, 1, list_of(tenant), repr(now_s), *own)], deadline)
        words = [word for word in reply if isinstance(word, bytes)] if isinstance(reply, list) else []
        listed = {
            root.decode(errors="replace"): now_s - real(score) < _KEPT_S
            for root, score in zip(words[::2], words[1::2], strict=True)
        }
        if set(own) <= listed.keys():
            with self._lock:
                self._noted_at |= dict.fromkeys(own, time.monotonic())
        return listed | dict.fromkeys(own, True)

    @staticmethod
    def forget(talk: Talk, tenant: str, roots: Sequence[str], now_s: float, deadline: float) -> None:
        """Nothing is left under these, unless one was noted again meanwhile."""
        if roots:
            talk.ask([command("EVAL", _FORGET, 1, list_of(tenant), repr(now_s - _KEPT_S), *roots)], deadline)
