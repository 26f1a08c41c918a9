"""The nouns of an engine. Read this file and you have seen the system.

A `Request` is what the user asked and never changes. A `Sequence` is its running state, owned by the engine core's one
thread. Each step the scheduler makes a `Step` (which sequences get how many tokens), the executor turns it into a
`StepOutput` (a sampled token for each sequence that caught up), and the engine hands `Delta`s to the API process.

One rule drives all of it: a sequence has *known* tokens and *computed* tokens, and a step computes some of the
difference. Nothing is called "the prefill phase".

    known tokens     | prompt ............................ | output ....... |
    computed tokens  | ===================>                                     num_computed
                                           \\_ the next step may compute any number of these
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

import msgspec


class Role(IntEnum):
    """What an engine is for; the integers are LMDeploy's EngineRole on the wire."""

    HYBRID = 1
    PREFILL = 2
    DECODE = 3


class FinishReason(StrEnum):
    STOP = "stop"  # EOS, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the model's length
    ABORT = "abort"  # the client went away
    ERROR = "error"  # the engine failed; never presented as a stop


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose tokens. Validated at the edge; inside the engine every value is in range."""

    max_tokens: int
    seed: int  # always set: drawn by the API process when the user gave none
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()  # EOS ids included unless ignore_eos
    logprobs: int | None = None  # None: none wanted; 0: the chosen token's; k: and the k likeliest


class Give(msgspec.Struct, frozen=True, kw_only=True, tag="give"):
    """This engine prefills, then holds the KV for another to pull. `session` names the lease on the wire."""

    session: int
    index: int = 0  # which prompt × choice of the request
    peer: str | None = None  # the engine id that will pull; None: whoever is connected and names the session


class Take(msgspec.Struct, frozen=True, kw_only=True, tag="take"):
    """This engine decodes, pulling the prompt's KV from `peer`."""

    session: int
    peer: str
    index: int = 0
    first_token: int | None = None  # known already in LMDeploy's order, else it comes with the last announcement


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked. `prompt` is token ids; text never enters the core."""

    id: str
    prompt: list[int]
    sampling: SamplingParams
    handoff: Give | Take | None = None
    priority: int = 0  # lower goes first
    cache_salt: str = ""  # prefixes are shared only among requests of the same salt
    slo_ttft_ms: float | None = None  # wanted: first token within this time of arrival
    slo_tpot_ms: float | None = None  # wanted: no longer between two tokens than this


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probabilities of one sampled token and its `SamplingParams.logprobs` likeliest rivals."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class Delta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one step added to one request; the last one carries `finish_reason`."""

    request_id: str
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] = []
    finish_reason: FinishReason | None = None
    error: str | None = None  # with FinishReason.ERROR
    error_status: int = 500
    cached_tokens: int = 0  # of the prompt, found in a prefix cache (on the prefill side when disaggregated)
    block_ids: list[int] = []  # a finished Give: the blocks under lease


class Status(StrEnum):
    """Where a sequence is. Its blocks are freed by exactly one transition out of a state that holds them.

    WAITING ─▶ RUNNING ─▶ FINISHED          plain; preemption goes RUNNING ─▶ WAITING
    EXPECTED ─▶ WAITING ─▶ RUNNING ─▶ HELD ─▶ FINISHED     Give: EXPECTED until decode has reserved its blocks
    RESERVING ─▶ PULLING ─▶ RUNNING ─▶ FINISHED            Take: also when the hand-off failed (recompute)
    """

    EXPECTED = "expected"
    RESERVING = "reserving"
    WAITING = "waiting"
    PULLING = "pulling"
    RUNNING = "running"
    HELD = "held"
    FINISHED = "finished"


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequence:
    """The running state of one request."""

    request: Request
    arrival: float  # time.monotonic() seconds
    tokens: list[int] = field(default_factory=list)  # known: prompt, then output
    num_computed: int = 0  # tokens whose KV is in our pool
    block_table: list[int] = field(default_factory=list)  # block ids, in token order
    status: Status = Status.WAITING
    digests: list[bytes] = field(default_factory=list)  # names of its full blocks, see cache/prefix.py
    num_cached: int = 0  # prompt tokens that were found computed

    @classmethod
    def of(cls, request: Request, arrival: float) -> Sequence:
        return cls(request=request, arrival=arrival, tokens=list(request.prompt))

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def num_missing(self) -> int:
        """Known tokens not yet computed: 1 for a sequence that decodes, more for one that catches up."""
        return len(self.tokens) - self.num_computed


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Ahead:
    """A sequence as it will be if it goes on with these tokens."""

    sequence: Sequence
    drafted: list[int]

    @property
    def request(self) -> Request:
        return self.sequence.request

    @property
    def tokens(self) -> list[int]:
        return self.sequence.tokens + self.drafted

    @property
    def num_output(self) -> int:
        return self.sequence.num_output + len(self.drafted)


Row = Sequence | Ahead  # what a token is sampled for


@dataclass(frozen=True, slots=True)
class Step:
    """One forward: `sequences[i]` computes its next `num_new[i]` tokens, and where it then has caught up, those of
    `drafts[i]` that it may say next. The blocks for both are already allocated."""

    sequences: list[Sequence]
    num_new: list[int]
    drafts: dict[int, list[int]] = field(default_factory=dict)

    @property
    def num_catching_up(self) -> int:
        """Tokens of rows that compute more than one."""
        return sum(count for count in self.num_new if count > 1)

    def samples(self, i: int) -> bool:
        """Whether row i catches up in this step, and so samples a token; and another after each of its draft."""
        return self.num_new[i] == self.sequences[i].num_missing

    def sampled(self) -> list[Row]:
        """What the step samples tokens for, in order."""
        rows: list[Row] = []
        for i, sequence in enumerate(self.sequences):
            if self.samples(i):
                draft = self.drafts.get(i, [])
                rows += [sequence, *(Ahead(sequence, draft[:count]) for count in range(1, len(draft) + 1))]
        return rows


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Parallel to `Step.sampled`."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler and the API need to know of the loaded model."""

    name: str
    max_model_len: int  # tokens, prompt and output together; the pool holds as many
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    num_blocks: int
    block_size: int  # tokens
    dtype: str
    quantization: str = "none"  # formats of the quantized weights, joined by +
    device: str
    num_parameters: int
    load_seconds: float
