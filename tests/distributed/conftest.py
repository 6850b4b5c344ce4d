from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import distributed

from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    two = Ranks(tmp_path_factory.mktemp("ranks"))
    yield two
    two.close()
