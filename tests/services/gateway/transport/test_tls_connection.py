import asyncio
import asyncio.sslproto
import ssl

import pytest

from services.gateway.transport.tls_connection import TLS_READ_SIZE, limit_buffers

BY_DEFAULT = 256 * 1024


def test_the_private_part_of_asyncio_that_is_set_does_what_it_is_set_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """`SSLProtocol.max_size` is the size of the buffer that asyncio has for each TLS connection, and too large.

    A Python release that renames it, or no longer goes by it, fails here.
    """
    assert vars(asyncio.sslproto.SSLProtocol)["max_size"] == BY_DEFAULT
    monkeypatch.setattr(asyncio.sslproto.SSLProtocol, "max_size", BY_DEFAULT)  # puts it back

    async def size() -> int:
        protocol = asyncio.sslproto.SSLProtocol(
            asyncio.get_running_loop(),
            asyncio.Protocol(),
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
            asyncio.get_running_loop().create_future(),
            server_side=True,
        )
        size = len(protocol.get_buffer(-1))
        transport = protocol._get_app_transport()  # type: ignore[attr-defined]
        transport.abort()  # else it complains that nobody has closed it
        return size

    assert asyncio.run(size()) == BY_DEFAULT
    limit_buffers()
    assert asyncio.run(size()) == TLS_READ_SIZE
