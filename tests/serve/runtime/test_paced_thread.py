"""A paced thread bounds the share of its functions, and delays no result."""

import asyncio
import time

import pytest

from serve.runtime.paced_thread import MAX_REST_S, SHARE, PacedThread


@pytest.fixture
def thread():
    thread = PacedThread("paced")
    yield thread
    thread.close()


def spin(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
    return time.monotonic()


def test_functions_take_their_share_of_the_time(thread):
    async def run():
        begun = time.monotonic()
        ends = await asyncio.gather(*(thread.run(spin, 0.02) for _ in range(6)))
        return begun, ends

    begun, ends = asyncio.run(run())
    assert ends[-1] - ends[0] >= 5 * 0.02 / SHARE * 0.99
    assert ends == sorted(ends) and ends[0] >= begun


def test_a_result_is_not_delayed_by_its_own_rest(thread):
    async def run():
        begun = time.monotonic()
        end = await thread.run(spin, 0.05)
        return time.monotonic() - end, end - begun

    returned, _ = asyncio.run(run())
    assert returned < 0.05 * (1 / SHARE - 1)


def test_the_longest_rest_is_bounded(thread):
    async def run():
        first = await thread.run(spin, MAX_REST_S / (1 / SHARE - 1) + 0.3)
        return await thread.run(spin, 0.0) - first

    assert MAX_REST_S * 0.99 <= asyncio.run(run()) < MAX_REST_S + 5


def test_errors_come_back(thread):
    async def run():
        with pytest.raises(ZeroDivisionError):
            await thread.run(lambda: 1 / 0)
        return await thread.run(lambda: 3)

    assert asyncio.run(run()) == 3
