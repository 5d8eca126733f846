"""A budget is shared in order, and nothing of it is lost."""

import asyncio
import random
import threading

import pytest

from serve.runtime.budget import Budget


def test_amounts_beyond_the_limit_wait_in_order():
    async def run():
        budget, order = Budget(10), []

        async def take(name, amount):
            await budget.acquire(amount)
            order.append(name)

        await take("a", 6)
        tasks = [asyncio.create_task(take(name, amount)) for name, amount in (("b", 6), ("c", 1))]
        await asyncio.sleep(0.01)
        assert order == ["a"] and budget.num_waiting == 2  # c would fit, but b was first
        assert not budget.try_acquire(1)
        budget.release(6)
        await asyncio.gather(*tasks)
        assert order == ["a", "b", "c"] and budget.used == 7

    asyncio.run(run())


def test_one_amount_larger_than_the_limit_is_served_alone():
    budget = Budget(10)
    assert budget.try_acquire(99)
    assert not budget.try_acquire(1)
    budget.release(99)
    assert budget.try_acquire(1)
    assert not budget.try_acquire(99)


def test_cancelled_waits_give_everything_back():
    async def run():
        budget, rng = Budget(10), random.Random(0)

        async def hold():
            amount = rng.randint(1, 12)
            await budget.acquire(amount)
            try:
                await asyncio.sleep(rng.random() * 1e-3)
            finally:
                budget.release(amount)

        tasks = [asyncio.create_task(hold()) for _ in range(300)]
        for task in tasks[::3]:
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert budget.used == budget.num_waiting == 0

    asyncio.run(run())


def test_event_loops_share_a_budget():
    budget, served = Budget(1), []

    async def hold():
        for _ in range(50):
            await budget.acquire(1)
            await asyncio.sleep(0)
            served.append(budget.used)
            budget.release(1)

    threads = [threading.Thread(target=asyncio.run, args=(hold(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert served == [1] * 150 and budget.used == 0


def test_giving_back_too_much_is_a_bug():
    with pytest.raises(AssertionError, match="2 given back, 0 taken"):
        Budget(3).release(2)
