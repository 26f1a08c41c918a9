"""The proxy's settings: LMDeploy's and vLLM's names, defaults, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from engine.api.settings import SettingsError, read
from proxy.config import ProxySettings


def settings(*argv: str) -> ProxySettings:
    return read(ProxySettings, argv, prog="proxy", description="")


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--server-name", "0.0.0.0"], "host", "0.0.0.0"),
        (["--server-port", "9"], "port", 9),
        (["--serving-strategy", "DistServe"], "serving_strategy", "DistServe"),
        (["--routing-strategy", "min_expected_latency"], "routing_strategy", "min_expected_latency"),
        (["--dummy-prefill"], "dummy_prefill", True),
        (["--disable-cache-status"], "disable_cache_status", True),
        (["--migration-protocol", "NVLINK"], "migration_protocol", "NVLINK"),
        (["--link-type", "IB"], "link_type", "IB"),
        (["--disable-gdr"], "disable_gdr", True),
        (["--log-level", "INFO"], "log_level", "info"),
        (["--host", "::1"], "host", "::1"),
        (["--max-body-bytes", "1MiB"], "max_body_bytes", 1 << 20),
    ],
)
def test_flags_that_users_know(argv: Sequence[str], field: str, value: object) -> None:
    assert getattr(settings(*argv), field) == value


def test_keys_are_repeatable_and_never_shown() -> None:
    found = settings("--api-keys", "one,two", "--api-key", "three", "--cluster-key", "four")
    assert [key.get_secret_value() for key in found.api_key] == ["one", "two", "three"]
    assert found.cluster_key_text == "four"
    assert not {"one", "two", "three", "four"} & set(str(found).replace("'", " ").split())


def test_the_cluster_key_has_one_name_in_every_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_CLUSTER_KEY", "secret")
    monkeypatch.setenv("TANDEM_PROXY_PORT", "8100")
    assert settings().cluster_key_text == "secret"
    assert settings().port == 8100
    assert settings("--port", "8200").port == 8200


def test_a_file_is_read_and_its_misspellings_named(tmp_path: Path) -> None:
    path = tmp_path / "proxy.yaml"
    path.write_text("port: 8300\nrouting-strategy: random\n")
    assert (settings("--config", str(path)).port, settings("--config", str(path)).routing_strategy) == (8300, "random")
    path.write_text("prot: 1\n")
    with pytest.raises(SettingsError, match="port"):
        settings("--config", str(path))


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--rooting-strategy", "random"], "--routing-strategy"),
        (["--routing-strategy", "best"], "power_of_two"),
        (["--port", "70000"], "--port"),
        (["--ssl-certfile", "x.pem"], "--ssl-keyfile"),
        (["--max-inflight", "0"], "--max-inflight"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(argv: Sequence[str], told: str) -> None:
    with pytest.raises(SettingsError, match=told) as error:
        settings(*argv)
    assert "\n" not in str(error.value)
