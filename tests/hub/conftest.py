"""What the tests of the Hub share."""

import pytest
from minihub import MiniHub


@pytest.fixture(scope="module")
def hub():
    hub = MiniHub()
    yield hub
    hub.close()
