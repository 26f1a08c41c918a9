"""The engine's settings, as a user writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.api.settings import SettingsError, read
from engine.config import EngineSettings
from engine.core import Role


def of(*argv: str) -> EngineSettings:
    return read(EngineSettings, ["--model", "smollm2", *argv], prog="engine", description="")


def refusal(*argv: str) -> str:
    with pytest.raises(SettingsError) as caught:
        of(*argv)
    return str(caught.value)


def test_the_defaults_are_a_hybrid_engine_on_this_machine() -> None:
    settings = of()
    assert (settings.role, settings.host, settings.port) == (Role.HYBRID, "127.0.0.1", 23333)
    assert settings.transports == ("shm", "tcp")
    assert settings.kv_cache_memory == 1 << 30
    assert settings.model_name == "smollm2"


def test_lmdeploys_and_vllms_names_are_understood() -> None:
    settings = of("--server-name", "0.0.0.0", "--server-port", "1", "--session-len", "9", "--max-batch-size", "3")
    assert (settings.host, settings.port, settings.max_model_len, settings.max_num_seqs) == ("0.0.0.0", 1, 9, 3)
    assert of("--role", "Decode", "--cache-block-seq-len", "64").block_size == 64
    assert of("--model-name", "mine").model_name == "mine"


def test_a_model_is_needed() -> None:
    with pytest.raises(SettingsError, match="--model: is required"):
        read(EngineSettings, [], prog="engine", description="")


def test_a_role_that_moves_kv_needs_a_transport() -> None:
    assert "--transports must name at least one" in refusal("--role", "prefill", "--transports", "")
    assert of("--transports", "").transports == ()


def test_the_required_transport_must_be_offered() -> None:
    assert refusal("--transports", "tcp", "--require-transport", "shm") == (
        "--require-transport shm is not among --transports tcp"
    )


@pytest.mark.parametrize("block_size", ["0", "12", "-16"])
def test_blocks_are_powers_of_two(block_size: str) -> None:
    assert refusal("--block-size", block_size).startswith("--block-size: must be")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a", "http://", "http://a:1/v1"])
@pytest.mark.parametrize("flag", ["--proxy-url", "--advertise-url"])
def test_urls_are_checked(flag: str, url: str) -> None:
    assert refusal(flag, url) == f"{flag}: must be a URL like http://127.0.0.1:8000, without a path"


def test_a_url_loses_its_last_slash() -> None:
    assert of("--proxy-url", "http://a:1/").proxy_url == "http://a:1"


def test_tls_needs_both_and_both_must_exist(tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.touch()
    assert refusal("--ssl-keyfile", str(key)) == "--ssl-keyfile needs --ssl-certfile"
    assert refusal("--ssl-certfile", str(tmp_path / "none.pem")) == "--ssl-certfile: there is no such file"


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1", "auto"])
def test_devices(device: str) -> None:
    assert of("--device", device).device == device


def test_no_such_device() -> None:
    assert refusal("--device", "tpu").startswith("--device: ")


@pytest.mark.parametrize("flag", ["--api-key", "--cluster-key"])
def test_an_empty_key_is_refused(flag: str) -> None:
    assert "is empty" in refusal(f"{flag}=")


def test_an_empty_key_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_CLUSTER_KEY", "")
    assert "is empty" in refusal()
