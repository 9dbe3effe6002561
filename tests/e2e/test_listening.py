"""Where the service listens, to whom, and over what."""

import ssl
from pathlib import Path

import httpx
import pytest

from keypast import Client, errors
from keypast.keys import new_key
from service.healthcheck import is_ready
from service.server import check_tls
from service.settings import Settings, SettingsError
from tests.e2e.test_server import Server

QUICK = "tests.e2e.quick_service"
TLS = Path(__file__).parents[1] / "data" / "tls"
KEY, RECORD = new_key("alice")


def test_without_keys_other_machines_are_not_served() -> None:
    with Server(QUICK, host="0.0.0.0") as server:
        code, printed = server.ends()
    assert code == 2
    assert printed.startswith("keypast: KEYPAST_HOST=0.0.0.0: without API keys only this machine is served")
    assert "\n" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"insecure": "1"}, {"keys": RECORD.line()}])
def test_with_keys_or_if_told_so_they_are(settings: dict[str, str]) -> None:
    with Server(QUICK, host="0.0.0.0", **settings) as server:
        address = server.address()
        status = httpx.get(f"{address}/v1/sessions").status_code
        assert status == (401 if "keys" in settings else 200)


@pytest.mark.slow
@pytest.mark.parametrize("host", ["localhost", "127.0.0.2"])
def test_this_machine_is_served_by_any_of_its_names(host: str) -> None:
    with Server(QUICK, host=host) as server:
        assert httpx.get(f"{server.address()}/livez").status_code == 200


def test_the_client_takes_its_key() -> None:
    with Server(QUICK, keys=RECORD.line()) as server:
        address = server.address()
        with Client(address, api_key=KEY) as client:
            session = client.sessions.create("letters")
            assert session.prefill(token_ids=[[97, 98]]).valid_length == [2]
        with Client(address) as client, pytest.raises(errors.Denied) as denied:
            client.models()
        assert (denied.value.status, denied.value.code) == (401, "unauthorized")
        with Client(environment={"KEYPAST_URL": address, "KEYPAST_API_KEY": KEY}) as client:
            assert client.models()


def test_https() -> None:
    trust = ssl.create_default_context(cafile=TLS / "cert.pem")
    with Server(QUICK, tls_cert=str(TLS / "cert.pem"), tls_key=str(TLS / "key.pem")) as server:
        address = server.line(r"keypast serves .* on (https://\S+)")[1]
        with httpx.Client(base_url=address, verify=trust) as client:
            path = client.post("/v1/sessions", json={"model": "letters"}).headers["location"]
            assert client.post(f"{path}/prefill", json={"token_ids": [[97]]}).status_code == 200
            late = client.post(f"{path}/prefill", headers={"a": "b" * 40_000}, json={})
            assert (late.status_code, late.json()["code"]) == (431, "head_too_large")
        port = int(address.rpartition(":")[2])
        assert is_ready(Settings(port=port, tls_cert=TLS / "cert.pem", tls_key=TLS / "key.pem"))
        assert not is_ready(Settings(port=port)), "it is asked for http"
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{address}/livez")
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http{address.removeprefix('https')}/livez")


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"tls_cert": "cert.pem"}, "go together"),
        ({"tls_key": "key.pem"}, "go together"),
        ({"tls_cert": "nothing.pem", "tls_key": "key.pem"}, "No such file"),
        ({"tls_cert": "key.pem", "tls_key": "cert.pem"}, "KEYPAST_TLS_CERT"),
    ],
)
def test_a_wrong_certificate_is_one_clear_line(settings: dict[str, str], hint: str) -> None:
    paths = {name: TLS / file for name, file in settings.items()}
    with pytest.raises(SettingsError) as refused:
        check_tls(Settings(tls_cert=paths.get("tls_cert"), tls_key=paths.get("tls_key")))
    assert str(refused.value).startswith("KEYPAST_TLS")
    assert hint in str(refused.value)
    assert "\n" not in str(refused.value)
