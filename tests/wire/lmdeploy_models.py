"""A child process in which LMDeploy's own pydantic models read bodies and write them again.

    {"kind": "DistServeInitResponse", "body": …}  ──▶  {"dump": …} or {"error": …}          one line each way

It runs under the interpreter that has LMDeploy (see lmdeploy_cluster), and imports nothing of ours.
"""

from __future__ import annotations

import json
import sys

replies, sys.stdout = sys.stdout, sys.stderr  # LMDeploy logs to stdout from its import on

from lmdeploy.pytorch.disagg import config  # noqa: E402
from lmdeploy.pytorch.disagg.conn import protocol as conn  # noqa: E402
from lmdeploy.serve.openai import protocol as openai  # noqa: E402
from lmdeploy.serve.proxy import proxy  # noqa: E402
from pydantic import BaseModel, ValidationError  # noqa: E402


def model(kind: str) -> type[BaseModel]:
    for module in (conn, config, proxy, openai):
        if hasattr(module, kind):
            return getattr(module, kind)
    raise LookupError(kind)


def answer(kind: str, body: object) -> dict[str, object]:
    """A string is JSON in JSON, as engine_info is."""
    try:
        read = model(kind).model_validate_json(body) if isinstance(body, str) else model(kind).model_validate(body)
        return {"dump": read.model_dump(mode="json")}
    except ValidationError as error:
        return {"error": str(error)}


for line in sys.stdin:
    asked = json.loads(line)
    print(json.dumps(answer(asked["kind"], asked["body"])), file=replies, flush=True)
