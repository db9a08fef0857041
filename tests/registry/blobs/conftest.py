"""A server for blobs that are far away."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.s3_server import CannotStart, S3Server, s3_server


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server; what needs it says why it was skipped where there is none."""
    pytest.importorskip("obstore", reason="obstore is not installed: pip install 'icm-lora[team]'")
    try:
        with s3_server(tmp_path_factory.mktemp("s3")) as server:
            _make_bucket(server)
            yield server
    except CannotStart as error:
        pytest.skip(str(error))


@pytest.fixture
def s3_environment(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the test find the server."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)


def _make_bucket(server: S3Server) -> None:
    """Write the first object, which takes the server seconds."""
    from registry.storage.blobs.objects import connect

    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        connect("s3://icm/first").claim("tests")
