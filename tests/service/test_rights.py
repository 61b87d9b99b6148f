# SPDX-License-Identifier: Apache-2.0
"""Rights and the gate: what each credential gives, and that nothing else gives anything."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import pytest

from kvstore.block import ModelId, Root
from kvstore.errors import AccessDenied, ConfigError
from kvstore.service.rights import FULL, Gate, Rights, Shown, check_transport, read_secret
from kvstore.service_options import ServiceOptions

TOKEN = "a-token-of-acme-0001"
OTHER = "a-token-of-the-admin"


def write(path: Path, text: str, mode: int = 0o600) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def gate_of(tmp_path: Path, tokens: str, **options: object) -> Gate:
    path = write(tmp_path / "tokens.toml", tokens)
    listen = f"unix:{tmp_path}/k.sock"
    return Gate(ServiceOptions(**{"listen": listen, "tokens_file": path, **options}))  # type: ignore[arg-type]


def tcp(tmp_path: Path, **options: object) -> ServiceOptions:
    values = {"listen": "127.0.0.1:9400", "tls_cert": "/c.pem", "tls_key": "/k.pem", **options}
    return ServiceOptions(**values)  # type: ignore[arg-type]


ACME = f'[[client]]\ntoken = "{TOKEN}"\ntenant = "acme"\nsalts = ["acme"]\nmodels = ["tiny"]\nquota = "20GiB"\n'


def test_a_token_gives_its_rights_and_no_others(tmp_path: Path, model: ModelId) -> None:
    rights = gate_of(tmp_path, ACME).rights_of(Shown.of(TOKEN, uid=None, certificate_name=None))
    assert rights == Rights("acme", frozenset({b"acme"}), frozenset({"tiny"}), False, 20 << 30)
    assert rights.allows(Root(model, salt=b"acme"))
    assert not rights.allows(Root(model, salt=b"other"))
    assert not rights.allows(Root(model))
    big = ModelId(model="big", revision="1", kv_dtype="bfloat16", num_layers=2, num_kv_heads=2, head_dim=16)
    assert not rights.allows(Root(big, salt=b"acme"))


def test_rights_that_were_not_given_allow_nothing(model: ModelId) -> None:
    assert not Rights().allows(Root(model))
    assert FULL.allows(Root(model, salt=b"anything"))


def test_an_entry_without_salts_may_use_the_unsalted_namespace_only(tmp_path: Path, model: ModelId) -> None:
    rights = gate_of(tmp_path, f'[[client]]\ntoken = "{TOKEN}"\n').rights_of(
        Shown.of(TOKEN, uid=None, certificate_name=None)
    )
    assert rights.allows(Root(model))
    assert not rights.allows(Root(model, salt=b"acme"))
    everything = gate_of(tmp_path, f'[[client]]\ntoken = "{TOKEN}"\nsalts = ["*"]\n')
    assert everything.rights_of(Shown.of(TOKEN, uid=None, certificate_name=None)).allows(Root(model, salt=b"acme"))
    nothing = gate_of(tmp_path, f'[[client]]\ntoken = "{TOKEN}"\nsalts = []\n')
    assert not nothing.rights_of(Shown.of(TOKEN, uid=None, certificate_name=None)).allows(Root(model))


def test_a_token_may_be_known_by_its_digest_and_a_salt_by_its_bytes(tmp_path: Path, model: ModelId) -> None:
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    gate = gate_of(tmp_path, f'[[client]]\ntoken_sha256 = "{digest}"\nsalts = ["hex:00ff"]\n')
    rights = gate.rights_of(Shown.of(TOKEN, uid=None, certificate_name=None))
    assert rights.allows(Root(model, salt=b"\x00\xff"))
    with pytest.raises(AccessDenied):
        gate.rights_of(Shown.of(digest, uid=None, certificate_name=None))


def test_an_unknown_token_is_refused_even_from_the_servers_own_user(tmp_path: Path) -> None:
    gate = gate_of(tmp_path, ACME)
    with pytest.raises(AccessDenied, match="the access token is not known here"):
        gate.rights_of(Shown.of(TOKEN + "x", uid=os.getuid(), certificate_name=None))
    with pytest.raises(AccessDenied):
        gate.rights_of(Shown.of("", uid=os.getuid() + 1, certificate_name=None))
    assert gate.rights_of(Shown.of("", uid=os.getuid(), certificate_name=None)) is FULL


def test_listed_users_have_full_rights_and_others_none(tmp_path: Path) -> None:
    mine = os.getuid()
    gate = gate_of(tmp_path, "", allowed_uids=(mine + 1,))
    assert gate.rights_of(Shown.of("", uid=mine + 1, certificate_name=None)) is FULL
    assert gate.mapping_uids() == {mine, 0, mine + 1}
    with pytest.raises(AccessDenied, match=f"user {mine + 2} has no rights here"):
        gate.rights_of(Shown.of("", uid=mine + 2, certificate_name=None))


def test_the_group_of_the_socket_is_enough_only_where_users_are_not_told_apart(tmp_path: Path) -> None:
    other = os.getuid() + 1
    open_to_group = gate_of(tmp_path, "", group="kv")
    assert open_to_group.rights_of(Shown.of("", uid=other, certificate_name=None)) is FULL
    assert open_to_group.rights_of(Shown.of("", uid=None, certificate_name=None)) is FULL
    told_apart = gate_of(tmp_path, f'[[client]]\nuid = {other}\nsalts = ["a"]\n', group="kv")
    assert told_apart.rights_of(Shown.of("", uid=other, certificate_name=None)).salts == frozenset({b"a"})
    for uid in (other + 1, None):
        with pytest.raises(AccessDenied):
            told_apart.rights_of(Shown.of("", uid=uid, certificate_name=None))


def test_a_user_who_may_not_see_every_namespace_may_not_map_the_arena(tmp_path: Path) -> None:
    other = os.getuid() + 1
    gate = gate_of(tmp_path, f'[[client]]\nuid = {other}\nsalts = ["a"]\n', allowed_uids=(other,))
    assert gate.mapping_uids() == {os.getuid(), 0}
    gate = gate_of(tmp_path, f"[[client]]\nuid = {other}\nadmin = true\n")
    assert gate.mapping_uids() == {os.getuid(), 0, other}
    assert gate_of(tmp_path, "", group="kv").mapping_uids() is None


def test_the_servers_own_user_is_limited_too_where_it_is_named_and_nobody_is_let_in_unseen(tmp_path: Path) -> None:
    mine = os.getuid()
    gate = gate_of(tmp_path, f'[[client]]\nuid = {mine}\nsalts = ["a"]\n')
    assert mine not in (gate.mapping_uids() or ())
    assert gate.unmapped_uids() == {mine}
    assert gate.rights_of(Shown.of("", uid=mine)).salts == frozenset({b"a"})
    with pytest.raises(AccessDenied, match="tells users apart"):
        gate.rights_of(Shown.of("", local=True))
    trusted = gate_of(tmp_path, f'[[client]]\nuid = {mine}\nsalts = ["*"]\n')
    assert trusted.unmapped_uids() == frozenset()
    assert trusted.rights_of(Shown.of("", local=True)) is FULL


def test_a_certificate_gives_full_rights_until_entries_tell_certificates_apart(tmp_path: Path) -> None:
    plain = Gate(tcp(tmp_path, client_ca="/ca.pem"))
    assert plain.rights_of(Shown.of("", uid=None, certificate_name="engine-1")) is FULL
    tokens = write(tmp_path / "t.toml", '[[client]]\ncertificate = "engine-1"\nsalts = ["a"]\n')
    named = Gate(tcp(tmp_path, client_ca="/ca.pem", tokens_file=tokens))
    assert named.rights_of(Shown.of("", uid=None, certificate_name="engine-1")).salts == frozenset({b"a"})
    with pytest.raises(AccessDenied, match="certificate 'engine-2' has no rights"):
        named.rights_of(Shown.of("", uid=None, certificate_name="engine-2"))


def test_nobody_comes_in_over_the_network_without_a_credential(tmp_path: Path) -> None:
    tokens = write(tmp_path / "t.toml", ACME)
    for options in (
        tcp(tmp_path, tokens_file=tokens),
        tcp(tmp_path, listen="unix:/k", listen_tcp="h:1", tokens_file=tokens),
    ):
        with pytest.raises(AccessDenied, match="no credential was shown"):
            Gate(options).rights_of(Shown.of("", uid=None, certificate_name=None))
    both = Gate(tcp(tmp_path, listen="unix:/k", listen_tcp="h:1", tokens_file=tokens))
    assert both.rights_of(Shown.of("", uid=None, certificate_name=None, local=True)) is FULL
    frightening = ServiceOptions(listen="h:1", serve_anyone_on_the_network_without_authentication=True)
    assert Gate(frightening).rights_of(Shown.of("", uid=None, certificate_name=None)) is FULL


def test_tcp_refuses_to_start_without_tls_and_a_credential(tmp_path: Path) -> None:
    check_transport(ServiceOptions(listen=f"unix:{tmp_path}/k.sock"))
    check_transport(tcp(tmp_path, client_ca="/ca.pem"))
    check_transport(tcp(tmp_path, tokens_file="/t.toml"))
    for naked in (
        ServiceOptions(listen="0.0.0.0:1", tokens_file="/t.toml"),
        ServiceOptions(listen="unix:/k.sock", listen_tcp="0.0.0.0:1"),
    ):
        with pytest.raises(ConfigError, match=r"0\.0\.0\.0:1 without TLS: set service\.tls_cert"):
            check_transport(naked)
    with pytest.raises(ConfigError, match="would serve anyone: set service.tokens_file"):
        check_transport(tcp(tmp_path))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_file_that_others_may_open_is_refused(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path / "t.toml", ACME, mode)
    with pytest.raises(ConfigError, match=f"has mode {mode:04o}, open to others: run chmod 600 {path}"):
        Gate(ServiceOptions(listen="unix:/k.sock", tokens_file=path))
    with pytest.raises(ConfigError, match="open to others"):
        read_secret(ServiceOptions(secret_file=path))


def test_the_secret_is_read_without_the_line_end_and_must_be_long(tmp_path: Path) -> None:
    assert read_secret(ServiceOptions()) == b""
    assert read_secret(ServiceOptions(secret_file=write(tmp_path / "s", "0123456789abcdef\n"))) == b"0123456789abcdef"
    with pytest.raises(ConfigError, match="holds 5 bytes: use at least 16"):
        read_secret(ServiceOptions(secret_file=write(tmp_path / "s", "short\n")))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[client]\n", "is not TOML"),
        ("[clients]\n", r"it holds \[\[client\]\] entries"),
        ("client = 5\n", r"it holds \[\[client\]\] entries"),
        ('[[client]]\ntenant = "a"\n', "client 1: give exactly one of token, token_sha256, certificate, uid"),
        (f'[[client]]\ntoken = "{TOKEN}"\nuid = 5\n', "give exactly one of"),
        (f'[[client]]\ntoken = "{TOKEN}"\nsalt = "a"\n', "unknown key 'salt': known are token"),
        ('[[client]]\ntoken = "short"\n', "the token has 5 characters: use at least 16"),
        ('[[client]]\ntoken = ""\n', "token is '': give a string that is not empty"),
        ('[[client]]\ntoken_sha256 = "00ff"\n', "token_sha256 must be 64 hex digits"),
        ("[[client]]\nuid = -1\n", "uid is -1: give a number"),
        ("[[client]]\nuid = true\n", "uid is True: give a number"),
        (f'[[client]]\ntoken = "{TOKEN}"\nsalts = "a"\n', "salts is 'a': give a list of strings"),
        (f'[[client]]\ntoken = "{TOKEN}"\nsalts = ["hex:x"]\n', "salt 'hex:x': hex digits must follow"),
        (f'[[client]]\ntoken = "{TOKEN}"\nadmin = "yes"\n', "admin is 'yes': use true or false"),
        (f'[[client]]\ntoken = "{TOKEN}"\nadmin = true\nsalts = []\n', "an admin clears and checks everything"),
        (f'[[client]]\ntoken = "{TOKEN}"\nquota = "1GiB"\n', "a quota is a tenant's: give tenant too"),
        (f'[[client]]\ntoken = "{TOKEN}"\n' * 2, "two clients have the same token"),
        (ACME + f'[[client]]\ntoken = "{OTHER}"\ntenant = "acme"\n', "tenant 'acme' has two different quotas"),
    ],
)
def test_a_wrong_tokens_file_is_one_clear_sentence(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        gate_of(tmp_path, text)


def test_no_error_shows_a_token(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        gate_of(tmp_path, f'[[client]]\ntoken = "{TOKEN}"\nuid = 5\n')
    assert TOKEN not in str(caught.value)
    with pytest.raises(AccessDenied) as denied:
        gate_of(tmp_path, ACME).rights_of(Shown.of(OTHER, uid=None, certificate_name=None))
    assert OTHER not in str(denied.value)


def test_a_reload_takes_new_tokens_and_a_broken_file_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate = gate_of(tmp_path, ACME)
    path = tmp_path / "tokens.toml"
    path.write_text("[[client]\n")
    with caplog.at_level(logging.ERROR):
        assert not gate.reload()
    assert "rights stay as they were" in caplog.text
    assert gate.rights_of(Shown.of(TOKEN, uid=None, certificate_name=None)).tenant == "acme"
    path.write_text(f'[[client]]\ntoken = "{OTHER}"\nadmin = true\n')
    assert gate.reload()
    assert gate.rights_of(Shown.of(OTHER, uid=None, certificate_name=None)) == FULL
    with pytest.raises(AccessDenied):
        gate.rights_of(Shown.of(TOKEN, uid=None, certificate_name=None))
