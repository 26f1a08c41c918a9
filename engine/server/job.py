"""A request made ready for the core: every prompt times every choice is one sub-request."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from engine.api.errors import InvalidRequest
from engine.api.openai import CommonRequest
from engine.api.sampling import choice_seed, draw_seed, sampling_params
from engine.core import Request, SamplingParams
from engine.server.choice import Choice
from engine.server.handoff import Handoff
from engine.server.objectives import Objectives
from engine.server.service import Service
from engine.text.stop import StopMatcher


@dataclass(frozen=True, slots=True)
class Job:
    """`requests[i]` belongs to prompt `i // num_choices`; `choices` are parallel to them."""

    fields: CommonRequest
    prompts: list[list[int]]  # token ids
    num_choices: int
    requests: list[Request]
    choices: list[Choice]
    handoff: Handoff | None
    objectives: Objectives
    ignored_fields: list[str]

    @property
    def gives(self) -> bool:
        return self.handoff is not None and self.handoff.gives

    @property
    def streams(self) -> bool:
        """A prefill answers whole, whatever the client asked of the cluster."""
        return bool(self.fields.stream) and not self.gives

    def prompt_of(self, index: int) -> list[int]:
        return self.prompts[index // self.num_choices]


def make_job(
    service: Service,
    fields: CommonRequest,
    prompts: Sequence[list[int]],
    *,
    default_max_tokens: int | None,
    logprobs: int | None,
    handoff: Handoff | None,
    objectives: Objectives,
    ignored_fields: list[str],
) -> Job:
    """Raises InvalidRequest for what no engine like this one could ever serve."""
    prompts = [_truncated(prompt, fields) for prompt in prompts]
    params = [_params(service, fields, prompt, default_max_tokens, logprobs, handoff) for prompt in prompts]
    num_choices = fields.n or 1
    _check_count(service, len(prompts) * num_choices)
    job = Job(fields, list(prompts), num_choices, [], [], handoff, objectives, ignored_fields)
    _add_requests(service, job, params)
    return job


def _truncated(prompt: list[int], fields: CommonRequest) -> list[int]:
    return prompt[-fields.truncate_prompt_tokens :] if fields.truncate_prompt_tokens else prompt


def _params(
    service: Service,
    fields: CommonRequest,
    prompt: list[int],
    default_max_tokens: int | None,
    logprobs: int | None,
    handoff: Handoff | None,
) -> SamplingParams:
    """A prefill checks the lengths that were asked, as decode does, and then computes one token."""
    params = sampling_params(fields, len(prompt), default_max_tokens, logprobs, service.client.model)
    if handoff is not None and handoff.gives:
        params = msgspec.structs.replace(params, max_tokens=1)
    return params


def _check_count(service: Service, num_requests: int) -> None:
    most = service.settings.max_queue + service.settings.max_num_seqs
    if num_requests > most:
        raise InvalidRequest(
            f"Prompts times n make {num_requests} sequences, and this engine takes {most} at once", param="n"
        )


def _add_requests(service: Service, job: Job, params: list[SamplingParams]) -> None:
    name = uuid.uuid4().hex  # never the client's own id: two requests may carry the same
    seed = draw_seed(job.fields, job.handoff.session if job.handoff else None)
    total = len(job.prompts) * job.num_choices
    for index in range(total):
        sampling = msgspec.structs.replace(params[index // job.num_choices], seed=choice_seed(seed, index))
        request = Request(
            id=f"{name}-{index}",
            prompt=job.prompt_of(index),
            sampling=sampling,
            handoff=job.handoff.at(index, alone=total == 1) if job.handoff else None,
            priority=job.fields.priority or 0,
            cache_salt=job.fields.cache_salt or "",
            slo_ttft_ms=job.objectives.ttft_ms,
            slo_tpot_ms=job.objectives.tpot_ms,
        )
        job.requests.append(request)
        job.choices.append(_choice(service, job.fields, sampling))


def _choice(service: Service, fields: CommonRequest, sampling: SamplingParams) -> Choice:
    stops = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
    include_stop = bool(fields.include_stop_str_in_output)
    hidden = frozenset() if include_stop else frozenset(sampling.stop_token_ids)
    detokenizer = service.tokenizer.detokenizer(fields.skip_special_tokens is not False)
    return Choice(detokenizer, StopMatcher(stops, include_stop), sampling.min_tokens, hidden)
