"""Settings: flags over environment over file over defaults; what is unknown or wrong is refused in one clear line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ByteSize, SecretStr, ValidationError

from engine.api.settings import Settings, SettingsError, load, read, setting
from engine.core import Role


class Example(Settings):
    env_prefix = "TANDEM_EXAMPLE_"

    port: int = setting(8000, "port to listen on", group="Network", ge=1, le=65535, aliases=("server_port",))
    wait: float = setting(2.0, "between tries", group="Network", unit="seconds")
    api_key: tuple[SecretStr, ...] = setting((), "keys", group="Security", aliases=("api_keys",))
    cluster_key: SecretStr | None = setting(None, "the key", group="Security", env="TANDEM_CLUSTER_KEY")
    memory: ByteSize = setting("1GiB", "of the pool, 100% of it", group="Limits", ge=1)
    role: Role = setting(Role.HYBRID, "the role", group="Network")
    tags: tuple[str, ...] = setting(("a", "b"), "tags", group="Network")
    verbose: bool = setting(False, "say more", group="General")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TANDEM_CLUSTER_KEY", raising=False)


def of(*argv: str) -> Example:
    return read(Example, argv, prog="example", description="An example.")


def refusal(*argv: str) -> str:
    with pytest.raises(SettingsError) as caught:
        of(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "settings.yaml"


def test_flags_win_over_environment_over_file_over_defaults(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("port: 1\nwait: 1.5\nmemory: 2GB\n")
    monkeypatch.setenv("TANDEM_EXAMPLE_PORT", "2")
    monkeypatch.setenv("TANDEM_EXAMPLE_WAIT", "2.5")
    settings = of("--config", str(file), "--port", "3")
    assert (settings.port, settings.wait, settings.memory, settings.tags) == (3, 2.5, 2_000_000_000, ("a", "b"))


def test_the_file_may_be_named_by_the_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("server-port: 7\n")
    monkeypatch.setenv("TANDEM_EXAMPLE_CONFIG", str(file))
    assert of().port == 7


@pytest.mark.parametrize(
    ("text", "size"), [("512MiB", 512 << 20), ("2GB", 2_000_000_000), ("1.5GiB", 3 << 29), ("4096", 4096)]
)
def test_sizes_take_units(text: str, size: int) -> None:
    assert of("--memory", text).memory == size


def test_a_default_may_be_a_size_in_words() -> None:
    assert of().memory == 1 << 30


@pytest.mark.parametrize("argv", [("--tags", "x,y", "--tags", "z"), ("--tags=x, y ,z",)])
def test_lists_are_repeatable_and_comma_separated(argv: tuple[str, ...]) -> None:
    assert of(*argv).tags == ("x", "y", "z")


def test_lists_in_a_file_may_be_yaml_lists(file: Path) -> None:
    file.write_text("tags: [x, y]\napi_key: [first, 2]\n")
    settings = of("--config", str(file))
    assert settings.tags == ("x", "y")
    assert [key.get_secret_value() for key in settings.api_key] == ["first", "2"]


@pytest.mark.parametrize(
    ("argv", "value"),
    [(("--verbose",), True), (("--verbose=false",), False), (("--verbose", "--no-verbose"), False), ((), False)],
)
def test_switches(argv: tuple[str, ...], value: bool) -> None:
    assert of(*argv).verbose is value


@pytest.mark.parametrize("text", ["prefill", "Prefill", "PREFILL"])
def test_enums_go_by_name_in_any_case(text: str) -> None:
    assert of("--role", text).role is Role.PREFILL


def test_aliases_are_flags_too() -> None:
    assert of("--server-port", "9").port == 9


def test_keys_are_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_CLUSTER_KEY", "hush-cluster")
    settings = of("--api-key", "hush-user")
    assert settings.cluster_key is not None
    assert settings.cluster_key.get_secret_value() == "hush-cluster"
    assert "hush" not in repr(settings) + str(settings) + settings.model_dump_json()


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        of().port = 1  # type: ignore[misc]


def test_an_unknown_flag_is_refused_with_the_nearest() -> None:
    assert refusal("--prot", "1") == "unknown flag '--prot', did you mean '--port'?"


def test_a_flag_is_not_guessed_from_its_beginning() -> None:
    assert refusal("--serv=1") == "unknown flag '--serv', did you mean '--server-port'?"


def test_an_unknown_environment_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_EXAMPLE_PROT", "1")
    assert refusal() == "unknown environment variable 'TANDEM_EXAMPLE_PROT', did you mean 'TANDEM_EXAMPLE_PORT'?"


def test_names_of_other_commands_in_the_environment_are_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_OTHER_PROT", "1")
    assert of().port == 8000


def test_an_unknown_key_in_the_file_is_refused(file: Path) -> None:
    file.write_text("prot: 1\n")
    assert refusal("--config", str(file)) == f"{file}: unknown key 'prot', did you mean 'port'?"


@pytest.mark.parametrize(
    ("content", "said"), [("[1, 2]", "got a list"), ("a: [", "not YAML"), ("\xff", "not UTF-8"), (None, "no such file")]
)
def test_a_file_that_is_no_settings_file(file: Path, content: str | None, said: str) -> None:
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    assert said in refusal("--config", str(file))


def test_a_wrong_value_is_refused_where_it_was_said(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("role: writer\n")
    monkeypatch.setenv("TANDEM_EXAMPLE_WAIT", "soon")
    said = refusal("--config", str(file), "--port", "99999", "--memory", "much").split("; ")
    assert said == [
        "--port: must be less than or equal to 65535",
        "TANDEM_EXAMPLE_WAIT: must be a valid number, unable to parse string as a number",
        "--memory: expected a size like 512MiB or 2GB",
        f"{file}: role: must be 'hybrid' or 'prefill' or 'decode'",
    ]


def test_a_flag_without_its_value() -> None:
    assert "--port" in refusal("--port")


def test_a_stray_word() -> None:
    assert refusal("serve") == "unexpected argument 'serve': every setting is a flag; see --help"


def test_help_shows_groups_defaults_units_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load(Example, ["--help"], "example", "An example.", example="example --port 1\nexample --port 2")
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    for expected in ("Network:", "--port, --server-port N", "(default: 8000)", "--wait SECONDS", "100% of it", "SIZE"):
        assert expected in shown
    assert shown.endswith("examples:\n  example --port 1\n  example --port 2\n")
    assert "{hybrid,prefill,decode}" in shown
    assert shown.index("Network:") < shown.index("General:")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load(Example, ["--version"], "example", "")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("example ")


def test_refusals_leave_with_2_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load(Example, ["--prot"], "example", "")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "example: error: unknown flag '--prot', did you mean '--port'?\n"


def test_loading_settings_does_not_load_torch_or_a_web_server() -> None:
    program = "import sys, engine.config; sys.exit(bool({'torch', 'aiohttp', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
