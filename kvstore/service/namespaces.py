# SPDX-License-Identifier: Apache-2.0
"""The models and roots that a session may use.

Invariants
1. Rights are checked with the root, before anything is looked up under it.
2. What a client makes by naming it is bounded: models of a session and in all, roots of a session and of a tenant.
"""

from __future__ import annotations

import numpy as np

from kvstore.block import Root
from kvstore.errors import AccessDenied, CapacityError, ConfigError, ProtocolError
from kvstore.service.handshake import model_of
from kvstore.service.roots import RootBook
from kvstore.service.session import Session
from kvstore.store import KVStore
from kvstore.wire import kvstore_pb2 as pb

_MAX_ADAPTER_BYTES = 256
_MAX_SALT_BYTES = 1_024
_MAX_MODELS = 64
_MAX_MODELS_OF_ALL = 4_096
_MAX_ROOTS = 16_384


class Namespaces:
    """Opens models, and checks roots. Thread-safe.

    Attributes:
        roots: those that clients have shown.
    """

    def __init__(self, store: KVStore, secret: bytes) -> None:
        """`secret`: of the cluster; it goes into every root."""
        self.roots = RootBook()
        self._store = store
        self._secret = secret

    def open_model(self, session: Session, request: pb.OpenModelRequest) -> pb.OpenModelReply:
        """Number and sizes of a model, for this session."""
        model = model_of(request.model)
        if model.digest() != request.digest:
            raise ProtocolError(
                f"model {model.model!r} digests to {model.digest().hex()} here, to {request.digest.hex()} at the "
                "client: run the same version of kvstore on both sides"
            )
        if not session.rights.may_open(model):
            # Every model opened costs memory for good, and widens the table of blocks for all.
            raise AccessDenied(f"no right to model {model.model!r}")
        known = self._store.models
        if model not in known and len(known) >= _MAX_MODELS_OF_ALL:
            raise CapacityError(f"{_MAX_MODELS_OF_ALL} models are open here, which is the limit: restart the server")
        layout = self._store.open(model)
        with session.lock:
            if layout not in session.models:
                if len(session.models) >= _MAX_MODELS:
                    raise CapacityError(f"the session has opened {_MAX_MODELS} models, which is the limit")
                session.models.append(layout)
            number = session.models.index(layout) + 1
        sizes = np.array([part.num_bytes for part in layout.parts], "<u8")
        return pb.OpenModelReply(model=number, part_bytes=sizes.tobytes())

    def root_of(self, session: Session, message: pb.Root) -> Root:
        """The root of a message, checked against the client's own digest of it and its rights."""
        key = (message.model, message.adapter, message.salt)
        root = session.roots.get(key)
        if root is None:
            if len(message.adapter) > _MAX_ADAPTER_BYTES or len(message.salt) > _MAX_SALT_BYTES:
                raise ConfigError(
                    f"root.adapter has {len(message.adapter)} bytes, root.salt {len(message.salt)}: at most "
                    f"{_MAX_ADAPTER_BYTES} and {_MAX_SALT_BYTES}"
                )
            model = session.layout(message.model).model
            root = Root(model, message.adapter, message.salt, self._secret)
            if not session.rights.allows(root):
                raise AccessDenied(f"no right to the namespace of model {model.model!r} and salt {message.salt!r}")
            with session.lock:
                if len(session.roots) >= _MAX_ROOTS:
                    session.roots.clear()
                session.roots[key] = root
        if root.id != message.id:
            raise ProtocolError(
                f"root digests to {root.id.hex()} here, to {message.id.hex()} at the client: both sides need the same "
                "cluster secret"
            )
        self.show(session, root)
        return root

    def show(self, session: Session, root: Root) -> None:
        """As `use`, but who has no tenant, and only looks or takes care, takes nothing from a tenant."""
        if session.rights.tenant:
            self.use(session, root)
        else:
            self.roots.learn(root)

    def use(self, session: Session, root: Root) -> None:
        """What the root holds from now on is this tenant's, or nobody's: one not used for long was forgotten."""
        rights = session.rights
        self.roots.learn(root, rights.tenant)
        self._store.limit(root.id, rights.tenant, rights.quota_bytes)
