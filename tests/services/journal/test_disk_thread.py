"""The thread that waits for the disk."""

from services.journal.disk_thread import DiskThread, Job
from tests.stack import wait_until


def test_what_goes_wrong_in_the_thread_is_raised_in_the_loop() -> None:
    """A fault of a job ends the journal, which is started again, and not the thread alone; later jobs are done."""
    found: list[Exception | str] = []

    def go_wrong() -> Job:
        raise ValueError("a fault of ours")

    def collected() -> bool:
        try:
            disk.collect()
        except ValueError as error:
            found.append(error)
        return len(found) == 2

    disk = DiskThread()
    disk.submit(go_wrong)
    disk.submit(lambda: lambda: found.append("done"))
    wait_until(collected, lambda: f"{found}")
    assert [str(each) for each in found] == ["a fault of ours", "done"]
    assert disk.close()
