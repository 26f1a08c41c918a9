"""What the proxy reads of a request: one shallow pass, and the few fields that LMDeploy's order splices in.

The body's bytes go to the engines unchanged. Decoding checks that all of it is JSON, so that nonsense ends here, but
keeps prompts and messages as they stand.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from engine.api.decoding import decode_json
from engine.api.distserve import MAX_SESSION, MigrationRequest
from engine.api.errors import InvalidRequest

_NOTHING = msgspec.Raw(b"")
_UNSET = (b"", b"null", b"false")


class Shape(msgspec.Struct, frozen=True):
    """The fields that routing needs. What engines will judge themselves stays Raw."""

    model: str | None = None
    n: msgspec.Raw = _NOTHING
    best_of: msgspec.Raw = _NOTHING
    prompt: msgspec.Raw = _NOTHING
    migration_request: msgspec.Raw = _NOTHING
    preserve_cache: msgspec.Raw = _NOTHING


@dataclass(frozen=True, slots=True)
class Call:
    """A request on its way to engines. `headers` are whole lines."""

    path: str
    headers: bytes
    body: bytes
    shared: bool  # prefill and decode may share it
    shape: Shape

    @property
    def model(self) -> str | None:
        return self.shape.model

    @property
    def chat(self) -> bool:
        return self.path.endswith("/chat/completions")

    @property
    def single(self) -> bool:
        """Whether it has one prompt and one choice: all that LMDeploy's order can hand over."""
        one = (b"", b"1", b"null")
        return bytes(self.shape.n) in one and bytes(self.shape.best_of) in one and _one_prompt(self.shape.prompt)


_shape_decoder = msgspec.json.Decoder(Shape)


def read_shape(body: bytes) -> Shape:
    """Raises InvalidRequest, naming what is wrong."""
    try:
        shape = _shape_decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        shape = decode_json(body, Shape)  # fails again, saying it well
    for field in ("migration_request", "preserve_cache"):
        if bytes(getattr(shape, field)) not in _UNSET:
            raise InvalidRequest(f"{field} is for proxy and engines among themselves: leave it out", param=field)
    return shape


def _one_prompt(prompt: msgspec.Raw) -> bool:
    """A string, or one list of token ids."""
    raw = bytes(prompt).strip()
    if not raw.startswith(b"["):
        return True
    return raw[1:].lstrip()[:1] not in b'"['  # of strings or of lists; an empty list is the engine's to refuse


def prefill_body(body: bytes, chat: bool) -> bytes:
    """The client's body with what makes a prefill engine compute the prompt, sample one token and keep the KV."""
    fields: dict[str, object] = {"max_tokens": 1, "stream": False, "with_cache": True, "preserve_cache": True}
    if chat:
        fields["max_completion_tokens"] = 1
    return _splice(body, fields)


def decode_body(body: bytes, migration: MigrationRequest) -> bytes:
    """The client's body with where decode finds the prompt's KV."""
    return _splice(body, {"migration_request": migration})


def _splice(body: bytes, fields: dict[str, object]) -> bytes:
    members: dict[str, object] = dict(decode_json(body, dict[str, msgspec.Raw]))
    return msgspec.json.encode(members | fields)


class PrefillReply(msgspec.Struct, frozen=True):
    """What LMDeploy's order needs of a prefill engine's answer. Types are what they may be: engines differ."""

    id: str | int | None = None
    cache_block_ids: list[int] | None = None
    remote_token_ids: list[int] | None = None

    def migration(self, template: MigrationRequest) -> MigrationRequest | None:
        """The hand-off it offers; None when it offers none that decode could use."""
        text = str(self.id)
        if (
            not (text.isascii() and text.isdigit() and len(text) <= 16 and int(text) <= MAX_SESSION)
            or not self.remote_token_ids
        ):
            return None
        return msgspec.structs.replace(
            template,
            remote_session_id=int(text),
            remote_token_id=self.remote_token_ids[-1],
            remote_block_ids=self.cache_block_ids or [],
        )


def read_prefill_reply(body: bytes) -> PrefillReply:
    """An empty one when the answer is not of the expected shape: then nothing is handed over."""
    try:
        return msgspec.json.decode(body, type=PrefillReply)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return PrefillReply()
