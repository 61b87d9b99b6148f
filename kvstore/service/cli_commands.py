# SPDX-License-Identifier: Apache-2.0
"""The subcommands of `kvstore`, except what `serve` does when it runs (`cli_serve`).

A command prints for people, or with `--json` for scripts, and raises kvstore's errors for the rest.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from kvstore.errors import ConfigError, ServiceUnavailable, TierError
from kvstore.service import cli_serve, doctor, kv_events, top
from kvstore.service.admin import Admin, Target
from kvstore.service.cli_tables import (
    WIDE,
    block_row,
    blocks_table,
    event_line,
    events,
    models_table,
    setting_value,
    settings_table,
    where_of,
)
from kvstore.service.findings import Finding, Verdict
from kvstore.service.follow import follow
from kvstore.service.handshake import model_of
from kvstore.service.prompt import Namespace, as_hash, read_model, read_prompt
from kvstore.service.rights import read_secret_file
from kvstore.wire import kvstore_pb2 as pb

app = typer.Typer(
    name="kvstore",
    help="Keeps the KV cache of prompt prefixes for LLM engines, on this host and in a shared Redis or Valkey.\n\n"
    "Start one server on each host:\n\n"
    "kvstore serve --host-capacity 32GiB --redis-url redis://cache:6379\n\n"
    "See whether all is well:  kvstore doctor\n\n"
    "Watch it work:            kvstore top",
    epilog="Which server: --address, else KVSTORE_ADDRESS, else this user's own. "
    "For TCP: KVSTORE_TOKEN, KVSTORE_TLS_CA, KVSTORE_TLS_CERT, KVSTORE_TLS_KEY.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Address = Annotated[str, typer.Option("--address", "-a", help="Server: unix:PATH or host:port. (KVSTORE_ADDRESS)")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Config = Annotated[Path | None, typer.Option("--config", "-c", help="TOML file with the settings.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, such as mover.write=through.")
]
HostCapacity = Annotated[str, typer.Option(metavar="SIZE", help="Host memory, such as 32GiB. (host.capacity_bytes)")]
RedisUrl = Annotated[
    str, typer.Option(help="Shared Redis or Valkey; also redis+cluster://, redis+sentinel://. (tiers.redis.url)")
]
RedisPolicy = Annotated[
    str, typer.Option(metavar="NAME", help="Who goes first in Redis: lru, priority or returns. (tiers.redis.policy)")
]
TieringMode = Annotated[
    str, typer.Option("--tiering", metavar="NAME", help="inclusive, or exclusive: down at eviction. (mover.tiering)")
]
Listen = Annotated[str, typer.Option(help="unix:PATH, or host:port. (service.listen)")]
Model = Annotated[
    str,
    typer.Option("--model", metavar="FILE", help="JSON or TOML with the fields of ModelId; else the one that is open."),
]
Tokenizer = Annotated[str, typer.Option("--tokenizer", help="For text: a name or path, as transformers takes it.")]
Chat = Annotated[
    bool, typer.Option("--chat", help="Text, or a JSON list of messages, goes through the tokenizer's chat template.")
]
Salt = Annotated[str, typer.Option("--salt", help="Tenant salt, as text or hex:….")]
Adapter = Annotated[str, typer.Option("--adapter", help="Content digest of a LoRA adapter, in hex.")]
Secret = Annotated[str, typer.Option("--secret-file", help="The cluster's secret, where it has one.")]


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _console() -> Console:
    # A pipe has no width: never cut a line that a script reads.
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"kvstore {version('kvstore')}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


# ---- the server ----


@app.command()
def serve(
    config: Config = None,
    listen: Listen = "",
    host_capacity: HostCapacity = "",
    redis_url: RedisUrl = "",
    redis_policy: RedisPolicy = "",
    tiering: TieringMode = "",
    settings: Set = None,
) -> None:
    """Run the server on this host until it is told to stop.

    Settings come from --config, then the environment
    (KVSTORE_HOST__CAPACITY_BYTES=32GiB), then flags. The settings in effect are
    printed, each with its source, and then one line that begins with "ready:".

    SIGTERM lets clients finish for service.drain_s seconds, a second one stops
    at once; SIGHUP reads tokens again. With --tiering exclusive what the host
    alone holds goes to Redis in that time.

    Example:  kvstore serve --host-capacity 32GiB --redis-url redis://cache:6379
    """
    named = _named(listen, host_capacity, redis_url, redis_policy, tiering)
    raise typer.Exit(cli_serve.serve(cli_serve.read_config(config, named, settings or [])))


def _named(listen: str, host_capacity: str, redis_url: str, redis_policy: str, tiering: str) -> dict[str, str]:
    """Settings that have flags, by key."""
    return {
        "service.listen": listen,
        "host.capacity_bytes": host_capacity,
        "tiers.redis.url": redis_url,
        "tiers.redis.policy": redis_policy,
        "mover.tiering": tiering,
    }


@app.command(name="doctor")
def examine(
    config: Config = None,
    listen: Listen = "",
    host_capacity: HostCapacity = "",
    redis_url: RedisUrl = "",
    redis_policy: RedisPolicy = "",
    tiering: TieringMode = "",
    settings: Set = None,
    address: Address = "",
    as_json: Json = False,
) -> None:
    """Check this host, the server and Redis; each line is ok, or a problem and its fix.

    Give it the flags that the server has. Exits with 1 where there is a
    problem.

    Example:  kvstore doctor --config /etc/kvstore/kvstore.toml
    """
    named = _named(listen, host_capacity, redis_url, redis_policy, tiering)
    read = cli_serve.read_config(config, named, settings or [])
    listed = read.service.listen if "service.listen" in read.sources else ""
    target = Target.of(address, default=listed)
    findings: list[Finding] = []
    console = _console()
    named_one = bool(address or os.environ.get("KVSTORE_ADDRESS", ""))
    for finding in doctor.examine(read, target, expected=named_one):
        findings.append(finding)
        if not as_json:
            console.print(_finding_line(finding), soft_wrap=True)
    problems = sum(finding.verdict is Verdict.PROBLEM for finding in findings)
    if as_json:
        rows = [{"name": f.name, "verdict": f.verdict.value, "detail": f.detail, "fix": f.fix} for f in findings]
        _print_json({"address": target.address, "problems": problems, "findings": rows})
    else:
        console.print(f"{problems} problem{'s' * (problems != 1)}" if problems else "all is well")
    raise typer.Exit(1 if problems else 0)


def _finding_line(finding: Finding) -> Text:
    color = {Verdict.OK: "green", Verdict.PROBLEM: "bold red", Verdict.NOTE: "yellow"}
    line = Text.assemble(
        (f"{finding.verdict.value:8}", color[finding.verdict]), (f"{finding.name}: ", "bold"), finding.detail
    )
    if finding.fix:
        line.append(f"\n{'':8}fix: {finding.fix}", "cyan")
    return line


# ---- looking in ----


@app.command()
def status(
    address: Address = "",
    settings: Annotated[bool, typer.Option("--settings", help="Every setting in effect, and its source.")] = False,
    as_json: Json = False,
) -> None:
    """Show what the server holds, whom it serves, and how it is set.

    Exits with 0 as long as the server answers, whatever its tiers do: for those
    there is kvstore doctor.

    Example:  kvstore status --json | jq '.values["host.used_bytes"]'
    """
    with Admin(Target.of(address)) as admin:
        reply = admin.stats()
        server = top.server_of(admin)
        sample = top.look(admin)
    if as_json:
        _print_json(_status_of(server, reply))
        return
    console = _console()
    console.print(top.draw(server, sample, None))
    if reply.models:
        console.print()
        console.print(models_table(map(model_of, reply.models)))
    changed = [row for row in reply.settings if settings or row.source != "default"]
    if changed:
        console.print()
        console.print(settings_table((row.key, setting_value(row.key, row.value), row.source) for row in changed))


def _status_of(server: top.Server, reply: pb.StatsReply) -> dict[str, object]:
    return {
        "address": server.address,
        "version": server.version,
        "boot_id": server.boot_id,
        "values": dict(sorted(reply.values.items())),
        "settings": {row.key: {"value": row.value, "source": row.source} for row in reply.settings},
        "clients": [
            {
                "name": client.name,
                "pid": client.pid,
                "mapped": client.mapped,
                "age_s": client.age_s,
                "leases": client.num_leases,
            }
            for client in reply.clients
        ],
        "models": [asdict(model_of(model)) for model in reply.models],
    }


@app.command(name="top")
def show_top(
    address: Address = "",
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    every: Annotated[float, typer.Option(min=0.1, max=60, metavar="SECONDS", help="Time between frames.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Watch the server work: occupancy, hit rates, GB/s, leases, clients. Press q to end.

    Example:  kvstore top --every 0.5

    With --json it prints a line an interval:

    kvstore top --json | jq '.per_second["match.requests"]'
    """
    with Admin(Target.of(address), name="kvstore top") as admin, admin.kept():
        if as_json:
            for line in top.follow(admin, once=once, every_s=every):
                print(json.dumps(line), flush=True)
            return
        top.run(admin, once=once, every_s=every)


@app.command()
def inspect(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT|HASH", help="Hash in hex, token ids as JSON, text, or a file of these.")
    ],
    model: Model = "",
    tokenizer: Tokenizer = "",
    chat: Chat = False,
    salt: Salt = "",
    adapter: Adapter = "",
    secret_file: Secret = "",
    address: Address = "",
    as_json: Json = False,
) -> None:
    """Show which blocks of a prompt are there, where, and what holds them.

    An engine's chat endpoint wraps what it is sent in the model's chat
    template: --chat does so here.

    Example:  kvstore inspect prompt.txt --tokenizer Qwen/Qwen3-8B --chat

    Where engines have opened several models, and not one alone has some of the
    prompt, or none since the server started, --model FILE says which is meant.
    This gets the file of one that is open, from this server or one like it:

    kvstore status --json | jq '.models[0]' > model.json

    It looks like {"model": "Qwen/Qwen3-8B", "revision": "main", "kv_dtype":
    "bfloat16", "num_layers": 36, "num_kv_heads": 8, "head_dim": 128}, with more
    fields that have defaults; all of them count.
    """
    block = as_hash(prompt)
    namespace = _namespace(model, salt, adapter, secret_file)
    with Admin(Target.of(address)) as admin:
        if block is not None:
            blocks = admin.inspect(block)
        else:
            known = admin.models()  # before: asking opens the one that is named
            blocks = _along(admin, replace(namespace, open_models=known), prompt, tokenizer, chat=chat)
            if namespace.model and read_model(namespace.model) not in known and not any(map(where_of, blocks)):
                _say("no engine has opened this very model here: compare with .models of `kvstore status --json`")
        _say_away(admin)
    if as_json:
        _print_json([block_row(info) for info in blocks])
        return
    console = _console()
    console.print(blocks_table(blocks, along=block is None, whole_ids=console.width >= WIDE))


def _along(admin: Admin, namespace: Namespace, prompt: str, tokenizer: str, *, chat: bool) -> list[pb.BlockInfo]:
    """What is known of a prompt's blocks. Of several open models the one that has some of them, if it is one alone."""
    models = namespace.open_models
    if not namespace.model and len(models) > 1:
        each = [replace(namespace, open_models=(model,)) for model in models]
        chains = [read_prompt(prompt, one, tokenizer, chat=chat) for one in each]
        found = [blocks for blocks in map(admin.inspect_chain, chains) if any(map(where_of, blocks))]
        if len(found) == 1:
            return found[0]
    return admin.inspect_chain(read_prompt(prompt, namespace, tokenizer, chat=chat))


def _namespace(model: str, salt: str, adapter: str, secret_file: str) -> Namespace:
    try:
        salt_bytes = bytes.fromhex(salt[4:]) if salt.startswith("hex:") else salt.encode()
        adapter_bytes = bytes.fromhex(adapter)
    except ValueError:
        raise ConfigError("--adapter, and --salt after hex:, take hex digits") from None
    return Namespace(model=model, salt=salt_bytes, adapter=adapter_bytes, secret=read_secret_file(secret_file))


def _with_open(namespace: Namespace, admin: Admin) -> Namespace:
    """With the models that the server has open, where none was named."""
    return namespace if namespace.model else replace(namespace, open_models=admin.models())


def _say_away(admin: Admin) -> None:
    """That what lies in a tier is not seen now, where that is so."""
    for tier in top.tiers_away(admin.stats().values):
        _say(f"{tier} does not answer: what lies there is not counted (`kvstore doctor` says why)")


@app.command()
def watch(
    address: Address = "",
    snapshot: Annotated[bool, typer.Option("--snapshot", help="Begin with what is there.")] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="With the token ids.")] = False,
    as_json: Json = False,
    zmq: Annotated[
        str, typer.Option(metavar="ENDPOINT", help="Print nothing: publish as vLLM does, on tcp://*:5557 for example.")
    ] = "",
    topic: Annotated[str, typer.Option(help="Of what is published.")] = "kv-events",
) -> None:
    """Print blocks as they come and go, until Ctrl-C; or publish them in the format of vLLM's KV events.

    A server that goes away is waited for. A line of the kind "gap" says that
    events were missed, through a restart for example: what was printed before
    it says nothing any more. With --snapshot what is there follows anew.

    A line is one event in 80 columns, ids by their beginning; --json has all of
    it, and is what scripts should read.

    Example:  kvstore watch --json | jq -r .kind
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Admin(Target.of(address), name="kvstore watch") as admin:
        if zmq:
            kv_events.publish(zmq, topic, lambda: follow(admin, snapshot=True, with_tokens=True, say=_say))
            return
        if sys.stderr.isatty():
            _say(f"events of {admin.target.address} as they come, until Ctrl-C")
        for reply in follow(admin, snapshot=snapshot, with_tokens=tokens, say=_say):
            for event in events(reply):
                print(json.dumps(event) if as_json else event_line(event), flush=True)


def _say(sentence: str) -> None:
    print(f"kvstore: {sentence}", file=sys.stderr, flush=True)


# ---- care ----


@app.command()
def clear(
    root: Annotated[str, typer.Option(metavar="HEX", help="One namespace, by the root's id; else everything.")] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    address: Address = "",
    as_json: Json = False,
) -> None:
    """Remove blocks from every tier of this server, the shared ones included: those of one namespace, or all of them.

    Other hosts keep what lies in their own memory, and write it down again when
    it is next used there.

    Example:  kvstore clear --root 1f0c… --yes
    """
    root_id = as_hash(root)
    if root and root_id is None:
        raise ConfigError(f"--root is {root!r}: give the 64 hex digits of a root, as inspect --json prints them")
    with Admin(Target.of(address)) as admin:
        if not yes:
            what = f"the blocks under {root}" if root else "every block, in every tier, the shared ones included"
            if not sys.stdin.isatty():
                raise ConfigError(f"this removes {what}: say --yes")
            typer.confirm(f"Remove {what}?", abort=True, err=True)
        try:
            num_blocks = admin.clear(root_id or b"")
        except TierError as error:
            raise ServiceUnavailable(
                f"the server's memory was cleared, but not all below it ({error}): what is left there will be found "
                "again, so repeat this once `kvstore status` shows the tier as ok"
            ) from error
    if as_json:
        _print_json({"blocks": num_blocks})
    else:
        print(f"{num_blocks:,} blocks left the host; lower tiers were told")


@app.command()
def warm(
    prompt: Annotated[str, typer.Argument(help="Token ids as JSON, a file, or text.")],
    model: Model = "",
    tokenizer: Tokenizer = "",
    chat: Chat = False,
    salt: Salt = "",
    adapter: Adapter = "",
    secret_file: Secret = "",
    address: Address = "",
    timeout: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="How long it may take.")] = 30.0,
    as_json: Json = False,
) -> None:
    """Bring a prompt's blocks from lower tiers into host memory, ahead of the requests that need them.

    Example:  kvstore warm system-prompt.txt --tokenizer Qwen/Qwen3-8B
    """
    namespace = _namespace(model, salt, adapter, secret_file)
    with Admin(Target.of(address)) as admin:
        chain = read_prompt(prompt, _with_open(namespace, admin), tokenizer, chat=chat)
        reply = admin.warm(chain, timeout)
        _say_away(admin)
    if as_json:
        _print_json({"blocks": len(chain), "host_blocks": reply.num_host_blocks, "promoted": reply.num_promoted})
    else:
        print(f"{reply.num_host_blocks} of {len(chain)} blocks are in the host, {reply.num_promoted} of them new")
