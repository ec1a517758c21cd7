"""Anthropic's official client against a server with keys: what it sends as x-api-key is who it is, and a no has its shape."""

import anthropic
import httpx
import pytest

from luthier.faces.server.keys import add_key
from running import Running

ASK = {"model": "mini", "messages": [{"role": "user", "content": "Once"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    """A server, and keys by their scope."""
    folder = tmp_path_factory.mktemp("keyed")
    keys = {scope: add_key(folder / "keys.json", scope, [scope]) for scope in ("infer", "tune", "metrics")}
    running = Running("mini", "--keys", str(folder / "keys.json"), runs=folder)
    yield running, keys
    assert running.stop() == 0


@pytest.fixture
def client_with(keyed):
    """Clients with a key, or as the given names say, all of which are closed."""
    made = []

    def make(**given):
        made.append(anthropic.Anthropic(base_url=keyed[0].url, max_retries=0, **given))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_its_key_lets_it_in_however_it_sends_it(keyed, client_with):
    _, keys = keyed
    for given in ({"api_key": keys["infer"]}, {"api_key": None, "auth_token": keys["infer"]}):
        client = client_with(**given)
        found = client.messages.create(**ASK)
        assert found.role == "assistant" and found.usage.output_tokens
        assert client.messages.count_tokens(model="mini", messages=ASK["messages"]).input_tokens
        with client.messages.stream(**ASK) as stream:
            assert stream.get_final_message().usage.output_tokens


def test_a_key_that_is_not_known_or_missing_is_401_in_its_shape(keyed, client_with):
    running, _ = keyed
    client = client_with(api_key="lk-wrong")
    for ask in (
        lambda: client.messages.create(**ASK),
        lambda: client.messages.create(**ASK, stream=True),
        lambda: client.messages.count_tokens(model="mini", messages=ASK["messages"]),
    ):
        with pytest.raises(anthropic.AuthenticationError, match="this key is not known") as caught:
            ask()
        body = caught.value.body
        assert (caught.value.status_code, body["type"], body["error"]["type"]) == (401, "error", "authentication_error")
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        answer = httpx.post(running.url + path, json=ASK)
        assert answer.status_code == 401 and answer.json() == {
            "type": "error",
            "error": {
                "type": "authentication_error",
                "message": "a key is needed; send it as: Authorization: Bearer KEY, or x-api-key: KEY",
            },
        }


@pytest.mark.parametrize("scope", ["tune", "metrics"])
def test_a_key_without_the_scope_is_403_in_its_shape(keyed, client_with, scope):
    _, keys = keyed
    client = client_with(api_key=keys[scope])
    for ask in (
        lambda: client.messages.create(**ASK),
        lambda: client.messages.count_tokens(model="mini", messages=ASK["messages"]),
    ):
        with pytest.raises(anthropic.PermissionDeniedError, match="it has no scope 'infer'") as caught:
            ask()
        body = caught.value.body
        assert (caught.value.status_code, body["type"], body["error"]["type"]) == (403, "error", "permission_error")


def test_a_key_in_x_api_key_has_its_scopes_elsewhere_too(keyed):
    running, keys = keyed
    for scope, path, status in (("metrics", "/metrics", 200), ("infer", "/metrics", 403), ("infer", "/v1/models", 200)):
        assert httpx.get(running.url + path, headers={"x-api-key": keys[scope]}).status_code == status
