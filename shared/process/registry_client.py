"""The registry's JSON protocol from the client's side: a line a request, a line an answer, by TCP, TLS or AF_UNIX."""

import socket
import ssl
import struct
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import msgspec

from shared.client import ListedClient, Withheld
from shared.net.addresses import Endpoint, SocketAddress, pack_address, resolve
from shared.process.lifecycle import FAILED, NOT_PERMITTED, UNAVAILABLE, USAGE, OperatorError

T = TypeVar("T")
CONNECT_SECONDS: Final = 3.0
"""Below the 4 s that a drain may take: `collect` may be told to end while it connects."""
READ_SIZE: Final = 1 << 18


class Progress(msgspec.Struct, frozen=True):
    """A collector's way back to live copies, by the past that it is being given."""

    rows: int = 0
    seconds: float = 0.0
    per_second: int = 0
    level_in: float | None = None


class Entry(ListedClient, frozen=True, kw_only=True):
    """A client as the registry lists it. Fields that a newer registry adds are ignored."""

    generation: int = 0
    expires_in: float | None = None
    health: str | None = None
    health_since: float | None = None
    lost: int | None = None
    withheld: Withheld | None = None
    host: str = ""
    catching_up: Progress | None = None

    def __post_init__(self) -> None:
        if self.streams:  # doctor asks the kernel for the route there
            pack_address(self.address)


class Answer(msgspec.Struct, frozen=True):
    """Fields that an answer may have. `client`, `clients` and `streams` stay JSON: `--json` prints them whole."""

    ok: bool
    error: str = ""
    message: str = ""
    client: msgspec.Raw = msgspec.Raw(b"null")
    clients: msgspec.Raw = msgspec.Raw(b"{}")
    streams: msgspec.Raw = msgspec.Raw(b"{}")
    withheld: dict[str, Withheld] = msgspec.field(default_factory=dict)

    def entry(self) -> Entry:
        """Return the client granted by `register`."""
        return _decode(self.client, Entry)

    def entries(self) -> dict[str, Entry]:
        """Return the clients of `list`, by name."""
        return _decode(self.clients, dict[str, Entry])

    def listeners(self) -> dict[str, tuple[str, ...]]:
        """Return the endpoints in the answer to `streams`, by name of the stream."""
        return {name: each.listen for name, each in _decode(self.streams, dict[str, _Stream]).items()}


class _Stream(msgspec.Struct, frozen=True):
    """A stream in the answer to `streams`."""

    listen: tuple[str, ...] = ()


class _Told(msgspec.Struct, frozen=True):
    """A line that the registry sends unasked: an event, or its reason for closing."""

    event: str = ""
    message: str = ""


class RefusedError(OperatorError):
    """A refusal by the registry; `error` is its stable word."""

    def __init__(self, answer: Answer) -> None:
        code = NOT_PERMITTED if answer.error == "not_permitted" else FAILED
        super().__init__(code, answer.message or answer.error or "refused without a reason")
        self.error = answer.error


@dataclass(frozen=True, slots=True)
class Access:
    """The gateway's address, and the credentials for it: a certificate by `tls`, and a token."""

    endpoint: Endpoint
    tls: ssl.SSLContext | None = None
    token: str | None = None


class UnreachableError(OperatorError):
    """There is no gateway, or it went away."""

    def __init__(self, endpoint: Endpoint, reason: str) -> None:
        cure = "is fanwire running? start it with `fanwire run`, or name another by --gateway"
        if endpoint.scheme == "tls":
            cure = "is it running, and does it take this certificate? its log says why a handshake failed"
        super().__init__(UNAVAILABLE, f"no gateway at {endpoint} ({reason}); {cure}")


class RegistryClient:
    """A connection to the gateway. OperatorError for a fault that the operator can mend."""

    def __init__(self, access: Access, answer_seconds: float) -> None:
        self._endpoint = access.endpoint
        self._received = bytearray()
        try:
            self._connection = _connect(access)
        except ssl.SSLCertVerificationError as error:
            cure = "name who signed its certificate by --authority"
            if "mismatch" in error.verify_message:
                cure = "name the gateway as its certificate does, or make another certificate for it"
            why = error.verify_message.rstrip(".")
            raise OperatorError(NOT_PERMITTED, f"{access.endpoint}: {why}; {cure}") from None
        except OSError as error:
            raise UnreachableError(access.endpoint, error.strerror or str(error)) from None
        self._connection.settimeout(answer_seconds)
        if access.token is not None:
            self._present(access.token)

    def _present(self, token: str) -> None:
        try:
            self.ask("auth", token=token)
        except OperatorError:
            self.close()
            raise

    @property
    def local(self) -> SocketAddress | None:
        """Our end of the connection; None on AF_UNIX, which has no address."""
        return None if self._connection.family == socket.AF_UNIX else self._connection.getsockname()

    def fileno(self) -> int:
        """Return the descriptor; between requests it is readable only for an unasked line, or at the end."""
        return self._connection.fileno()

    def told(self) -> str:
        """Return the gateway's unasked message; call it when the connection is readable between requests."""
        try:
            return _decode(self._line(), _Told).message
        except OSError:
            return "the gateway closed the connection"

    def ask(self, op: str, **fields: Any) -> Answer:
        """Send a request and wait for its answer. RefusedError when it is refused, UnreachableError when none comes."""
        try:
            request = msgspec.json.encode({"op": op, **fields})
        except UnicodeEncodeError:  # an argument that was not UTF-8: Python keeps its bytes as surrogates
            raise OperatorError(USAGE, "an argument is not UTF-8; names have to be") from None
        try:
            self._connection.sendall(request + b"\n")
            while _decode(line := self._line(), _Told).event:
                pass  # an unasked line, before the answer
        except OSError as error:
            raise UnreachableError(self._endpoint, error.strerror or str(error)) from None
        answer = _decode(line, Answer)
        if not answer.ok:
            raise RefusedError(answer)
        return answer

    def _line(self) -> bytes:
        searched = 0
        while (end := self._received.find(b"\n", searched)) < 0:
            searched = len(self._received)
            chunk = self._connection.recv(READ_SIZE)
            if not chunk:
                raise ConnectionResetError("it closed the connection")
            self._received += chunk
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line

    def close(self) -> None:
        """Close the connection; entries held by it go."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _connect(access: Access) -> socket.socket:
    endpoint = access.endpoint
    if not endpoint.path:
        connection = _connect_by_tcp(endpoint)
        # TLS ends its handshake with a message that is not answered: the next request would wait for the delayed ACK.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    else:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # The kernel waits while the listener's queue is full; with Python's timeout connect(2) says EAGAIN at once.
        seconds, part = divmod(CONNECT_SECONDS, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(seconds), int(part * 1e6)))
    try:
        if endpoint.path:
            connection.connect(endpoint.path)
        # It takes the socket over, and closes it when the handshake fails.
        return access.tls.wrap_socket(connection, server_hostname=endpoint.host) if access.tls else connection
    except BlockingIOError:
        connection.close()
        raise TimeoutError("timed out") from None
    except OSError:
        connection.close()
        raise


def _connect_by_tcp(endpoint: Endpoint) -> socket.socket:
    """Connect to the first of the host's addresses that takes it; a resolver is waited for no longer than they are."""
    failed = OSError()
    for family, at in resolve(endpoint.host, endpoint.port, socket.SOCK_STREAM, CONNECT_SECONDS):
        try:
            return _connect_to(family, at)
        except OSError as error:
            failed = error
    raise failed


def _connect_to(family: socket.AddressFamily, at: SocketAddress) -> socket.socket:
    """Connect to an address; of a link-local one it names the interface, which create_connection() does not."""
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.settimeout(CONNECT_SECONDS)
        connection.connect(at)
    except OSError:
        connection.close()
        raise
    return connection


def _decode(line: bytes | msgspec.Raw, kind: type[T]) -> T:
    try:
        str(line, "utf-8")  # also the parts that stay JSON, and are printed
        return msgspec.json.decode(line, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:  # the last: nested thousands deep
        raise OperatorError(
            UNAVAILABLE, f"the answer is not from a fanwire gateway, check --gateway: {error}"
        ) from None
