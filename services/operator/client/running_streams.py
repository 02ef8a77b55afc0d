"""Streams of the services that run: those may have other settings than a command, or not have read them again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from services.operator.cli.output import say
from shared.process.lifecycle import USAGE, OperatorError
from shared.process.registry_client import Access, RefusedError, RegistryClient
from shared.settings.entries import Stream
from shared.settings.explain import did_you_mean
from shared.settings.model import Settings

ANSWER_SECONDS: Final = 2.0
CURE: Final = "reload the services by SIGHUP, or name their settings by --config"
Listeners = Mapping[str, tuple[str, ...]]
"""By stream, its endpoints as settings have them."""


def running_streams(settings: Settings) -> Listeners | None:
    """Return the streams that the gateway of these settings has; None where none on this host answers."""
    near = settings.gateway.near
    if near is None:
        return None
    try:
        with RegistryClient(Access(near), ANSWER_SECONDS) as registry:
            return registry.ask("streams").listeners()
    except (OperatorError, OSError):
        return None


def difference(running: Listeners, settings: Settings) -> str:
    """Return in which streams the services and the settings of this command differ; nothing where they do not."""
    told = {stream.name: stream.listen for stream in settings.streams}
    elsewhere = {name for name in running.keys() & told.keys() if running[name] != told[name]}
    sides = (
        ("only the running services have", running.keys() - told.keys()),
        ("only these settings have", told.keys() - running.keys()),
        ("with other listeners run", elsewhere),
    )
    return "; ".join(f"{side} {', '.join(sorted(names))}" for side, names in sides if names)


def tell_difference(running: Listeners | None, settings: Settings) -> None:
    """Print on standard error in which streams the services and these settings differ, if they do."""
    if running is not None and (found := difference(running, settings)):
        say(f"streams differ: {found}; {CURE}")


@contextmanager
def unknown_explained(settings: Settings) -> Iterator[None]:
    """Print how its streams and those of the settings differ, where the gateway refuses a stream meanwhile."""
    try:
        yield
    except RefusedError as refused:
        if refused.error == "unknown_stream":
            tell_difference(running_streams(settings), settings)
        raise


def streams_of(settings: Settings) -> dict[str, Stream]:
    """Return the streams that run, or those of the settings where nobody tells; print how the two differ."""
    running, told = running_streams(settings), {stream.name: stream for stream in settings.streams}
    tell_difference(running, settings)
    if running is None:
        return told
    return {name: Stream(name=name, listen=listen) for name, listen in running.items()}


def stream_named(name: str, settings: Settings) -> Stream:
    """Return the stream of that name. OperatorError (64) names those that there are."""
    streams = streams_of(settings)
    if name not in streams:
        known = ", ".join(streams)
        raise OperatorError(USAGE, f"no stream {name!r}{did_you_mean(name, streams)}; the streams are: {known}")
    return streams[name]
