# SPDX-License-Identifier: Apache-2.0
"""The door, with real processes: who is let in, what they get, and what is known when they die."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from kvstore.arena import Arena
from kvstore.errors import AccessDenied, ConfigError, ProtocolError, ServiceUnavailable
from kvstore.mapping import ArenaMapping
from kvstore.service import door as door_module
from kvstore.service.door import Door, Peer
from kvstore.service.knock import Unmapped, knock
from tests.descriptors import descriptors
from tests.waiting import eventually

BOOT = bytes(range(16))
TIMEOUT_S = 10.0

CLIENT = """
import os, sys
from kvstore.mapping import ArenaMapping
from kvstore.service.knock import knock

with knock(sys.argv[1], 10.0) as opened:
    mapping = ArenaMapping(opened.memory_fd, opened.generation_fd, opened.capacity_bytes)
print(opened.ticket.hex(), flush=True)
sys.stdin.read()
"""


class Exits:
    """Peers that the door said are dead."""

    def __init__(self) -> None:
        self.peers: list[Peer] = []
        self._told = threading.Condition()

    def __call__(self, peer: Peer) -> None:
        with self._told:
            self.peers.append(peer)
            self._told.notify_all()

    def wait(self, num_peers: int) -> list[Peer]:
        with self._told:
            self._told.wait_for(lambda: len(self.peers) >= num_peers, TIMEOUT_S)
            return list(self.peers)


MakeDoor = Callable[..., Door]


@pytest.fixture
def path() -> Iterator[str]:
    """Open to every user down to the socket, so that its own mode and the door's check are what decides."""
    folder = tempfile.mkdtemp(prefix="kvd")
    os.chmod(folder, 0o755)
    yield f"{folder}/s"
    shutil.rmtree(folder)


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(1 << 20, shared=True, prefault=False)
    yield arena
    arena.close()


@pytest.fixture
def exits() -> Exits:
    return Exits()


@pytest.fixture
def make_door(path: str, arena: Arena, exits: Exits) -> Iterator[MakeDoor]:
    """Makes doors, and sees that they leave no descriptor and no socket."""
    before = descriptors()
    made: list[Door] = []

    def make(**options: object) -> Door:
        made.append(
            Door(
                path, arena.memory_fd, arena.generation_fd, arena.capacity_bytes, BOOT, **{"on_exit": exits, **options}
            )  # type: ignore[arg-type]
        )
        return made[-1]

    yield make
    for door in made:
        door.close()
    assert not os.path.exists(f"{path}.door")
    assert descriptors() <= before


@pytest.fixture
def door(make_door: MakeDoor) -> Door:
    return make_door()


@contextmanager
def client(path: str, *, script: str = CLIENT) -> Iterator[tuple[subprocess.Popen[str], bytes]]:
    """A process that went through the door, and its ticket; ended at last."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        try:
            yield process, bytes.fromhex(process.stdout.readline())
        finally:
            process.stdin.close()
            process.kill()


# -- what is handed out ----------------------------------------------------------------------------------------


def test_a_knock_gets_the_arena_and_a_ticket(door: Door, path: str, arena: Arena) -> None:
    slot = arena.acquire(100)
    assert slot is not None
    arena.view(slot, 5)[:] = b"there"
    with knock(path, TIMEOUT_S) as opened:
        assert (opened.capacity_bytes, opened.boot_id, len(opened.ticket)) == (1 << 20, BOOT, 16)
        assert not os.get_inheritable(opened.memory_fd)
        mapping = ArenaMapping(opened.memory_fd, opened.generation_fd, opened.capacity_bytes)
    assert bytes(mapping.view(slot, 5)) == b"there"
    assert mapping.generations(np.array([slot])).tolist() == [1]
    assert mapping.close()
    peer = door.redeem(opened.ticket)
    assert peer is not None
    assert (peer.pid, peer.uid) == (os.getpid(), os.getuid())


def test_a_ticket_is_good_once_and_for_nobody_who_guesses(door: Door, path: str) -> None:
    with knock(path, TIMEOUT_S) as one, knock(path, TIMEOUT_S) as two:
        assert one.ticket != two.ticket
    assert door.redeem(bytes(16)) is None
    assert door.redeem(b"") is None
    first = door.redeem(one.ticket)
    assert first is not None
    assert door.redeem(one.ticket) is None
    second = door.redeem(two.ticket)
    assert second is not None
    assert second != first


def test_of_many_threads_with_one_ticket_one_is_served(door: Door, path: str) -> None:
    with knock(path, TIMEOUT_S) as opened:
        pass
    start = threading.Barrier(8)
    got: list[Peer | None] = []

    def redeem() -> None:
        start.wait()
        got.append(door.redeem(opened.ticket))

    threads = [threading.Thread(target=redeem) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([peer for peer in got if peer is not None]) == 1


def test_a_ticket_that_nobody_redeems_dies(
    make_door: MakeDoor, path: str, monkeypatch: pytest.MonkeyPatch, exits: Exits
) -> None:
    monkeypatch.setattr(door_module, "TICKET_S", 0.05)
    door = make_door()
    with knock(path, TIMEOUT_S) as opened:
        pass
    assert eventually(lambda: door.num_peers == 0)
    assert door.redeem(opened.ticket) is None
    assert exits.peers == []


# -- who dies --------------------------------------------------------------------------------------------------


def test_kill_9_of_a_peer_is_told_exactly_once(door: Door, path: str, exits: Exits) -> None:
    with client(path) as (process, ticket), client(path) as (other, other_ticket):
        peer, other_peer = door.redeem(ticket), door.redeem(other_ticket)
        assert peer is not None
        assert other_peer is not None
        assert (peer.pid, other_peer.pid) == (process.pid, other.pid)
        assert door.alive(peer)
        assert exits.peers == []
        process.kill()  # not waited for: a zombie is dead as well
        assert exits.wait(1) == [peer]
        assert not door.alive(peer)
        other.kill()
        assert exits.wait(2) == [peer, other_peer]
    assert door.num_peers == 0


def test_a_process_that_hung_up_or_was_stopped_is_not_dead(door: Door, path: str, exits: Exits) -> None:
    with client(path) as (process, ticket):
        peer = door.redeem(ticket)
        assert peer is not None
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        with knock(path, TIMEOUT_S):  # the door's thread has been round since
            pass
        assert door.alive(peer)
        assert exits.peers == []


def test_a_process_that_died_before_its_ticket_was_redeemed_has_none(door: Door, path: str, exits: Exits) -> None:
    with client(path) as (process, ticket):
        process.kill()
        assert eventually(lambda: door.num_peers == 0)
        assert door.redeem(ticket) is None
    assert exits.peers == []


def test_each_passage_of_a_process_is_told_on_its_own(door: Door, path: str, exits: Exits) -> None:
    twice = CLIENT.replace("sys.stdin", "print(knock(sys.argv[1], 10.0).ticket.hex(), flush=True)\nsys.stdin")
    with client(path, script=twice) as (process, ticket):
        assert process.stdout is not None
        peers = [door.redeem(ticket), door.redeem(bytes.fromhex(process.stdout.readline()))]
        process.kill()
        assert sorted(exits.wait(2), key=lambda peer: peer.number) == peers


def test_a_forgotten_peer_is_not_told(door: Door, path: str, exits: Exits) -> None:
    with client(path) as (process, ticket), client(path) as (other, other_ticket):
        peer, other_peer = door.redeem(ticket), door.redeem(other_ticket)
        assert peer is not None
        door.forget(peer)
        door.forget(peer)
        process.kill()
        process.wait()
        other.kill()
        assert exits.wait(1) == [other_peer]


def test_a_slow_or_failing_answer_to_a_death_holds_up_no_client(
    make_door: MakeDoor, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    entered, go = threading.Event(), threading.Event()
    told: list[Peer] = []

    def slow(peer: Peer) -> None:
        told.append(peer)
        entered.set()
        assert go.wait(TIMEOUT_S)
        raise RuntimeError("no")

    door = make_door(on_exit=slow)
    with client(path) as (process, ticket), client(path) as (other, other_ticket):
        door.redeem(ticket)
        door.redeem(other_ticket)
        process.kill()
        assert entered.wait(TIMEOUT_S)
        with knock(path, TIMEOUT_S / 5):
            other.kill()
        assert eventually(lambda: door.num_peers == 1)  # the knock's own
        go.set()
    door.close()
    assert len(told) == 2
    assert "RuntimeError: no" in caplog.text


def test_two_hundred_clients_that_are_killed_leave_nothing(door: Door, path: str, exits: Exits) -> None:
    """Forked, since starting an interpreter each would take a minute; the door cannot tell the difference."""
    script = (
        "import os, sys\n"
        "from kvstore.service.knock import knock\n"
        "for _ in range(200):\n"
        "    ours, theirs = os.pipe()\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        os.write(theirs, knock(sys.argv[1], 10.0).ticket)\n"
        "        import time; time.sleep(60)\n"
        "    print(os.read(ours, 16).hex(), flush=True)\n"
        "    sys.stdin.readline()\n"
        "    os.kill(child, 9)\n"
        "    os.close(ours); os.close(theirs)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    peers: list[Peer | None] = []
    with process:
        for line in process.stdout:
            peers.append(door.redeem(bytes.fromhex(line)))
            process.stdin.write("\n")
            process.stdin.flush()
    assert len(exits.wait(200)) == 200
    assert sorted(exits.peers, key=lambda peer: peer.number) == peers
    assert door.num_peers == 0


# -- who is let in ---------------------------------------------------------------------------------------------

AS_ANOTHER_USER = """
import os, sys
from kvstore.errors import KVStoreError
from kvstore.service.knock import knock
{become}
try:
    knock(sys.argv[1], 10.0)
    print("let in")
except KVStoreError as error:
    print(type(error).__name__, error)
"""
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="becomes other users")


def knock_as(path: str, become: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", AS_ANOTHER_USER.format(become=become), path],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@root_only
def test_other_users_do_not_reach_a_door_of_mode_0600(door: Door, path: str) -> None:
    assert stat.S_IMODE(os.stat(door.path).st_mode) == 0o600
    assert "AccessDenied user 4242 may not connect" in knock_as(
        path, "os.setgroups([]); os.setgid(4242); os.setuid(4242)"
    )
    assert door.num_peers == 0


@root_only
def test_the_door_checks_users_itself_whatever_the_mode_of_its_socket(door: Door, path: str) -> None:
    os.chmod(door.path, 0o666)
    answer = knock_as(path, "os.setgroups([]); os.setgid(4242); os.setuid(4242)")
    assert answer.startswith("AccessDenied")
    assert "user 4242 may not map this arena: name it in service.allowed_uids" in answer
    assert door.num_peers == 0


@root_only
def test_named_users_are_let_in_and_nobody_else(make_door: MakeDoor, path: str) -> None:
    door = make_door(allowed_uids=frozenset({4242}))
    os.chmod(door.path, 0o666)
    assert knock_as(path, "os.setgroups([]); os.setgid(4243); os.setuid(4242)") == "let in\n"
    assert "AccessDenied" in knock_as(path, "os.setgroups([]); os.setgid(4242); os.setuid(4243)")
    assert "AccessDenied" in knock_as(path, "")  # not even root, where it is not named


@root_only
@pytest.mark.parametrize("become", ["os.setgroups([]); os.setgid(5000)", "os.setgroups([1, 5000]); os.setgid(4242)"])
def test_members_of_the_group_are_let_in(make_door: MakeDoor, path: str, become: str) -> None:
    door = make_door(group="5000")
    status = os.stat(door.path)
    assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o660, 5000)
    assert knock_as(path, f"{become}; os.setuid(4242)") == "let in\n"
    os.chmod(door.path, 0o666)
    assert "AccessDenied" in knock_as(path, "os.setgroups([]); os.setgid(4242); os.setuid(4242)")


def test_users_that_are_not_named_are_refused(make_door: MakeDoor, path: str) -> None:
    door = make_door(allowed_uids=frozenset({os.getuid() + 1}))
    with pytest.raises(AccessDenied, match=f"user {os.getuid()} may not map this arena"):
        knock(path, TIMEOUT_S)
    assert door.num_peers == 0


@root_only
def test_a_user_with_limited_rights_gets_a_ticket_and_no_memory_whatever_else_lets_it_in(
    make_door: MakeDoor, path: str
) -> None:
    door = make_door(allowed_uids=frozenset({4242}), unmapped_uids=frozenset({4242}))
    os.chmod(door.path, 0o666)
    answer = knock_as(path, "os.setgroups([]); os.setgid(4242); os.setuid(4242)")
    assert answer.startswith("Unmapped")
    assert "user 4242 has limited rights here and may not map this arena" in answer
    assert door.num_peers == 0
    (ticket,) = door._introduced
    assert (door.introduced(ticket), door.introduced(ticket)) == (4242, None)


def test_a_ticket_without_memory_is_good_for_ten_seconds_and_so_many_at_once(
    make_door: MakeDoor, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = make_door(unmapped_uids=frozenset({os.getuid()}), max_peers=2)
    tickets = []
    for _ in range(2):
        with pytest.raises(Unmapped) as known:
            knock(path, TIMEOUT_S)
        tickets.append(known.value.ticket)
        assert door.redeem(known.value.ticket) is None, "it is no process with the memory"
    with pytest.raises(ServiceUnavailable, match="2 tickets wait to be used"):
        knock(path, TIMEOUT_S)
    assert door.introduced(tickets[0]) == os.getuid()
    assert door.introduced(bytes(16)) is None
    now_s = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s + door_module.TICKET_S + 1)
    assert door.introduced(tickets[1]) is None


DOOR_OF_ITS_OWN = """
import sys
from kvstore.arena import Arena
from kvstore.service.door import Door

arena = Arena(1 << 20, shared=True, prefault=False)
with Door(sys.argv[1], arena.memory_fd, arena.generation_fd, arena.capacity_bytes, bytes(16),
          on_exit=lambda peer: print("dead", peer.pid, flush=True)) as door:
    print("open", flush=True)
    for line in sys.stdin:
        print("let in", door.redeem(bytes.fromhex(line)).pid, flush=True)
"""


@root_only
def test_a_stranger_who_came_first_to_the_path_is_not_trusted(path: str) -> None:
    folder = os.path.dirname(path)
    os.chmod(folder, 0o777)  # as /tmp is
    become = "import os; os.setgroups([]); os.setgid(4242); os.setuid(4242)\n"  # after the imports it may not read
    script = DOOR_OF_ITS_OWN.replace("arena = ", f"{become}arena = ", 1)
    with subprocess.Popen(
        [sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as service:
        assert service.stdin is not None
        assert service.stdout is not None
        assert service.stdout.readline() == "open\n"
        with pytest.raises(AccessDenied, match="runs as user 4242, whom this user does not trust"):
            knock(path, TIMEOUT_S)
        os.chown(folder, 4242, -1)  # whoever owns the directory says who serves there
        with knock(path, TIMEOUT_S):
            pass
        service.stdin.close()
        assert service.wait(TIMEOUT_S) == 0


@root_only
def test_a_process_whose_id_is_not_to_be_seen_from_here_is_watched_all_the_same(path: str) -> None:
    """The door is in a PID namespace of its own, as in a container, where this process has no id."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-fp", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a PID namespace")
    with subprocess.Popen(
        [unshare, "--fork", "--pid", sys.executable, "-c", DOOR_OF_ITS_OWN, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as service:
        assert service.stdin is not None
        assert service.stdout is not None
        assert service.stdout.readline() == "open\n"
        with client(path) as (process, ticket):
            print(ticket.hex(), file=service.stdin, flush=True)
            assert service.stdout.readline() == "let in 0\n"
            process.kill()
            assert service.stdout.readline() == "dead 0\n"
        service.stdin.close()
        assert service.wait(TIMEOUT_S) == 0


def test_without_pidfds_of_sockets_the_process_is_found_by_its_id(
    make_door: MakeDoor, path: str, exits: Exits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door_module, "_SO_PEERPIDFD", 9999)  # what a kernel before 6.5 says to 77
    door = make_door()
    with client(path) as (process, ticket):
        peer = door.redeem(ticket)
        assert peer is not None
        process.kill()
        assert exits.wait(1) == [peer]


def test_more_peers_than_allowed_are_told_to_come_later(make_door: MakeDoor, path: str) -> None:
    door = make_door(max_peers=2)
    with knock(path, TIMEOUT_S) as one, knock(path, TIMEOUT_S):
        with pytest.raises(ServiceUnavailable, match="2 processes have the arena already"):
            knock(path, TIMEOUT_S)
        peer = door.redeem(one.ticket)
        assert peer is not None
        door.forget(peer)
        with knock(path, TIMEOUT_S):
            pass


def test_clients_that_are_silent_send_garbage_or_hang_up_block_nobody(door: Door, path: str) -> None:
    sockets = []
    for number in range(60):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(door.path)
        try:
            if number % 3 == 0:
                connection.send(os.urandom(60_000))
            elif number % 3 == 1:
                connection.close()
        except OSError:  # it hung up first
            pass
        sockets.append(connection)
    with knock(path, TIMEOUT_S) as opened:
        assert door.redeem(opened.ticket) is not None
    for connection in sockets:
        connection.close()


# -- the path --------------------------------------------------------------------------------------------------


def test_a_stale_socket_is_replaced(path: str, make_door: MakeDoor) -> None:
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stale.bind(f"{path}.door")
    stale.close()
    make_door()
    with knock(path, TIMEOUT_S):
        pass


@pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_STREAM])
def test_a_socket_that_answers_is_not_replaced(path: str, make_door: MakeDoor, kind: socket.SocketKind) -> None:
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(f"{path}.door")
        other.listen()
        with pytest.raises(ConfigError, match="somebody answers at"):
            make_door()
        assert os.path.exists(f"{path}.door")
    os.unlink(f"{path}.door")


def test_a_second_door_at_the_same_path_is_refused_and_the_first_lives_on(
    door: Door, path: str, make_door: MakeDoor
) -> None:
    with pytest.raises(ConfigError, match=rf"another service runs at {path}: stop it"):
        make_door()
    with knock(path, TIMEOUT_S):
        pass


def test_what_is_no_socket_is_left_alone(path: str, make_door: MakeDoor) -> None:
    file = Path(f"{path}.door")
    file.write_text("mine")
    with pytest.raises(ConfigError, match="exists and is no socket: remove it"):
        make_door()
    assert file.read_text() == "mine"
    file.unlink()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/nowhere/at/all/s", "cannot make a socket in '/nowhere/at/all' .*No such file"),
        (f"/tmp/{'x' * 110}", "120 bytes: 107 are possible"),
        ("/dev/null/s", "Not a directory"),
    ],
)
def test_a_path_that_cannot_be_a_socket_is_refused_with_the_reason(path: str, words: str, arena: Arena) -> None:
    before = descriptors()
    with pytest.raises(ConfigError, match=words):
        Door(path, arena.memory_fd, arena.generation_fd, arena.capacity_bytes, BOOT, on_exit=print)
    assert descriptors() <= before


def test_a_closed_door_removes_its_socket_and_nothing_that_took_its_place(door: Door, path: str) -> None:
    os.unlink(door.path)
    Path(door.path).write_text("another's")
    door.close()
    door.close()
    assert Path(door.path).read_text() == "another's"
    os.unlink(door.path)


# -- the client's side -----------------------------------------------------------------------------------------


@contextmanager
def answering(path: str, message: bytes, num_fds: int) -> Iterator[None]:
    """Something at the door's path that sends one message with descriptors to whoever connects."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"{path}.door")
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                socket.send_fds(connection, [message], [0] * num_fds)

        thread = threading.Thread(target=answer)
        thread.start()
        yield
        thread.join()
    os.unlink(f"{path}.door")


def header(*, magic: bytes = door_module.MAGIC, version: int = door_module.VERSION) -> bytes:
    return door_module.HEADER.pack(magic, version, 0, 4096, BOOT, bytes(16))


@pytest.mark.parametrize(
    ("message", "num_fds", "words"),
    [
        (header(magic=b"HTTP/1.1"), 2, r"is no door: it sent b'HTTP/1\.1.*a door begins with b'kvs-door'"),
        (header()[:20], 2, "is no door"),
        (b"x", 0, "is no door"),
        (header(version=7), 2, "speaks version 7, this client 1"),
        (header(), 0, "gave 0 descriptors for 3"),
        (header(), 1, "gave 1 descriptors for 3"),
        (header(), 2, "gave 2 descriptors for 3"),
        (header(), 9, "descriptors for 3"),
    ],
)
def test_what_is_no_door_is_refused_and_its_descriptors_closed(
    path: str, message: bytes, num_fds: int, words: str
) -> None:
    with answering(path, message, num_fds):
        before = descriptors()
        with pytest.raises(ProtocolError, match=words):
            knock(path, TIMEOUT_S)
    assert descriptors() <= before


def test_where_nobody_is_the_client_says_so(path: str) -> None:
    with pytest.raises(ServiceUnavailable, match="no service at .*: start it with kvstore serve"):
        knock(path, TIMEOUT_S)


def test_a_server_that_is_stopped_costs_a_client_its_time_out_and_no_more(path: str) -> None:
    for backlog in (8, 0):  # with room in its queue, and without
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(f"{path}.door")
            listener.listen(backlog)
            waiting = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            if not backlog:
                waiting.connect(f"{path}.door")
            start_s = time.monotonic()
            with pytest.raises(ServiceUnavailable, match=r"no answer at .* within 0\.2 s"):
                knock(path, 0.2)
            assert 0.15 < time.monotonic() - start_s < 5
            waiting.close()
        os.unlink(f"{path}.door")
