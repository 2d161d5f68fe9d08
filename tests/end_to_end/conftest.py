"""What tests of whole projects share: a stand-in for an object store."""

from collections.abc import Iterator

import pytest

from servers import ObjectStore


@pytest.fixture(scope="module")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    store = ObjectStore(tmp_path_factory.mktemp("object-store"))
    store.start()
    yield store
    store.kill()
