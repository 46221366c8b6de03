"""The configuration: four sources, one order, and nothing misunderstood in silence."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import pytest

from hmm.limits import Limits
from hmm_server.config import SETTINGS, Config, ConfigError, is_port, load


def test_later_sources_win(tmp_path: Path) -> None:
    """Defaults < file < environment < flags."""
    file = tmp_path / "hmmd.toml"
    file.write_text('credit = 1\nmirrors = 1\nprocesses = 1\nacknowledgement_s = 2\nsocket = "/x"\n')
    config = load({"credit": 3}, {"HMMD_CREDIT": "2", "HMMD_MIRRORS": "2", "HMMD_TARGET": "ignored"}, file)
    assert (config.credit, config.mirrors, config.processes, config.devices) == (3, 2, 1, Config().devices)
    assert config.acknowledgement_s == 2.0
    assert config.limits.mirrors == 2


def test_file_is_named_by_the_environment(tmp_path: Path) -> None:
    """HMMD_CONFIG names the file when no flag does."""
    file = tmp_path / "hmmd.toml"
    file.write_text("reflection = false\n")
    assert not load({}, {"HMMD_CONFIG": str(file)}).reflection


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("creddit = 1", "no setting 'creddit'"),
        ('credit = "many"', "credit is 'many'; it must be an integer"),
        ("credit = 1.5", "it must be an integer"),
        ("reflection = 1", "it must be true or false"),
        ("credit = ", "Invalid value"),
    ],
)
def test_file_is_refused_when_not_understood(tmp_path: Path, text: str, message: str) -> None:
    """A name or a value that is not understood is an error that says where it stands."""
    file = tmp_path / "hmmd.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load({}, {}, file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "is_one"), [("0", True), ("65535", True), ("65536", False), ("", False), ("-1", False), ("9" * 50, False)]
)
def test_port_is_a_number_of_16_bits(text: str, is_one: bool) -> None:
    """In decimal digits, those of ASCII."""
    assert is_port(text) is is_one
    assert not is_port("\N{ARABIC-INDIC DIGIT ONE}")


def test_file_is_refused_when_missing(tmp_path: Path) -> None:
    """A file that was named has to be there."""
    with pytest.raises(ConfigError, match="No such file"):
        load({}, {}, tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("HMMD_CREDIT", "many", "HMMD_CREDIT is 'many'; it must be an integer"),
        ("HMMD_FAULT_S", "soon", "it must be a number"),
        ("HMMD_REFLECTION", "perhaps", "it must be true or false"),
    ],
)
def test_environment_is_refused_when_not_understood(name: str, value: str, message: str) -> None:
    """The same holds for the environment."""
    with pytest.raises(ConfigError, match=message):
        load({}, {name: value})


def test_environment_understands_booleans() -> None:
    """Booleans are written as people write them."""
    assert not load({}, {"HMMD_REFLECTION": "No"}).reflection
    assert load({}, {"HMMD_TCP_PLAINTEXT": "1"}).tcp_plaintext


@pytest.mark.parametrize(
    "settings",
    [
        {"credit": 0},
        {"acknowledgement_s": 0.0},
        {"message_bytes": 100},
        {"part_bytes": 8 << 20},
        {"fault_pages": 1 << 19},
        {"socket": "s\0t"},
        {"log_level": "loud"},
        {"log_format": "xml"},
        {"tls_certificate": "cert.pem"},
        {"tcp": "127.0.0.1:0"},
        {"tcp": "localhost", "tcp_plaintext": True},
        {"tcp": "localhost:65536", "tcp_plaintext": True},
        {"health_tcp": "8080"},
        {"acknowledgement_s": math.nan},
        {"drain_s": math.inf},
        {"holding_lease_s": math.inf},
    ],
    ids=str,
)
def test_value_is_refused_when_out_of_bounds(settings: dict[str, object]) -> None:
    """Limits are positive, parts fit into messages, TCP has TLS unless told otherwise."""
    with pytest.raises(ConfigError):
        Config(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        *(("holding_lease_s", 4_294_967), ("acknowledgement_s", 4_294_967), ("credit", (1 << 32) - 1)),
        *(("keepalive_ms", (1 << 31) - 1), ("ping_timeout_ms", (1 << 31) - 1), ("message_bytes", (1 << 31) - 1)),
        *(("concurrent_calls", (1 << 31) - 1), ("queue_bytes", (1 << 31) - 1), ("directories", (1 << 31) - 1)),
    ],
)
def test_value_is_refused_when_no_message_and_no_option_could_hold_it(name: str, limit: int) -> None:
    """It is said at the start, with the setting, the value and the limit, which itself is accepted."""
    assert getattr(Config(**{name: limit}), name) == limit  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"^{name} is {limit + 1}; it must be at most {limit}$"):
        Config(**{name: limit + 1})  # type: ignore[arg-type]


def test_every_limit_of_the_core_is_a_setting() -> None:
    """With the same default, so that a daemon holds as much as a machine by itself."""
    assert Config().limits == Limits()
    bounded = load({limit.name: 7 for limit in fields(Limits)}, {}, None).limits
    assert all(getattr(bounded, limit.name) == 7 for limit in fields(Limits))


def test_every_setting_explains_itself() -> None:
    """Each has a text for --help, and a number names its unit there or in its name."""
    assert all(setting.metadata["text"] for setting in SETTINGS)


def test_socket_path_has_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a setting the socket lies in the user's runtime directory, else in /run."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert Config().socket_path == Path("/run/user/7/hmmd/hmmd.sock")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert Config().socket_path == Path("/run/hmmd/hmmd.sock")
    assert Config(socket="unix:/x/y").socket_path == Path("/x/y")


def test_swap_file_is_refused_when_there_is_no_swap() -> None:
    """A file for nothing is a mistake."""
    with pytest.raises(ConfigError, match="swap_file needs swap_pages"):
        Config(swap_file="/var/swap")
