# SPDX-License-Identifier: Apache-2.0
"""Who may do what: rights, and the gate that gives them to a client for its token, certificate or user.

    # tokens.toml, mode 0600                  kvstore serve --set service.tokens_file=tokens.toml
    [[client]]
    token = "…"                               # or token_sha256, certificate (its common name), or uid
    tenant = "acme"
    salts = ["acme"]                          # namespaces: tenant salts as text, or "hex:…"; "*" for all;
                                              # absent: the one without a salt
    models = ["Qwen/Qwen3-8B"]                # absent: all
    admin = false                             # true: all salts and models; clear, check, other clients
    quota = "20GiB"                           # of the tenant, in the host tier; absent: none

Invariants
1. What nobody granted is refused. An unknown key, a group-readable file, an entry without a credential: errors.
2. A token is compared by its digest, in constant time, with every entry.
3. Once an entry names a uid (a certificate), other uids than the server's own and root (other certificates) are
   refused, and `service.allowed_uids` is not looked at. A user with limited rights gets no map, be it the server's own
   or root.
4. A reload that fails leaves the rights as they were. After one that does not, nobody has more than the file gives:
   clients whose rights changed are let in anew, or not.

Memory cannot be taken back from a process that has mapped the arena: it can read what lies there, and write, for as
long as it lives. Whoever must not do so any more has to be ended, too.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvstore.block import ModelId, Root
from kvstore.config import parse_bytes
from kvstore.errors import AccessDenied, ConfigError
from kvstore.private import read_private
from kvstore.service_options import ServiceOptions

log = logging.getLogger("kvstore.service.rights")

_CREDENTIALS = ("token", "token_sha256", "certificate", "uid")
_KEYS = (*_CREDENTIALS, "tenant", "salts", "models", "admin", "quota")
_LEAST_TOKEN = 16
_LEAST_SECRET = 16


@dataclass(frozen=True, slots=True)
class Rights:
    """What a client may see and use.

    Attributes:
        tenant: whose quota its blocks count against; empty for nobody's.
        salts, models: namespaces by tenant salt and model name; None for all.
        admin: may clear everything, check the store, and see other clients.
        quota_bytes: of the tenant, in the host tier; None for no limit.
    """

    tenant: str = ""
    salts: frozenset[bytes] | None = frozenset()
    models: frozenset[str] | None = frozenset()
    admin: bool = False
    quota_bytes: int | None = None

    @property
    def sees_all(self) -> bool:
        """Whether no namespace is out of reach."""
        return self.salts is None and self.models is None

    def allows(self, root: Root) -> bool:
        """Whether chains under `root` may be used."""
        return (self.salts is None or root.salt in self.salts) and self.may_open(root.model)

    def may_open(self, model: ModelId) -> bool:
        """Whether chains of this model may be used, under some root."""
        return self.models is None or model.model in self.models


FULL = Rights(salts=None, models=None, admin=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What a client showed when it came, and what is known of it: enough to judge it again later.

    Attributes:
        token_digest: SHA-256 of its token; empty for none.
        uid: the client's user as the kernel tells it (from the door), None where that is not known: over TCP, and for a
            client of the Unix socket that did not pass the door.
        certificate_name: common name of a client certificate that TLS has verified.
        local: it came by the Unix socket.
    """

    token_digest: bytes = field(default=b"", repr=False)
    uid: int | None = None
    certificate_name: str | None = None
    local: bool = False

    @classmethod
    def of(
        cls, token: str, *, uid: int | None = None, certificate_name: str | None = None, local: bool = False
    ) -> Shown:
        digest = hashlib.sha256(token.encode()).digest() if token else b""
        return cls(token_digest=digest, uid=uid, certificate_name=certificate_name, local=local)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One [[client]]: a credential and the rights it gives."""

    token_digest: bytes
    certificate: str
    uid: int | None
    rights: Rights


class Gate:
    """Gives rights. Thread-safe; `reload` swaps all entries at once."""

    def __init__(self, options: ServiceOptions) -> None:
        """Read the tokens file, if one is set. Raises ConfigError for a transport or file that is not safe."""
        check_transport(options)
        self._options = options
        self._local_only = not options.tcp_addresses
        self._open_to_all = options.serve_anyone_on_the_network_without_authentication
        self._entries = _read_entries(options.tokens_file)

    def reload(self) -> bool:
        """Read the tokens file again; False, and one log line, where it is not sound."""
        try:
            entries = _read_entries(self._options.tokens_file)
        except ConfigError as error:
            log.error("rights stay as they were: %s", error)
            return False
        self._entries = entries
        log.info("rights read again: %d clients in the tokens file", len(entries))
        return True

    def rights_of(self, shown: Shown) -> Rights:
        """The rights of a client. A token that is shown decides, then a certificate, then the user.

        Raises AccessDenied, saying what would be accepted.
        """
        entries = self._entries
        if shown.token_digest:
            return _by_token(entries, shown.token_digest)
        if shown.certificate_name is not None:
            return _by_certificate(entries, shown.certificate_name)
        if shown.uid is not None:
            return self._by_uid(entries, shown.uid)
        if shown.local or self._local_only:
            return self._unseen(entries)
        if self._open_to_all:
            return FULL
        raise AccessDenied("no credential was shown: send an access token (KVSTORE_TOKEN), or a client certificate")

    def still_gives(self, rights: Rights, shown: Shown) -> bool:
        """Whether a client that showed this has exactly these rights now."""
        try:
            return self.rights_of(shown) == rights
        except AccessDenied:
            return False

    def tenants(self) -> frozenset[str]:
        """Those that the file names."""
        return frozenset(entry.rights.tenant for entry in self._entries)

    def mapping_uids(self) -> frozenset[int] | None:
        """Users whose processes may have the arena, for the door; None: this user and, where one is set, the group.

        Who maps the arena can read and write all that is in it. So it is only for users who are trusted with every
        namespace; others move their bytes through Read and Write.
        """
        named = [entry for entry in self._entries if entry.uid is not None]
        if not named and not self._options.allowed_uids:
            return None
        trusted = {entry.uid for entry in named if entry.rights.sees_all}
        listed = () if named else self._options.allowed_uids
        uids = frozenset({os.geteuid(), 0, *listed, *(uid for uid in trusted if uid is not None)})
        return uids - self.unmapped_uids()

    def unmapped_uids(self) -> frozenset[int]:
        """Users with limited rights: the door tells the server who they are, and gives them no arena."""
        return _limited_uids(self._entries)

    def _by_uid(self, entries: tuple[_Entry, ...], uid: int) -> Rights:
        for entry in entries:
            if entry.uid == uid:
                return entry.rights
        named = any(entry.uid is not None for entry in entries)
        if uid in (os.geteuid(), 0) or (self._is_let_in(uid) and not named):
            return FULL
        where = "the tokens file" if named else "service.allowed_uids, or to the tokens file"
        raise AccessDenied(f"user {uid} has no rights here: add it to {where}")

    def _is_let_in(self, uid: int) -> bool:
        """Listed; or, where a group and no list is set, let in by the mode of the socket."""
        options = self._options
        return uid in options.allowed_uids or (bool(options.group) and not options.allowed_uids)

    def _unseen(self, entries: tuple[_Entry, ...]) -> Rights:
        """Rights of a client of the Unix socket that did not pass the door: the socket's mode let it in.

        Where not all that it lets in have the same rights, that is not enough.
        """
        if self._options.group:
            told_apart = bool(self._options.allowed_uids) or any(entry.uid is not None for entry in entries)
        else:
            told_apart = bool(_limited_uids(entries) & {os.geteuid(), 0})
        if told_apart:
            raise AccessDenied("this server tells users apart: send an access token, or connect with mapped=True")
        return FULL


def _limited_uids(entries: tuple[_Entry, ...]) -> frozenset[int]:
    return frozenset(entry.uid for entry in entries if entry.uid is not None and not entry.rights.sees_all)


def _by_token(entries: tuple[_Entry, ...], digest: bytes) -> Rights:
    found: Rights | None = None
    for entry in entries:  # all of them: the time must not tell which one fitted
        if hmac.compare_digest(entry.token_digest, digest):
            found = entry.rights
    if found is None:
        raise AccessDenied("the access token is not known here: check KVSTORE_TOKEN against the server's tokens file")
    return found


def _by_certificate(entries: tuple[_Entry, ...], name: str) -> Rights:
    for entry in entries:
        if entry.certificate and entry.certificate == name:
            return entry.rights
    if any(entry.certificate for entry in entries):
        raise AccessDenied(f"certificate {name!r} has no rights here: add it to the server's tokens file")
    return FULL


def check_transport(options: ServiceOptions) -> None:
    """Raise ConfigError, with the fix, where TCP would serve whoever reaches it."""
    addresses = options.tcp_addresses
    if not addresses or options.serve_anyone_on_the_network_without_authentication:
        return
    if not options.tls_cert:
        raise ConfigError(
            f"service listens on {addresses[0]} without TLS: set service.tls_cert and service.tls_key, "
            "or listen on unix:PATH"
        )
    if not options.tokens_file and not options.client_ca:
        raise ConfigError(
            f"service listens on {addresses[0]} and would serve anyone: set service.tokens_file (access tokens) "
            "or service.client_ca (client certificates)"
        )


def read_secret(options: ServiceOptions) -> bytes:
    """The cluster secret of the settings; empty where none is set."""
    return read_secret_file(options.secret_file)


def read_secret_file(path: str) -> bytes:
    """The cluster secret in a file, without white space around it; empty without a file."""
    if not path:
        return b""
    secret = read_private(path, "secret file").strip()
    if len(secret) < _LEAST_SECRET:
        raise ConfigError(
            f"secret file {path} holds {len(secret)} bytes: use at least {_LEAST_SECRET}, "
            "such as the output of: openssl rand -hex 32"
        )
    return secret


def _read_entries(path: str) -> tuple[_Entry, ...]:
    if not path:
        return ()
    try:
        tree = tomllib.loads(read_private(path, "service.tokens_file").decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"service.tokens_file {path} is not TOML: {error}") from error
    clients = tree.get("client", [])
    unknown = [key for key in tree if key != "client"]
    if unknown or not isinstance(clients, list) or not all(isinstance(each, dict) for each in clients):
        raise ConfigError(f"service.tokens_file {path}: it holds [[client]] entries, and nothing else")
    entries = tuple(_entry(values, f"{path}, client {number}") for number, values in enumerate(clients, start=1))
    digests = [entry.token_digest for entry in entries if entry.token_digest]
    if len(set(digests)) != len(digests):
        raise ConfigError(f"service.tokens_file {path}: two clients have the same token")
    _check_quotas(entries, path)
    return entries


def _check_quotas(entries: tuple[_Entry, ...], path: str) -> None:
    """A quota is the tenant's: two entries of one tenant may not differ."""
    seen: dict[str, int | None] = {}
    for entry in entries:
        tenant, quota_bytes = entry.rights.tenant, entry.rights.quota_bytes
        if tenant and seen.setdefault(tenant, quota_bytes) != quota_bytes:
            raise ConfigError(f"service.tokens_file {path}: tenant {tenant!r} has two different quotas")


def _entry(values: Mapping[str, object], where: str) -> _Entry:
    for key in values:
        if key not in _KEYS:
            raise ConfigError(f"{where}: unknown key {key!r}: known are {', '.join(_KEYS)}")
    if sum(key in values for key in _CREDENTIALS) != 1:
        raise ConfigError(f"{where}: give exactly one of {', '.join(_CREDENTIALS)}")
    admin = _flag(values, "admin", where)
    if admin and ("salts" in values or "models" in values):
        raise ConfigError(f"{where}: an admin clears and checks everything: leave out salts and models, or admin")
    salts = frozenset({"*"}) if admin else _texts(values, "salts", where)
    if salts is None:
        salts = frozenset({""})
    rights = Rights(
        tenant=_text(values, "tenant", where),
        salts=None if "*" in salts else frozenset(_salt(text, where) for text in salts),
        models=_texts(values, "models", where),
        admin=admin,
        quota_bytes=parse_bytes(values["quota"], f"{where}: quota") if "quota" in values else None,
    )
    if rights.quota_bytes is not None and not rights.tenant:
        raise ConfigError(f"{where}: a quota is a tenant's: give tenant too")
    return _Entry(_token_digest(values, where), _text(values, "certificate", where), _uid(values, where), rights)


def _token_digest(values: Mapping[str, object], where: str) -> bytes:
    """SHA-256 of the entry's token; empty where it has another credential."""
    token = _text(values, "token", where)
    if "token" in values:
        if len(token) < _LEAST_TOKEN:
            raise ConfigError(f"{where}: the token has {len(token)} characters: use at least {_LEAST_TOKEN}")
        return hashlib.sha256(token.encode()).digest()
    if "token_sha256" not in values:
        return b""
    try:
        digest = bytes.fromhex(_text(values, "token_sha256", where))
    except ValueError:
        digest = b""
    if len(digest) != 32:
        raise ConfigError(f"{where}: token_sha256 must be 64 hex digits, such as from: printf %s TOKEN | sha256sum")
    return digest


def _uid(values: Mapping[str, object], where: str) -> int | None:
    uid = values.get("uid")
    if uid is not None and (not isinstance(uid, int) or isinstance(uid, bool) or uid < 0):
        raise ConfigError(f"{where}: uid is {uid!r}: give a number, such as from: id -u USER")
    return uid


def _salt(text: str, where: str) -> bytes:
    """A tenant salt as text, or as `hex:` and its bytes."""
    if not text.startswith("hex:"):
        return text.encode()
    try:
        return bytes.fromhex(text.removeprefix("hex:"))
    except ValueError:
        raise ConfigError(f"{where}: salt {text!r}: hex digits must follow hex:") from None


def _text(values: Mapping[str, object], key: str, where: str) -> str:
    value = values.get(key, "")
    if not isinstance(value, str) or (key in values and not value):
        raise ConfigError(f"{where}: {key} is {value!r}: give a string that is not empty")
    return value


def _texts(values: Mapping[str, object], key: str, where: str) -> frozenset[str] | None:
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{where}: {key} is {value!r}: give a list of strings")
    return frozenset(value)


def _flag(values: Mapping[str, object], key: str, where: str) -> bool:
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{where}: {key} is {value!r}: use true or false")
    return value
