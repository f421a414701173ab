"""A server with a small random model, shared by the tests of a file."""

from collections.abc import Iterator

import openai
import pytest
from running_server import RunningServer, running, small_chat_model

from smolseek.api import Model


@pytest.fixture(scope="session")
def model() -> Model:
    return small_chat_model()


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[RunningServer]:
    with running(model) as server:
        yield server


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(autouse=True)
def every_page_is_free_at_the_end(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").until_idle()
