"""TLS: a server with a certificate is asked by https, and one with wrong files ends with a sentence."""

import ssl

import httpx
import openai
import pytest

from luthier.faces.cli.main import main
from running import Running

# Made for this test, for 127.0.0.1 and nothing else, and good for a hundred years.
CERTIFICATE = """
-----BEGIN CERTIFICATE-----
MIIBsDCCAVegAwIBAgIUT5sBqhF4fvKllaDVQjmyZgg6tFQwCgYIKoZIzj0EAwIw
FzEVMBMGA1UEAwwMbHV0aGllciB0ZXN0MCAXDTI2MTEyNjIyMDM1M1oYDzIxMjYx
MTAyMjIwMzUzWjAXMRUwEwYDVQQDDAxsdXRoaWVyIHRlc3QwWTATBgcqhkjOPQIB
BggqhkjOPQMBBwNCAATZ+nZbH+MRYOPbhoL/pYFVkg5lyDA6vKYraz/UzDwLlxEU
xEte3wGnfi+ZCrIMdIjK2jcQ2a2vQo67MSDIIeLQo38wfTAdBgNVHQ4EFgQUaQV5
VB5oo50lsPqrM2IYt1k2MXgwHwYDVR0jBBgwFoAUaQV5VB5oo50lsPqrM2IYt1k2
MXgwDwYDVR0TAQH/BAUwAwEB/zAaBgNVHREEEzARhwR/AAABgglsb2NhbGhvc3Qw
DgYDVR0PAQH/BAQDAgKEMAoGCCqGSM49BAMCA0cAMEQCIDwj8vqu8VtI9o6VuWYV
I4RgVlI+6RKUGKNYaozv4QxzAiB5ML6qqn0zcaEuJhxydhr7A5TVJIRUvEg7feWv
efDfHg==
-----END CERTIFICATE-----
"""
KEY = """
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgzAOVTrT5jkE2QM2B
n7Z6eM7tUah9FrHkZIC8mlN0TQOhRANCAATZ+nZbH+MRYOPbhoL/pYFVkg5lyDA6
vKYraz/UzDwLlxEUxEte3wGnfi+ZCrIMdIjK2jcQ2a2vQo67MSDIIeLQ
-----END PRIVATE KEY-----
"""
OTHER_KEY = """
-----BEGIN EC PRIVATE KEY-----
MHcCAQEEIL/5R+MgNku+wHJcGd+UsPjrlRO2vfHFgcWUtowgB19BoAoGCCqGSM49
AwEHoUQDQgAE4mVFqJYDLI7mZag6tzCqCkyMXYjYw77NW1PyljLWK6BTAkKW8Dn+
xxYWprLmtxtHoyPUrVDMuN+dNZXQfhQ6bg==
-----END EC PRIVATE KEY-----
"""


@pytest.fixture
def files(tmp_path):
    names = {"certificate": CERTIFICATE, "key": KEY, "other": OTHER_KEY, "empty": ""}
    for name, content in names.items():
        (tmp_path / f"{name}.pem").write_text(content.lstrip())
    return tmp_path


def test_a_server_is_asked_by_https(files):
    running = Running(
        "mini",
        "--certificate",
        str(files / "certificate.pem"),
        "--private-key",
        str(files / "key.pem"),
        runs=files / "runs",
    )
    try:
        assert running.url.startswith("https://127.0.0.1:")
        trusting = httpx.Client(verify=ssl.create_default_context(cafile=str(files / "certificate.pem")))
        turns = [{"role": "user", "content": "Hello"}]
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, http_client=trusting) as client:
            whole = client.chat.completions.create(model="mini", messages=turns, max_tokens=8, temperature=0)
            stream = client.chat.completions.create(
                model="mini", messages=turns, max_tokens=8, temperature=0, stream=True
            )
            text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == whole.choices[0].message.content
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{running.url}/health/live")
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(running.url.replace("https", "http") + "/health/live")
    finally:
        assert running.stop() == 0


@pytest.mark.parametrize(
    ("certificate", "key", "said"),
    [
        ("certificate", "other", "certificate: {}/certificate.pem and {}/other.pem do not belong together"),
        ("empty", "key", "certificate: {}/empty.pem and {}/key.pem hold no certificate and private key"),
        ("missing", "key", "certificate: {}/missing.pem cannot be read (No such file or directory)"),
        ("certificate", "missing", "private_key: {}/missing.pem cannot be read (No such file or directory)"),
    ],
)
def test_wrong_files_end_it_with_a_sentence(files, certificate, key, said, capsys):
    paths = [str(files / f"{name}.pem") for name in (certificate, key)]
    assert main(["serve", "mini", "--port", "0", "--certificate", paths[0], "--private-key", paths[1]]) == 2
    assert said.format(files, files) in " ".join(capsys.readouterr().err.split())


def test_a_certificate_needs_its_key(files, capsys):
    assert main(["serve", "mini", "--certificate", str(files / "certificate.pem")]) == 2
    assert "certificate and private_key go together" in capsys.readouterr().err
