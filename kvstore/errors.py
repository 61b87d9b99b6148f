# SPDX-License-Identifier: Apache-2.0
"""Every exception kvstore raises on purpose.

KVStoreError
├ ConfigError(ValueError)    a bad option, unknown name, or a layout the store cannot hold
├ CapacityError              a budget that can never fit what was asked of it
├ LeaseError
│ ├ LeaseExpired             the hold or lease ran out before the call
│ └ UnknownLease             no hold or lease has this id
├ TierError                  carries `tier`
│ ├ TierUnavailable          the tier cannot be reached; a later try may help
│ ├ TierTimeout              the deadline passed
│ └ CorruptBlock             magic, checksum, key or length do not fit; removed and counted as a miss
├ AccessDenied               the service gives this client no right to what it asked
├ ServiceUnavailable         nobody answers where the service should be; a later try may help
├ MappingClosed              the arena is not mapped here: closed, or a forked child
└ ProtocolError              a peer speaks another version or layout

A miss, a rejected save and back-pressure are return values, never exceptions.
"""

from __future__ import annotations


class KVStoreError(Exception):
    """Base of everything raised by kvstore on purpose."""


class ConfigError(KVStoreError, ValueError):
    """A setting is wrong: the message names the value, what is accepted, and the fix."""


class CapacityError(KVStoreError):
    """A budget that can never hold what was asked, however much is evicted."""


class LeaseError(KVStoreError):
    """A hold or lease cannot be used."""


class LeaseExpired(LeaseError):
    """The hold or lease passed its deadline and its blocks may be gone."""


class UnknownLease(LeaseError):
    """No hold or lease has this id; call `match` first."""


class TierError(KVStoreError):
    """A lower tier failed. Callers treat it as a miss."""

    def __init__(self, tier: str, message: str) -> None:
        super().__init__(f"{tier}: {message}")
        self.tier = tier


class TierUnavailable(TierError):
    """The tier cannot be reached, or refuses; a later try may help."""


class TierTimeout(TierError):
    """The tier did not answer before the deadline."""


class CorruptBlock(TierError):
    """A value that is not the block asked for: it is removed and counted, and the block is a miss."""


class AccessDenied(KVStoreError):
    """The service gives this client no right to that: no or an unknown credential, or a foreign namespace."""


class ServiceUnavailable(KVStoreError):
    """The service is not there, does not answer in time, or has no room; a later try may help."""


class MappingClosed(KVStoreError):
    """The arena is not mapped in this process: the mapping was closed, or the process is a forked child."""


class ProtocolError(KVStoreError):
    """A peer speaks another protocol version, or names another layout."""
