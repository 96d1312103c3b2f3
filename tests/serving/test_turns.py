"""One at a time, in order, and no more waiting than there are places."""

import anyio
import pytest

from fedjax_llm.serving.turns import Busy, Turns


def test_one_is_in_and_the_others_follow_in_order():
    seen = []

    async def one(turns, number):
        async with turns.place() as turn:
            await turn()
            seen.append(("in", number))
            await anyio.sleep(0)
            seen.append(("out", number))

    async def all_of_them():
        turns = Turns(2)
        async with anyio.create_task_group() as tasks:
            for number in range(3):
                tasks.start_soon(one, turns, number)

    anyio.run(all_of_them)
    assert seen == [(way, number) for number in range(3) for way in ("in", "out")]


def test_beyond_the_queue_it_is_busy_until_a_place_is_free():
    async def crowd():
        turns = Turns(1)
        async with turns.place() as first:
            await first()
            async with turns.place():
                with pytest.raises(Busy):
                    async with turns.place():
                        pass
            async with turns.place():
                pass

    anyio.run(crowd)


def test_who_leaves_the_queue_takes_no_turn_with_him():
    async def leaving():
        turns = Turns(1)
        async with turns.place() as first:
            await first()
            with anyio.move_on_after(0.01):
                async with turns.place() as second:
                    await second()
        async with turns.place() as third:
            with anyio.fail_after(1):
                await third()

    anyio.run(leaving)
