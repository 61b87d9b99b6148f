# SPDX-License-Identifier: Apache-2.0
"""Scenarios of `vllm_runs` through a sidecar and Redis: kills, cold replicas, engines of several ranks.

Every process is real, and so are the kills. A relay stands between sidecar and Redis only where Redis must die in
the middle of a reply.
"""

from __future__ import annotations

import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import redis

from connectors.vllm_plan import VllmSettings
from kvstore.block import Chain, Root
from kvstore.tiers.valkey import embedded_binary
from tests import patient
from tests.engines import vllm_windows
from tests.engines.vllm_support import (
    NEW,
    Engine,
    Facts,
    Reference,
    in_fork,
    poison,
    tokens_of,
    worst_error,
)

_FINE = {"part_layers": 1, "part_heads": 1}
_HOLE = 4
"""Block of which one part goes missing or is damaged."""


# -- processes -------------------------------------------------------------------------------------------------


class Process:
    """A server in a process of its own, which may be killed and started again at the same address."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._command, self._log = list(command), log
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline_s = time.monotonic() + 60
        while not self.answers():
            assert self._process.poll() is None, self._log.read_text()[-2000:]
            assert time.monotonic() < deadline_s, f"{self._command} does not answer"
            time.sleep(0.02)

    def answers(self) -> bool:
        raise NotImplementedError

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            self._process.wait(30)


class Redis(Process):
    """A Redis or Valkey on a Unix socket, that keeps nothing on disk."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "redis"
        command = [str(embedded_binary()), "--port", "0", "--unixsocket", str(self.path), "--save", ""]
        super().__init__([*command, "--dir", str(directory)], directory / "redis.log")

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.path))

    def answers(self) -> bool:
        try:
            return bool(self.client().ping())
        except redis.RedisError:
            return False

    def num_values(self) -> int:
        return sum(1 for _ in self.client().scan_iter("kvs2:{*}:*:v:*"))

    def wait_for(self, num_values: int) -> None:
        deadline_s = time.monotonic() + 30
        while self.num_values() < num_values:
            assert time.monotonic() < deadline_s, f"{self.num_values()} of {num_values} values came down"
            time.sleep(0.05)

    def value_of(self, block: str, part: int) -> bytes:
        (key,) = self.client().scan_iter(f"kvs2:{{*}}:*:v:{block}:{part:03d}")
        return bytes(key)


class Sidecar(Process):
    """`kvstore serve`."""

    def __init__(self, directory: Path, **settings: str) -> None:
        self._directory = directory
        self.address = f"unix:{directory}/s"
        command = [sys.executable, "-m", "kvstore.service.cli", "serve", "--listen", self.address]
        for key, value in {"host.capacity_bytes": "128MiB", "request.lookup_deadline_s": "10", **settings}.items():
            command += ["--set", f"{key.replace('__', '.')}={value}"]
        self._starts = 0
        super().__init__(command, directory / "sidecar.log")

    def start(self) -> None:
        self._starts += 1
        super().start()

    def answers(self) -> bool:
        log = self._directory / "sidecar.log"
        return log.read_text().count("ready:") >= self._starts

    def connect(self) -> Any:
        return patient.connect(self.address, mapped=True, wait_s=30)


class Relay:
    """Passes bytes between two Unix sockets. Once armed it acts after so many bytes of replies, and hangs up."""

    def __init__(self, at: Path, to: Path) -> None:
        self._to = to
        self._left: int | None = None
        self._act: Callable[[], None] = lambda: None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(at))
        self._listener.listen(16)
        threading.Thread(target=self._accept, daemon=True).start()

    def arm(self, num_bytes: int, act: Callable[[], None]) -> None:
        self._act, self._left = act, num_bytes

    @property
    def acted(self) -> bool:
        return self._left is not None and self._left <= 0

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            far = socket.socket(socket.AF_UNIX)
            try:
                far.connect(str(self._to))
            except OSError:
                near.close()
                continue
            threading.Thread(target=self._pass, args=(near, far, False), daemon=True).start()
            threading.Thread(target=self._pass, args=(far, near, True), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, replies: bool) -> None:
        try:
            while chunk := source.recv(16 << 10):
                if replies and self._left is not None:
                    before, self._left = self._left, self._left - len(chunk)
                    if self._left <= 0:
                        target.sendall(chunk[: max(0, before)])
                        if before > 0:
                            self._act()
                        break
                target.sendall(chunk)
        except OSError:
            pass
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


class Cut:
    """A load in whose middle something happens."""

    def __init__(self, load: Any, at: int, act: Callable[[], None]) -> None:
        self._load, self._at, self._act = load, at, act

    def __iter__(self) -> Iterator[Any]:
        for block in self._load:
            if block.index == self._at:
                self._act()
            yield block

    def intact(self) -> bool:
        return bool(self._load.intact())

    def close(self) -> None:
        self._load.close()

    def __enter__(self) -> Cut:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# -- one engine ------------------------------------------------------------------------------------------------


class Watched:
    """An engine through a sidecar whose requests are compared and timed, each served as if for the first time."""

    def __init__(self, workdir: Path, address: str, **extra: object) -> None:
        self.reference = Reference(workdir)
        self.engine = Engine(self.reference.directory, None, extra={"address": address, **extra})
        self.engine.connector._scheduler.fail_open.backoff_s = 0.05
        self.facts: Facts = {"equal": {}, "hits": {}, "ttft_s": {}}
        self._want: dict[int, list[int]] = {}

    def run(self, name: str, seed: int = 1, *, says: Mapping[str, object] | None = None) -> int:
        prompt = tokens_of(seed)
        if seed not in self._want:
            self._want[seed] = self.reference.generate(prompt, NEW)
        self.engine.forget()
        outs, hits = self.engine.generate([prompt], says=says)
        self.facts["equal"][name] = outs[0] == self._want[seed]
        self.facts["hits"][name] = hits[0]
        self.facts["ttft_s"][name] = self.engine.ttft_s
        return hits[0]

    def run_until_hit(self, name: str, seed: int = 1) -> None:
        for _ in range(80):
            if self.run(name, seed):
                return
            time.sleep(0.1)

    def full(self, seed: int) -> list[int]:
        return [*tokens_of(seed), *self._want[seed]]

    def cut(self, at: int, act: Callable[[], None]) -> None:
        """Do something at block `at` of the next load."""
        loads = self.engine.worker._loads
        adopt = loads._adopt

        def once(shared: object) -> Any:
            loads._adopt = adopt
            return Cut(adopt(shared), at, act)

        loads._adopt = once

    def kill(self, sidecar: Sidecar) -> None:
        """Returns when the engine's client has noticed: what it has mapped stays readable until then."""
        sidecar.kill()
        deadline_s = time.monotonic() + 10
        while self.engine.connector._link.store.is_up and time.monotonic() < deadline_s:
            time.sleep(0.01)
        time.sleep(0.2)  # to unmap

    def failed(self) -> float:
        return float(self.engine.connector._scheduler.figures.counts.get("failed_loads", 0))

    def note_added(self, deadline_s: float, damaged: Mapping[str, Sequence[str]]) -> None:
        """How much longer requests took than the same one computed in this engine: by what was `damaged`, and at worst.

        To be called while the store is sound: computing goes on saving, as it does in the requests compared.
        """
        computed_s = recomputed_s(self.engine, tokens_of(1))
        took_s = self.facts["ttft_s"]
        self.facts["added"] = {
            what: max(took_s[name] for name in names) - computed_s for what, names in damaged.items()
        }
        self.facts |= {"computed_s": computed_s, "deadline_s": deadline_s}
        self.facts["added_s"] = max(s for name, s in took_s.items() if name != "warm-up") - computed_s


def recomputed_s(engine: Engine, prompt: Sequence[int]) -> float:
    """Seconds to the first token where nothing is loaded, the median of three."""
    scheduler = engine.connector._scheduler
    before, took_s = scheduler._settings, []
    scheduler._settings = replace(before, load=False)
    for _ in range(3):
        engine.forget()
        engine.generate([prompt], 1)
        took_s.append(engine.ttft_s)
    scheduler._settings = before
    return statistics.median(took_s)


def sidecar_killed(workdir: Path) -> Facts:
    """The sidecar killed between requests, in the middle of loads, and stopped: in the step and beside the steps."""
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as name:
        sidecar = Sidecar(Path(name))
        watched = Watched(workdir, sidecar.address, load_deadline_ms=1000, call_deadline_ms=1000)
        watched.run("warm-up", 9)
        watched.run("cold")
        watched.run("sound")
        with sidecar.connect() as client:
            error, num_blocks = worst_error(client, watched.engine.model_id, watched.reference, watched.full(1))
        for how, sync_load_ms in (("in the step", 20.0), ("beside the steps", 0.0)):
            matching = watched.engine.connector._scheduler._matching
            matching._settings = replace(matching._settings, sync_load_ms=sync_load_ms)
            watched.run_until_hit(f"before, {how}")
            watched.cut(4, lambda: watched.kill(sidecar))
            watched.run(f"killed {how}")
            watched.run(f"gone, {how}")
            sidecar.start()
            watched.run_until_hit(f"back, {how}")
        sidecar.signal(signal.SIGSTOP)
        watched.run("stopped")
        sidecar.signal(signal.SIGCONT)
        watched.run_until_hit("goes on")
        damaged = {"sidecar stopped": ["stopped"]}
        damaged["sidecar killed"] = [f"killed {how}" for how in ("in the step", "beside the steps")]
        damaged["sidecar gone"] = [f"gone, {how}" for how in ("in the step", "beside the steps")]
        watched.note_added(1.0, damaged)
        with sidecar.connect() as client:
            poison(client, watched.engine.model_id, tokens_of(1))
        facts = dict(watched.facts, equal=dict(watched.facts["equal"]), ttft_s=dict(watched.facts["ttft_s"]))
        facts["failed"] = watched.failed()
        watched.run("control")
        facts |= {"control_differs": not watched.facts["equal"]["control"], "error": error, "num_blocks": num_blocks}
        facts["held"] = watched.engine.close()
        sidecar.stop()
        return facts


def redis_tier(workdir: Path) -> Facts:
    """A cold replica served by Redis; Redis killed in the middle of a load, and gone."""
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as name:
        directory = Path(name)
        server = Redis(directory)
        relay = Relay(directory / "relay", server.path)
        settings = {"tiers.redis.url": f"unix://{directory}/relay", "mover.write": "through"}
        sidecar = Sidecar(directory, **settings)
        watched = Watched(workdir, sidecar.address, load_deadline_ms=2000, match_deadline_ms=2000)
        watched.run("warm-up", 9)
        watched.run("cold")
        server.wait_for(22)

        def cold_replica() -> None:
            sidecar.kill()
            sidecar.start()
            for _ in range(200):  # until the engine has found the new one
                if watched.engine.connector._link.store.is_up:
                    break
                time.sleep(0.05)

        cold_replica()
        watched.run("from Redis")
        loaded = {
            tier: watched.engine.connector._scheduler.figures.counts.get(f"loaded_bytes.{tier}", 0)
            for tier in ("host", "redis")
        }
        with sidecar.connect() as client:
            error, num_blocks = worst_error(client, watched.engine.model_id, watched.reference, watched.full(1))
        cold_replica()
        before = watched.failed()
        relay.arm(4 * 50_000, server.kill)  # a block is 48 KiB, so that is in the middle of the prefix
        watched.run("killed")
        killed = {"acted": relay.acted, "failed": watched.failed() - before}
        watched.run("gone")
        server.start()
        relay.arm(1 << 60, lambda: None)
        time.sleep(1.1)  # as long as the breaker is open
        with sidecar.connect() as client:
            client.clear()
        watched.run("saved again")
        server.wait_for(11)
        cold_replica()
        watched.run("from Redis again")
        watched.note_added(2.0, {"redis killed": ["killed"], "redis gone": ["gone"]})
        with sidecar.connect() as client:
            poison(client, watched.engine.model_id, tokens_of(1))
        server.wait_for(9)
        cold_replica()
        facts = dict(watched.facts, equal=dict(watched.facts["equal"]), ttft_s=dict(watched.facts["ttft_s"]))
        facts |= {"loaded": loaded, "killed": killed}
        watched.run("control")
        facts |= {"control_differs": not watched.facts["equal"]["control"], "error": error, "num_blocks": num_blocks}
        facts["control_hits"] = watched.facts["hits"]["control"]
        facts["held"] = watched.engine.close()
        sidecar.stop()
        server.stop()
        return facts


# -- engines of several ranks ----------------------------------------------------------------------------------


def member(
    workdir: Path,
    address: str,
    seeds: Sequence[int],
    options: Mapping[str, Any],
    *,
    control: int | None = None,
    num_kv_heads: int = 2,
    reset: bool = False,
    damaged: Mapping[str, int] | None = None,
    reference: Reference | None = None,
) -> Facts:
    """One engine of a fleet: its answers to some prompts, what it found, and what is stored then.

    `damaged`: of which of them something is, by what; how much longer these took than when they are computed.
    `reset`: all caches are emptied before; where steps are scheduled ahead, saves go on when all ranks have said so.
    """
    reference = reference or Reference(workdir, num_kv_heads=num_kv_heads)
    engine = Engine(reference.directory, None, extra={"address": address, **_FINE}, **options)
    wants = {seed: reference.generate(tokens_of(seed), NEW) for seed in seeds}
    facts: Facts = {"equal": [], "hits": [], "blocks": {}, "keeps": engine.connector._groups.keeps}
    took_s = {}
    if reset:
        assert engine.llm.reset_prefix_cache(reset_connector=True)
    for seed in seeds:
        outs, hits = engine.generate([tokens_of(seed)])
        took_s[seed] = engine.ttft_s
        facts["equal"].append(outs[0] == wants[seed])
        facts["hits"].append(hits[0])
        facts["blocks"][str(seed)] = Chain(Root(engine.model_id), tokens_of(seed)).ids[_HOLE].hex()
    if damaged:
        facts["added"] = {what: took_s[seed] - recomputed_s(engine, tokens_of(seed)) for what, seed in damaged.items()}
        facts |= {"added_s": max(facts["added"].values()), "deadline_s": VllmSettings().load_deadline_ms / 1e3}
    with patient.connect(address, mapped=True) as client:
        errors = [worst_error(client, engine.model_id, reference, [*tokens_of(seed), *wants[seed]]) for seed in seeds]
        facts |= {"error": max(error for error, _ in errors), "num_blocks": [count for _, count in errors]}
        facts["num_parts"] = len(client.open(engine.model_id).parts)
        if control is not None:
            poison(client, engine.model_id, tokens_of(control))
            engine.forget()
            outs, hits = engine.generate([tokens_of(control)])
            facts |= {"control_differs": outs[0] != wants[control], "control_hits": hits[0]}
    return {**facts, "held": engine.close()}


def fleet(workdir: Path, options: Mapping[str, Any]) -> Facts:
    """What a parallel engine saves a single one loads, and the reverse; one part deleted, one damaged."""
    Reference(workdir)
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as name:
        directory = Path(name)
        server = Redis(directory)
        sidecar = Sidecar(directory, **{"tiers.redis.url": f"unix://{server.path}", "mover.write": "through"})
        try:
            saves = in_fork(lambda: member(workdir, sidecar.address, [1, 3, 4], options, reset=True))
            single = in_fork(lambda: member(workdir, sidecar.address, [1, 2], {}, control=None))
            num_parts = int(saves["num_parts"])
            server.wait_for(4 * 11 * num_parts)
            last = num_parts - 1  # of the last rank, whether ranks hold heads or layers
            client = server.client()
            client.delete(server.value_of(saves["blocks"]["3"], last))
            damaged = server.value_of(saves["blocks"]["4"], last)
            value = bytearray(client.get(damaged))
            value[-100] ^= 1
            client.set(damaged, bytes(value))
            sidecar.kill()
            sidecar.start()
            damaged = {"part deleted": 3, "part damaged": 4}
            loads = in_fork(lambda: member(workdir, sidecar.address, [2, 1, 3, 4], options, control=1, damaged=damaged))
            return {"many saves": saves, "one loads": single, "many loads": loads}
        finally:
            sidecar.stop()
            server.stop()


def replicas(workdir: Path) -> Facts:
    """Two ranks that hold the same single KV head: one of them saves it, both load it, and so does an engine alone."""
    Reference(workdir, num_kv_heads=1)
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as name:
        sidecar = Sidecar(Path(name))

        def run(seeds: Sequence[int], options: Mapping[str, Any], control: int | None = None) -> Facts:
            with sidecar.connect() as client:
                before = client.stats().get("save.requests", 0.0)
                facts = in_fork(
                    lambda: member(workdir, sidecar.address, seeds, options, control=control, num_kv_heads=1)
                )
                return {**facts, "save_calls": client.stats().get("save.requests", 0.0) - before}

        try:
            many = run([1], TP2)
            single = run([3], {})
            again = run([1], {})
            back = run([3], TP2, control=3)
            return {"many saves": many, "one saves": single, "one loads": again, "many loads": back}
        finally:
            sidecar.stop()


def windows_in_a_fleet(workdir: Path) -> Facts:
    """Engines of a model with windows, which keep them in groups or all tokens in one, alone and as ranks."""
    reference = vllm_windows.of_some_layers(workdir)
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as name:
        sidecar = Sidecar(Path(name))

        def run(seeds: Sequence[int], options: Mapping[str, Any], control: int | None = None) -> Facts:
            return in_fork(
                lambda: member(workdir, sidecar.address, seeds, options, control=control, reference=reference)
            )

        try:
            return {
                "ranks save": run([1], TP2),
                "stages load": run([1, 2], PP2),
                "one that keeps all loads": run([1, 2, 3], vllm_windows.KEPT),
                "one in groups loads": run([3, 2, 1], {}),
                "ranks load": run([3], TP2, control=3),
            }
        finally:
            sidecar.stop()


def roles(workdir: Path) -> Facts:
    """An engine that only saves, then one that only loads, of one sidecar, as vLLM's `kv_role` says."""
    Reference(workdir)
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as name:
        sidecar = Sidecar(Path(name))
        try:
            produces = in_fork(lambda: _role(workdir, sidecar, "kv_producer", [1, 1]))
            consumes = in_fork(lambda: _role(workdir, sidecar, "kv_consumer", [1, 2, 2, 1], control=True))
            return {"produces": produces, "consumes": consumes}
        finally:
            sidecar.stop()


def _role(workdir: Path, sidecar: Sidecar, role: str, seeds: Sequence[int], *, control: bool = False) -> Facts:
    reference = Reference(workdir)
    engine = Engine(reference.directory, None, role=role, extra={"address": sidecar.address})
    facts: Facts = {"equal": [], "hits": [], "num_blocks": []}
    with sidecar.connect() as client:
        for seed in seeds:
            engine.forget()
            outs, hits = engine.generate([tokens_of(seed)])
            facts["equal"].append(outs[0] == reference.generate(tokens_of(seed), NEW))
            facts["hits"].append(hits[0])
            facts["num_blocks"].append(client.stats()["host.blocks"])
        want = reference.generate(tokens_of(1), NEW)
        facts["error"], _ = worst_error(client, engine.model_id, reference, [*tokens_of(1), *want])
        if control:
            poison(client, engine.model_id, tokens_of(1))
            engine.forget()
            facts["control_differs"] = engine.generate([tokens_of(1)])[0][0] != want
    facts["loads"] = engine.connector._scheduler.figures.counts.get("loads", 0)
    return {**facts, "held": engine.close()}


TP2 = {"tensor_parallel_size": 2}
PP2 = {
    "pipeline_parallel_size": 2,
    "enforce_eager": False,
    "compilation_config": {"mode": 3, "backend": "eager"},
}

SCENARIOS: dict[str, Callable[[Path], Facts]] = {
    "sidecar_killed": sidecar_killed,
    "redis_tier": redis_tier,
    "roles": roles,
    "tp2": lambda workdir: fleet(workdir, TP2),
    "tp2_replicas": replicas,
    "pp2": lambda workdir: fleet(workdir, PP2),
    "windows_in_a_fleet": windows_in_a_fleet,
}
