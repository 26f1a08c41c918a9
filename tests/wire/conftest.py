"""One proxy a file: started with the file's PROXY_FLAGS, and after each test as it was before."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from proxy_process import ProxyProcess, running_proxy


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def process(request: pytest.FixtureRequest) -> AsyncIterator[ProxyProcess]:
    async with running_proxy(*getattr(request.module, "PROXY_FLAGS", ())) as proxy:
        yield proxy


@pytest_asyncio.fixture(loop_scope="module")
async def proxy(process: ProxyProcess) -> AsyncIterator[ProxyProcess]:
    yield process
    await process.until_all_is_given_back()
    await process.forget_all()
