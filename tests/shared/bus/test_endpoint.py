from shared.bus.endpoint import LARGEST_MESSAGE, QUEUE_SHARE, queue_limit


def test_queue_of_the_bus_fits_its_share() -> None:
    """A queue holds as many messages as set, or as many of the largest as its share of the memory has room for."""
    assert queue_limit(256, QUEUE_SHARE * LARGEST_MESSAGE * 100) == 100
    assert queue_limit(256, QUEUE_SHARE * LARGEST_MESSAGE * 300) == 256
    assert queue_limit(256, 1) == 1


def test_without_a_ceiling_the_setting_holds() -> None:
    """Nothing is dropped where no ceiling is set."""
    assert queue_limit(256, 0) == 256
