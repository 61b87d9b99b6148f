from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Empty(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OpenRequest(_message.Message):
    __slots__ = ("protocol_versions", "format_version", "hash_vector", "ticket", "token", "client_name", "pid", "previous_session")
    PROTOCOL_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    FORMAT_VERSION_FIELD_NUMBER: _ClassVar[int]
    HASH_VECTOR_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    CLIENT_NAME_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_SESSION_FIELD_NUMBER: _ClassVar[int]
    protocol_versions: _containers.RepeatedScalarFieldContainer[int]
    format_version: int
    hash_vector: bytes
    ticket: bytes
    token: str
    client_name: str
    pid: int
    previous_session: bytes
    def __init__(self, protocol_versions: _Optional[_Iterable[int]] = ..., format_version: _Optional[int] = ..., hash_vector: _Optional[bytes] = ..., ticket: _Optional[bytes] = ..., token: _Optional[str] = ..., client_name: _Optional[str] = ..., pid: _Optional[int] = ..., previous_session: _Optional[bytes] = ...) -> None: ...

class OpenReply(_message.Message):
    __slots__ = ("session", "protocol_version", "boot_id", "server_version", "lease_s", "hold_s", "max_message_bytes", "engine_key")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    HOLD_S_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENGINE_KEY_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    protocol_version: int
    boot_id: bytes
    server_version: str
    lease_s: float
    hold_s: float
    max_message_bytes: int
    engine_key: bytes
    def __init__(self, session: _Optional[bytes] = ..., protocol_version: _Optional[int] = ..., boot_id: _Optional[bytes] = ..., server_version: _Optional[str] = ..., lease_s: _Optional[float] = ..., hold_s: _Optional[float] = ..., max_message_bytes: _Optional[int] = ..., engine_key: _Optional[bytes] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("model", "revision", "kv_dtype", "num_layers", "num_kv_heads", "head_dim", "num_kv", "scale_digest", "position", "layout", "block_tokens", "part_layers", "part_heads", "format_version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_FIELD_NUMBER: _ClassVar[int]
    SCALE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PART_LAYERS_FIELD_NUMBER: _ClassVar[int]
    PART_HEADS_FIELD_NUMBER: _ClassVar[int]
    FORMAT_VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    kv_dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_kv: int
    scale_digest: str
    position: str
    layout: str
    block_tokens: int
    part_layers: int
    part_heads: int
    format_version: int
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ..., kv_dtype: _Optional[str] = ..., num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., num_kv: _Optional[int] = ..., scale_digest: _Optional[str] = ..., position: _Optional[str] = ..., layout: _Optional[str] = ..., block_tokens: _Optional[int] = ..., part_layers: _Optional[int] = ..., part_heads: _Optional[int] = ..., format_version: _Optional[int] = ...) -> None: ...

class OpenModelRequest(_message.Message):
    __slots__ = ("session", "model", "digest")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    model: Model
    digest: bytes
    def __init__(self, session: _Optional[bytes] = ..., model: _Optional[_Union[Model, _Mapping]] = ..., digest: _Optional[bytes] = ...) -> None: ...

class OpenModelReply(_message.Message):
    __slots__ = ("model", "part_bytes")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PART_BYTES_FIELD_NUMBER: _ClassVar[int]
    model: int
    part_bytes: bytes
    def __init__(self, model: _Optional[int] = ..., part_bytes: _Optional[bytes] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ("session", "live_leases", "highest_lease", "bye", "ttft_saved_s", "ticket")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    LIVE_LEASES_FIELD_NUMBER: _ClassVar[int]
    HIGHEST_LEASE_FIELD_NUMBER: _ClassVar[int]
    BYE_FIELD_NUMBER: _ClassVar[int]
    TTFT_SAVED_S_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    live_leases: bytes
    highest_lease: int
    bye: bool
    ttft_saved_s: float
    ticket: bytes
    def __init__(self, session: _Optional[bytes] = ..., live_leases: _Optional[bytes] = ..., highest_lease: _Optional[int] = ..., bye: _Optional[bool] = ..., ttft_saved_s: _Optional[float] = ..., ticket: _Optional[bytes] = ...) -> None: ...

class Notice(_message.Message):
    __slots__ = ("draining", "prefaulted", "lane_begun")
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    PREFAULTED_FIELD_NUMBER: _ClassVar[int]
    LANE_BEGUN_FIELD_NUMBER: _ClassVar[int]
    draining: bool
    prefaulted: bool
    lane_begun: bool
    def __init__(self, draining: _Optional[bool] = ..., prefaulted: _Optional[bool] = ..., lane_begun: _Optional[bool] = ...) -> None: ...

class Ended(_message.Message):
    __slots__ = ("loads", "saves", "requests", "announced")
    LOADS_FIELD_NUMBER: _ClassVar[int]
    SAVES_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCED_FIELD_NUMBER: _ClassVar[int]
    loads: bytes
    saves: bytes
    requests: _containers.RepeatedScalarFieldContainer[str]
    announced: _containers.RepeatedCompositeFieldContainer[Announced]
    def __init__(self, loads: _Optional[bytes] = ..., saves: _Optional[bytes] = ..., requests: _Optional[_Iterable[str]] = ..., announced: _Optional[_Iterable[_Union[Announced, _Mapping]]] = ...) -> None: ...

class Announced(_message.Message):
    __slots__ = ("chain", "start", "stop", "number")
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    chain: int
    start: int
    stop: int
    number: int
    def __init__(self, chain: _Optional[int] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ..., number: _Optional[int] = ...) -> None: ...

class ChainDelta(_message.Message):
    __slots__ = ("chain", "num_known", "ids", "root", "known_tail")
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    NUM_KNOWN_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    KNOWN_TAIL_FIELD_NUMBER: _ClassVar[int]
    chain: int
    num_known: int
    ids: bytes
    root: Root
    known_tail: bytes
    def __init__(self, chain: _Optional[int] = ..., num_known: _Optional[int] = ..., ids: _Optional[bytes] = ..., root: _Optional[_Union[Root, _Mapping]] = ..., known_tail: _Optional[bytes] = ...) -> None: ...

class Root(_message.Message):
    __slots__ = ("model", "adapter", "salt", "id")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    model: int
    adapter: bytes
    salt: bytes
    id: bytes
    def __init__(self, model: _Optional[int] = ..., adapter: _Optional[bytes] = ..., salt: _Optional[bytes] = ..., id: _Optional[bytes] = ...) -> None: ...

class Contents(_message.Message):
    __slots__ = ("start", "tokens", "extras")
    START_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXTRAS_FIELD_NUMBER: _ClassVar[int]
    start: int
    tokens: bytes
    extras: _containers.RepeatedCompositeFieldContainer[Extra]
    def __init__(self, start: _Optional[int] = ..., tokens: _Optional[bytes] = ..., extras: _Optional[_Iterable[_Union[Extra, _Mapping]]] = ...) -> None: ...

class Extra(_message.Message):
    __slots__ = ("index", "extra")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    EXTRA_FIELD_NUMBER: _ClassVar[int]
    index: int
    extra: bytes
    def __init__(self, index: _Optional[int] = ..., extra: _Optional[bytes] = ...) -> None: ...

class Hint(_message.Message):
    __slots__ = ("conversation", "turn", "prompt_tokens", "new_blocks", "priority", "ttl_s", "closed", "retention")
    CONVERSATION_FIELD_NUMBER: _ClassVar[int]
    TURN_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEW_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    RETENTION_FIELD_NUMBER: _ClassVar[int]
    conversation: str
    turn: int
    prompt_tokens: int
    new_blocks: int
    priority: int
    ttl_s: float
    closed: bool
    retention: _containers.RepeatedCompositeFieldContainer[Retention]
    def __init__(self, conversation: _Optional[str] = ..., turn: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., new_blocks: _Optional[int] = ..., priority: _Optional[int] = ..., ttl_s: _Optional[float] = ..., closed: _Optional[bool] = ..., retention: _Optional[_Iterable[_Union[Retention, _Mapping]]] = ...) -> None: ...

class Retention(_message.Message):
    __slots__ = ("start", "stop", "priority", "duration_s")
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    start: int
    stop: int
    priority: int
    duration_s: float
    def __init__(self, start: _Optional[int] = ..., stop: _Optional[int] = ..., priority: _Optional[int] = ..., duration_s: _Optional[float] = ...) -> None: ...

class MatchRequest(_message.Message):
    __slots__ = ("session", "request", "chain", "hint", "parts", "wait_ms", "host_only", "soon", "first_tokens", "ended")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    HOST_ONLY_FIELD_NUMBER: _ClassVar[int]
    SOON_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    request: str
    chain: ChainDelta
    hint: Hint
    parts: bytes
    wait_ms: int
    host_only: bool
    soon: bool
    first_tokens: bytes
    ended: Ended
    def __init__(self, session: _Optional[bytes] = ..., request: _Optional[str] = ..., chain: _Optional[_Union[ChainDelta, _Mapping]] = ..., hint: _Optional[_Union[Hint, _Mapping]] = ..., parts: _Optional[bytes] = ..., wait_ms: _Optional[int] = ..., host_only: _Optional[bool] = ..., soon: _Optional[bool] = ..., first_tokens: _Optional[bytes] = ..., ended: _Optional[_Union[Ended, _Mapping]] = ...) -> None: ...

class MatchReply(_message.Message):
    __slots__ = ("num_blocks", "num_host_blocks", "num_pending_blocks", "settled", "tiers", "num_partial_tokens")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_PENDING_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    NUM_PARTIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    num_host_blocks: int
    num_pending_blocks: int
    settled: bool
    tiers: _containers.RepeatedCompositeFieldContainer[TierRun]
    num_partial_tokens: int
    def __init__(self, num_blocks: _Optional[int] = ..., num_host_blocks: _Optional[int] = ..., num_pending_blocks: _Optional[int] = ..., settled: _Optional[bool] = ..., tiers: _Optional[_Iterable[_Union[TierRun, _Mapping]]] = ..., num_partial_tokens: _Optional[int] = ...) -> None: ...

class TierRun(_message.Message):
    __slots__ = ("tier", "num_blocks")
    TIER_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    tier: str
    num_blocks: int
    def __init__(self, tier: _Optional[str] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class MatchPartialRequest(_message.Message):
    __slots__ = ("session", "request", "num_host_blocks", "tokens", "ended")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    NUM_HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    request: str
    num_host_blocks: int
    tokens: bytes
    ended: Ended
    def __init__(self, session: _Optional[bytes] = ..., request: _Optional[str] = ..., num_host_blocks: _Optional[int] = ..., tokens: _Optional[bytes] = ..., ended: _Optional[_Union[Ended, _Mapping]] = ...) -> None: ...

class MatchPartialReply(_message.Message):
    __slots__ = ("num_tokens",)
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_tokens: int
    def __init__(self, num_tokens: _Optional[int] = ...) -> None: ...

class AnnounceRequest(_message.Message):
    __slots__ = ("session", "chain", "start", "stop", "withdraw", "number", "ended")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    WITHDRAW_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    chain: ChainDelta
    start: int
    stop: int
    withdraw: bool
    number: int
    ended: Ended
    def __init__(self, session: _Optional[bytes] = ..., chain: _Optional[_Union[ChainDelta, _Mapping]] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ..., withdraw: _Optional[bool] = ..., number: _Optional[int] = ..., ended: _Optional[_Union[Ended, _Mapping]] = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("session", "request", "num_blocks", "start", "contents", "lease", "partial_tokens", "ended")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    CONTENTS_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    request: str
    num_blocks: int
    start: int
    contents: Contents
    lease: int
    partial_tokens: int
    ended: Ended
    def __init__(self, session: _Optional[bytes] = ..., request: _Optional[str] = ..., num_blocks: _Optional[int] = ..., start: _Optional[int] = ..., contents: _Optional[_Union[Contents, _Mapping]] = ..., lease: _Optional[int] = ..., partial_tokens: _Optional[int] = ..., ended: _Optional[_Union[Ended, _Mapping]] = ...) -> None: ...

class LoadReply(_message.Message):
    __slots__ = ("num_blocks", "windowed", "first", "offsets", "generations", "tiers")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    WINDOWED_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    windowed: bool
    first: int
    offsets: bytes
    generations: bytes
    tiers: _containers.RepeatedCompositeFieldContainer[TierRun]
    def __init__(self, num_blocks: _Optional[int] = ..., windowed: _Optional[bool] = ..., first: _Optional[int] = ..., offsets: _Optional[bytes] = ..., generations: _Optional[bytes] = ..., tiers: _Optional[_Iterable[_Union[TierRun, _Mapping]]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("session", "ended", "window_of", "passed")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    WINDOW_OF_FIELD_NUMBER: _ClassVar[int]
    PASSED_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    ended: Ended
    window_of: int
    passed: int
    def __init__(self, session: _Optional[bytes] = ..., ended: _Optional[_Union[Ended, _Mapping]] = ..., window_of: _Optional[int] = ..., passed: _Optional[int] = ...) -> None: ...

class SaveRequest(_message.Message):
    __slots__ = ("session", "chain", "start", "stop", "contents", "parts", "hint", "lease", "ended")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    CONTENTS_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    chain: ChainDelta
    start: int
    stop: int
    contents: Contents
    parts: bytes
    hint: Hint
    lease: int
    ended: Ended
    def __init__(self, session: _Optional[bytes] = ..., chain: _Optional[_Union[ChainDelta, _Mapping]] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ..., contents: _Optional[_Union[Contents, _Mapping]] = ..., parts: _Optional[bytes] = ..., hint: _Optional[_Union[Hint, _Mapping]] = ..., lease: _Optional[int] = ..., ended: _Optional[_Union[Ended, _Mapping]] = ...) -> None: ...

class SaveReply(_message.Message):
    __slots__ = ("indices", "offsets", "num_refused")
    INDICES_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    NUM_REFUSED_FIELD_NUMBER: _ClassVar[int]
    indices: bytes
    offsets: bytes
    num_refused: int
    def __init__(self, indices: _Optional[bytes] = ..., offsets: _Optional[bytes] = ..., num_refused: _Optional[int] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("session", "lease", "indices", "ended")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    lease: int
    indices: bytes
    ended: Ended
    def __init__(self, session: _Optional[bytes] = ..., lease: _Optional[int] = ..., indices: _Optional[bytes] = ..., ended: _Optional[_Union[Ended, _Mapping]] = ...) -> None: ...

class CommitReply(_message.Message):
    __slots__ = ("published",)
    PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    published: bytes
    def __init__(self, published: _Optional[bytes] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("session", "engine_key", "lease", "leave")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ENGINE_KEY_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    engine_key: bytes
    lease: int
    leave: bool
    def __init__(self, session: _Optional[bytes] = ..., engine_key: _Optional[bytes] = ..., lease: _Optional[int] = ..., leave: _Optional[bool] = ...) -> None: ...

class TouchRequest(_message.Message):
    __slots__ = ("session", "chain", "num_blocks", "hint", "ended")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    chain: ChainDelta
    num_blocks: int
    hint: Hint
    ended: Ended
    def __init__(self, session: _Optional[bytes] = ..., chain: _Optional[_Union[ChainDelta, _Mapping]] = ..., num_blocks: _Optional[int] = ..., hint: _Optional[_Union[Hint, _Mapping]] = ..., ended: _Optional[_Union[Ended, _Mapping]] = ...) -> None: ...

class SharedLoad(_message.Message):
    __slots__ = ("boot_id", "part_bytes", "blocks")
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    PART_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    boot_id: bytes
    part_bytes: bytes
    blocks: LoadReply
    def __init__(self, boot_id: _Optional[bytes] = ..., part_bytes: _Optional[bytes] = ..., blocks: _Optional[_Union[LoadReply, _Mapping]] = ...) -> None: ...

class SharedSave(_message.Message):
    __slots__ = ("boot_id", "part_bytes", "engine_key", "lease", "blocks")
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    PART_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENGINE_KEY_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    boot_id: bytes
    part_bytes: bytes
    engine_key: bytes
    lease: int
    blocks: SaveReply
    def __init__(self, boot_id: _Optional[bytes] = ..., part_bytes: _Optional[bytes] = ..., engine_key: _Optional[bytes] = ..., lease: _Optional[int] = ..., blocks: _Optional[_Union[SaveReply, _Mapping]] = ...) -> None: ...

class ReadReply(_message.Message):
    __slots__ = ("num_blocks", "index", "part", "offset", "tier", "checksums", "metas", "data")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    METAS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    index: int
    part: int
    offset: int
    tier: str
    checksums: bytes
    metas: _containers.RepeatedCompositeFieldContainer[Meta]
    data: bytes
    def __init__(self, num_blocks: _Optional[int] = ..., index: _Optional[int] = ..., part: _Optional[int] = ..., offset: _Optional[int] = ..., tier: _Optional[str] = ..., checksums: _Optional[bytes] = ..., metas: _Optional[_Iterable[_Union[Meta, _Mapping]]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Meta(_message.Message):
    __slots__ = ("parent", "depth", "tokens", "extra")
    PARENT_FIELD_NUMBER: _ClassVar[int]
    DEPTH_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXTRA_FIELD_NUMBER: _ClassVar[int]
    parent: bytes
    depth: int
    tokens: bytes
    extra: bytes
    def __init__(self, parent: _Optional[bytes] = ..., depth: _Optional[int] = ..., tokens: _Optional[bytes] = ..., extra: _Optional[bytes] = ...) -> None: ...

class WriteRequest(_message.Message):
    __slots__ = ("session", "lease", "index", "part", "offset", "checksums", "data")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    lease: int
    index: int
    part: int
    offset: int
    checksums: bytes
    data: bytes
    def __init__(self, session: _Optional[bytes] = ..., lease: _Optional[int] = ..., index: _Optional[int] = ..., part: _Optional[int] = ..., offset: _Optional[int] = ..., checksums: _Optional[bytes] = ..., data: _Optional[bytes] = ...) -> None: ...

class WriteReply(_message.Message):
    __slots__ = ("published",)
    PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    published: bytes
    def __init__(self, published: _Optional[bytes] = ...) -> None: ...

class PeekRequest(_message.Message):
    __slots__ = ("session", "root", "ids", "parts", "used")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    root: bytes
    ids: bytes
    parts: bytes
    used: bool
    def __init__(self, session: _Optional[bytes] = ..., root: _Optional[bytes] = ..., ids: _Optional[bytes] = ..., parts: _Optional[bytes] = ..., used: _Optional[bool] = ...) -> None: ...

class PeekReply(_message.Message):
    __slots__ = ("present",)
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    present: bytes
    def __init__(self, present: _Optional[bytes] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("session", "snapshot", "without_tokens", "after_sequence", "boot_id")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    AFTER_SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    snapshot: bool
    without_tokens: bool
    after_sequence: int
    boot_id: bytes
    def __init__(self, session: _Optional[bytes] = ..., snapshot: _Optional[bool] = ..., without_tokens: _Optional[bool] = ..., after_sequence: _Optional[int] = ..., boot_id: _Optional[bytes] = ...) -> None: ...

class WatchReply(_message.Message):
    __slots__ = ("sequence", "events", "gap", "snapshot_done", "boot_id")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    GAP_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_DONE_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    events: _containers.RepeatedCompositeFieldContainer[BlockEvent]
    gap: bool
    snapshot_done: bool
    boot_id: bytes
    def __init__(self, sequence: _Optional[int] = ..., events: _Optional[_Iterable[_Union[BlockEvent, _Mapping]]] = ..., gap: _Optional[bool] = ..., snapshot_done: _Optional[bool] = ..., boot_id: _Optional[bytes] = ...) -> None: ...

class BlockEvent(_message.Message):
    __slots__ = ("kind", "tier", "root", "ids", "parent", "depth", "tokens")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STORED: _ClassVar[BlockEvent.Kind]
        REMOVED: _ClassVar[BlockEvent.Kind]
        CLEARED: _ClassVar[BlockEvent.Kind]
    STORED: BlockEvent.Kind
    REMOVED: BlockEvent.Kind
    CLEARED: BlockEvent.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    DEPTH_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    kind: BlockEvent.Kind
    tier: str
    root: bytes
    ids: bytes
    parent: bytes
    depth: int
    tokens: bytes
    def __init__(self, kind: _Optional[_Union[BlockEvent.Kind, str]] = ..., tier: _Optional[str] = ..., root: _Optional[bytes] = ..., ids: _Optional[bytes] = ..., parent: _Optional[bytes] = ..., depth: _Optional[int] = ..., tokens: _Optional[bytes] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ("session", "ended")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    ended: Ended
    def __init__(self, session: _Optional[bytes] = ..., ended: _Optional[_Union[Ended, _Mapping]] = ...) -> None: ...

class StatsReply(_message.Message):
    __slots__ = ("values", "settings", "clients", "models")
    class ValuesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VALUES_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    values: _containers.ScalarMap[str, float]
    settings: _containers.RepeatedCompositeFieldContainer[Setting]
    clients: _containers.RepeatedCompositeFieldContainer[Client]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    def __init__(self, values: _Optional[_Mapping[str, float]] = ..., settings: _Optional[_Iterable[_Union[Setting, _Mapping]]] = ..., clients: _Optional[_Iterable[_Union[Client, _Mapping]]] = ..., models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ...) -> None: ...

class Setting(_message.Message):
    __slots__ = ("key", "value", "source")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    key: str
    value: str
    source: str
    def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ..., source: _Optional[str] = ...) -> None: ...

class Client(_message.Message):
    __slots__ = ("name", "pid", "mapped", "age_s", "num_leases")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    MAPPED_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    NUM_LEASES_FIELD_NUMBER: _ClassVar[int]
    name: str
    pid: int
    mapped: bool
    age_s: float
    num_leases: int
    def __init__(self, name: _Optional[str] = ..., pid: _Optional[int] = ..., mapped: _Optional[bool] = ..., age_s: _Optional[float] = ..., num_leases: _Optional[int] = ...) -> None: ...

class InspectRequest(_message.Message):
    __slots__ = ("session", "ids", "chain")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    ids: bytes
    chain: ChainDelta
    def __init__(self, session: _Optional[bytes] = ..., ids: _Optional[bytes] = ..., chain: _Optional[_Union[ChainDelta, _Mapping]] = ...) -> None: ...

class InspectReply(_message.Message):
    __slots__ = ("blocks", "num_left_out")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[BlockInfo]
    num_left_out: int
    def __init__(self, blocks: _Optional[_Iterable[_Union[BlockInfo, _Mapping]]] = ..., num_left_out: _Optional[int] = ...) -> None: ...

class BlockInfo(_message.Message):
    __slots__ = ("id", "resident", "root", "parent", "depth", "ready_parts", "num_pins", "num_children", "tiers", "tokens")
    ID_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    DEPTH_FIELD_NUMBER: _ClassVar[int]
    READY_PARTS_FIELD_NUMBER: _ClassVar[int]
    NUM_PINS_FIELD_NUMBER: _ClassVar[int]
    NUM_CHILDREN_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    id: bytes
    resident: bool
    root: bytes
    parent: bytes
    depth: int
    ready_parts: int
    num_pins: int
    num_children: int
    tiers: _containers.RepeatedScalarFieldContainer[str]
    tokens: bytes
    def __init__(self, id: _Optional[bytes] = ..., resident: _Optional[bool] = ..., root: _Optional[bytes] = ..., parent: _Optional[bytes] = ..., depth: _Optional[int] = ..., ready_parts: _Optional[int] = ..., num_pins: _Optional[int] = ..., num_children: _Optional[int] = ..., tiers: _Optional[_Iterable[str]] = ..., tokens: _Optional[bytes] = ...) -> None: ...

class ClearRequest(_message.Message):
    __slots__ = ("session", "root", "ended")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    root: bytes
    ended: Ended
    def __init__(self, session: _Optional[bytes] = ..., root: _Optional[bytes] = ..., ended: _Optional[_Union[Ended, _Mapping]] = ...) -> None: ...

class ClearReply(_message.Message):
    __slots__ = ("num_blocks",)
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    def __init__(self, num_blocks: _Optional[int] = ...) -> None: ...

class WarmRequest(_message.Message):
    __slots__ = ("session", "chain", "contents")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    CONTENTS_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    chain: ChainDelta
    contents: Contents
    def __init__(self, session: _Optional[bytes] = ..., chain: _Optional[_Union[ChainDelta, _Mapping]] = ..., contents: _Optional[_Union[Contents, _Mapping]] = ...) -> None: ...

class WarmReply(_message.Message):
    __slots__ = ("num_host_blocks", "num_promoted")
    NUM_HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMOTED_FIELD_NUMBER: _ClassVar[int]
    num_host_blocks: int
    num_promoted: int
    def __init__(self, num_host_blocks: _Optional[int] = ..., num_promoted: _Optional[int] = ...) -> None: ...

class CheckRequest(_message.Message):
    __slots__ = ("session", "ended")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    ended: Ended
    def __init__(self, session: _Optional[bytes] = ..., ended: _Optional[_Union[Ended, _Mapping]] = ...) -> None: ...

class CheckReply(_message.Message):
    __slots__ = ("faults",)
    FAULTS_FIELD_NUMBER: _ClassVar[int]
    faults: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, faults: _Optional[_Iterable[str]] = ...) -> None: ...
