"""How a request says that its KV is to move: our header, or LMDeploy's fields."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from aiohttp import web

from engine.api.distserve import HANDOFF_HEADER, MAX_SESSION, GiveHeader, TakeHeader, decode_handoff
from engine.api.errors import InvalidRequest
from engine.api.openai import CommonRequest
from engine.core import Give, Take
from engine.server.keys import require_cluster_key


@dataclass(frozen=True, slots=True)
class Handoff:
    """Of a whole request; `at` gives each sub-request its own."""

    session: int
    peer: str | None
    gives: bool
    first_token: int | None = None

    def at(self, index: int, alone: bool) -> Give | Take:
        """`alone`: the request has one sub-request, so LMDeploy's single `remote_token_id` is its first token."""
        if self.gives:
            return Give(session=self.session, index=index, peer=self.peer)
        first_token = self.first_token if alone else None
        return Take(session=self.session, index=index, peer=self.peer or "", first_token=first_token)


def handoff_of(request: web.Request, fields: CommonRequest) -> Handoff | None:
    """None for a request that this engine serves alone. Raises InvalidRequest, or Forbidden without the cluster key."""
    asked = [handoff for handoff in (_in_header(request), _given(fields), _taken(fields)) if handoff is not None]
    if not asked:
        return None
    require_cluster_key(request)
    if len(asked) > 1:
        raise InvalidRequest(
            f"A request moves its KV in one way: {HANDOFF_HEADER}, preserve_cache or migration_request",
            param="migration_request",
        )
    return asked[0]


def _in_header(request: web.Request) -> Handoff | None:
    value = request.headers.get(HANDOFF_HEADER)
    if value is None:
        return None
    try:
        header = decode_handoff(value)
    except InvalidRequest as error:
        raise InvalidRequest(f"{HANDOFF_HEADER}: {error.message}", param=HANDOFF_HEADER) from error
    match header:
        case GiveHeader(session=session, peer=peer):
            return Handoff(session, peer, gives=True)
        case TakeHeader(session=session, peer=peer):
            return Handoff(session, peer, gives=False)


def _given(fields: CommonRequest) -> Handoff | None:
    """LMDeploy's prefill: whoever is connected and names the session may pull."""
    return Handoff(secrets.randbelow(MAX_SESSION) + 1, None, gives=True) if fields.preserve_cache else None


def _taken(fields: CommonRequest) -> Handoff | None:
    migration = fields.migration_request
    if migration is None or migration.is_dummy_prefill:
        return None
    if not migration.remote_engine_id:
        raise InvalidRequest("migration_request: remote_engine_id is empty", param="migration_request")
    return Handoff(
        migration.remote_session_id, migration.remote_engine_id, gives=False, first_token=migration.remote_token_id
    )
