import pytest

from services.gateway.admission.address_proof import MOST, MOST_IN_ALL, PERIOD_SECONDS, VALID_SECONDS, AddressProofs
from services.gateway.admission.peer import Peer
from services.gateway.admission.rights import Rights
from services.gateway.protocol.requests import Register, RequestError
from shared.client import CHALLENGE_PREFIX

RED, BLUE = (Peer(number, "192.0.2.7", 4000, Rights(holder)) for number, holder in enumerate(("red", "blue"), 1))


class Post:
    """Takes what is sent; the clock is the test's."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sent: list[tuple[bytes, str, int]] = []
        self.proofs = AddressProofs(lambda *datagram: self.sent.append(datagram), lambda: self.now)

    def challenge(self, address: str = "192.0.2.9", name: str = "c", peer: Peer = RED) -> str:
        """Get a register challenged; return the message to its client."""
        wish = Register(name=name, streams=("*",), address=address, port=9000)
        refused = self.proofs.challenge(wish, address, peer)
        assert refused.error == "unproven_address"
        return str(refused)

    def nonce(self, number: int = -1) -> str:
        """Return the nonce in a datagram."""
        return self.sent[number][0].removeprefix(CHALLENGE_PREFIX).decode()


@pytest.fixture
def post() -> Post:
    """Nothing sent yet, at time 0."""
    return Post()


def refused(post: Post, name: str, nonce: str, peer: Peer = RED) -> bool:
    """Return whether a confirm is refused."""
    with pytest.raises(RequestError) as caught:
        post.proofs.redeem(name, nonce, peer)
    return caught.value.error == "unproven_address"


def test_nonce_proves_the_address_once(post: Post) -> None:
    """The nonce that came to the address gets the register it was for, one time."""
    assert "fanwire-challenge NONCE" in post.challenge()
    assert post.sent[0][1:] == ("192.0.2.9", 9000)
    assert refused(post, "c", "x")
    assert refused(post, "d", post.nonce())
    assert post.proofs.redeem("c", post.nonce(), RED).address == "192.0.2.9"
    assert refused(post, "c", post.nonce())


def test_nonce_is_valid_for_a_while(post: Post) -> None:
    """A nonce that comes back too late proves nothing."""
    post.challenge()
    post.now = VALID_SECONDS
    assert refused(post, "c", post.nonce())


def test_other_registers_do_not_void_a_challenge(post: Post) -> None:
    """Somebody who registers the same name meanwhile can't keep the true owner of an address from proving it."""
    post.challenge()
    post.challenge("192.0.2.66")
    assert post.proofs.redeem("c", post.nonce(0), RED).address == "192.0.2.9"


def test_an_address_gets_few_challenges(post: Post) -> None:
    """A holder causes a limited number of datagrams to one address in a minute, and in all, whatever the names."""
    for number in range(MOST):
        post.challenge(name=f"n{number}")
    assert "the limit of challenges is reached" in post.challenge(name="other")
    for number in range(MOST_IN_ALL):
        post.challenge(f"10.0.{number // 256}.{number % 256}")
    assert len(post.sent) == MOST_IN_ALL
    post.now = PERIOD_SECONDS
    post.challenge()
    assert len(post.sent) == MOST_IN_ALL + 1


def test_nobody_uses_up_anothers_challenges(post: Post) -> None:
    """A holder that has asked for all that it may, at another's address first, leaves the other all of its own."""
    for number in range(2 * MOST_IN_ALL):
        post.challenge(f"10.0.0.{number // MOST}")
    assert len(post.sent) == MOST_IN_ALL
    for _ in range(MOST):
        post.challenge("10.0.0.0", peer=BLUE)
    assert post.sent[MOST_IN_ALL:] == [(each[0], "10.0.0.0", 9000) for each in post.sent[-MOST:]]
    assert post.proofs.redeem("c", post.nonce(), BLUE).address == "10.0.0.0"


def test_nonce_is_for_who_asked(post: Post) -> None:
    """A nonce proves nothing for another client, be it at the same address; its own may send it from elsewhere."""
    post.challenge()
    for other in (BLUE, Peer(3, "192.0.2.7", 1, Rights())):
        assert refused(post, "c", post.nonce(), other)
    assert post.proofs.redeem("c", post.nonce(), Peer(9, "192.0.2.8", 1, RED.rights)).name == "c"


def test_address_that_cannot_be_asked() -> None:
    """The client is told why, where no datagram can go."""

    def send(payload: bytes, address: str, port: int) -> None:
        raise OSError(101, "Network is unreachable")

    proofs = AddressProofs(send, lambda: 0.0)
    told = proofs.challenge(Register(name="c", streams=("*",), address="192.0.2.9", port=9), "192.0.2.9", RED)
    assert "Network is unreachable" in str(told)


def test_proof_needs_a_port(post: Post) -> None:
    """A register without port has no place that a datagram could go to."""
    assert post.proofs.challenge(Register(name="c", address="192.0.2.9"), "192.0.2.9", RED).error == "bad_request"
    assert post.sent == []
