import asyncio
from contextlib import suppress

from shared.nats.tasks import end_tasks


def test_a_task_ends_that_swallows_a_cancellation() -> None:
    """Tasks end that go on after their first cancellation, that fail, or that have ended already."""

    async def swallow() -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        await asyncio.sleep(60)

    async def fail() -> None:
        raise OSError

    async def run() -> list[asyncio.Task[None]]:
        tasks = [asyncio.create_task(each) for each in (swallow(), fail(), asyncio.sleep(0), asyncio.sleep(60))]
        await asyncio.sleep(0.01)
        await asyncio.wait_for(end_tasks(tasks, 0.01), 30)
        return tasks

    swallowing, failed, ended, asleep = asyncio.run(run())
    assert swallowing.cancelled()
    assert asleep.cancelled()
    assert isinstance(failed.exception(), OSError)
    assert ended.result() is None
