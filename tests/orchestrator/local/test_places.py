"""Where the servers of a stack are: their names and ports, and which combinations of settings are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from orchestrator.local import places, preflight, tritonserver
from orchestrator.settings import Settings, SettingsError


def test_each_server_is_a_hundred_ports_above_the_one_before(tmp_path: Path) -> None:
    """The first one's names are those of a stack that has no other, and nobody shares a prefix."""
    settings = Settings.load({"home": tmp_path, "tritons": 3, "triton_http_port": 9000}, {})
    found = places.own(settings)
    assert [place.name for place in found] == ["triton", "triton-2", "triton-3"]
    assert [place.http for place in found] == [f"http://127.0.0.1:{port}" for port in (9000, 9100, 9200)]
    assert [place.grpc for place in found] == [f"127.0.0.1:{port}" for port in (8001, 8101, 8201)]
    assert [place.metrics for place in found] == [f"127.0.0.1:{port}" for port in (8002, 8102, 8202)]
    assert [place.log for place in found] == ["triton.log", "triton-2.log", "triton-3.log"]
    assert all(place.shm_prefix.startswith(tritonserver.shm_prefix(tmp_path)) for place in found)
    assert places.own(Settings.load({"home": tmp_path}, {}))[0].name == "triton"


def test_with_servers_of_others_there_are_none_of_ones_own(tmp_path: Path) -> None:
    """And none of Triton's ports is listened on; asking for both is refused."""
    settings = Settings.load({"home": tmp_path, "triton_urls": "http://a,http://b:9000"}, {})
    assert places.own(settings) == []
    assert {str(port) for port in places.ports(settings)} == {"http_port", "ops_port", "grpc_port"}
    preflight.check_servers(settings)
    both = Settings.load({"home": tmp_path, "triton_urls": "http://a", "tritons": 2}, {})
    with pytest.raises(preflight.StartError, match="triton_urls names the servers to use") as caught:
        preflight.check_servers(both)
    assert caught.value.hint


_PORTS = ("http_port", "grpc_port", "ops_port", "triton_http_port", "triton_grpc_port", "triton_metrics_port")


@hypothesis_settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(7900, 8500) | st.integers(64_000, 65_535), min_size=6, max_size=6), st.integers(1, 16))
def test_what_is_not_refused_has_a_port_for_all(numbers: list[int], tritons: int) -> None:
    """No two parts of a stack get the same port, and none gets one that does not exist."""
    try:
        settings = Settings.load({**dict(zip(_PORTS, numbers, strict=True)), "tritons": tritons}, {})
    except SettingsError:  # which names the two
        return
    ports = [port.number for port in places.ports(settings)]
    sound = len(set(ports)) == len(ports) == 3 + 3 * tritons and max(ports) < 65_536
    try:
        preflight.check_servers(settings)
    except preflight.StartError as error:
        assert not sound and "of triton-" in str(error) and "_port" in error.hint
    else:
        assert sound
