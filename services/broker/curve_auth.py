"""Connections to a bus with keys: each proves a public key, and one whose key is not on the list is refused.

ZeroMQ asks (ZAP, RFC 27), and pyzmq's authenticator answers in a thread of its own. The role of a key comes with every
message of the connection, as its User-Id.
"""

from collections import Counter
from pathlib import Path
from typing import Final

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from shared.bus.curve_keys import BROKER, load_keys, load_roles
from shared.ledger.counters import BUS_REFUSED
from shared.log import get_logger
from shared.settings.explain import SettingsError

DOMAIN: Final = "fanwire"

log = get_logger()


class CurveAuth:
    """The broker's key and its list of the keys that may connect. SettingsError when a key is not right."""

    def __init__(self, directory: Path) -> None:
        self.keys = load_keys(directory, BROKER)
        if self.keys.public != self.keys.broker:
            raise SettingsError(
                f"{directory / BROKER}.public: not the public key of {BROKER}.secret; use the pair made together"
            )
        self._directory = directory
        self._roles = load_roles(directory)
        self._unknown = self._unproven = 0  # each thread has its own counter
        self.monitors: list[zmq.Socket[bytes]] = []
        """Sockets that are readable when a handshake has failed."""

    @property
    def counters(self) -> Counter[str]:
        """The number of connections refused."""
        return +Counter({BUS_REFUSED: self._unknown + self._unproven})

    def require_keys(self, *sockets: zmq.Socket[bytes]) -> None:
        """Make sockets that are not bound yet accept only connections with a known key; none before `start`."""
        for sock in sockets:
            sock.set(zmq.CURVE_SERVER, 1)
            sock.set(zmq.CURVE_SECRETKEY, self.keys.secret)
            sock.set(zmq.ZAP_DOMAIN, DOMAIN.encode())
            sock.set(zmq.ZAP_ENFORCE_DOMAIN, 1)
            self.monitors.append(sock.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL))

    def start(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Begin to answer for the sockets of a context."""
        self._authenticator = _Authenticator(context, self._roles)
        self._authenticator.configure_curve_callback(DOMAIN, self)
        self._authenticator.start()

    def stop(self) -> None:
        """Stop answering."""
        for monitor in self.monitors:
            monitor.close()
        self._authenticator.stop()

    def count_failed_handshakes(self) -> None:
        """Count connections that ended before they had proven a key: ZeroMQ asks nothing about those."""
        for monitor in self.monitors:
            while monitor.poll(0):
                if recv_monitor_message(monitor)["event"] == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                    self._unproven += 1
                    log.warning("connection refused: it has no key; if it is fanwire's, set [bus] keys there")

    def callback(self, _domain: str, key: bytes) -> bool:
        """Return whether a public key is on the list; pyzmq calls this by its name."""
        if key in self._roles:
            return True
        self._unknown += 1
        log.warning(
            "connection refused: unknown key; if it is fanwire's, write it to `file` and restart the broker",
            key=key.decode(),
            file=str(self._directory / "ROLE.NAME.public"),
        )
        return False


class _Authenticator(ThreadAuthenticator):
    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], roles: dict[bytes, str]) -> None:
        super().__init__(context)
        self._roles = roles

    def curve_user_id(self, client_public_key: bytes) -> str:
        """Return the role; ZeroMQ puts it on each message of the connection."""
        return self._roles[z85.encode(client_public_key)]
