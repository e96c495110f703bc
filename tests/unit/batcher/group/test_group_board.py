"""What ranks know of the batch that a message belongs to."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from wsgi_ts.batcher.shm.group_board import GroupBoard, GroupFollower, GroupLeader


@pytest.fixture
def board() -> Iterator[GroupBoard]:
    made = GroupBoard(f"wsgi-ts-test-{secrets.token_hex(8)}", 2, create=True)
    yield made
    made.remove()


def test_a_rank_knows_whether_more_may_come_of_a_batch(board: GroupBoard) -> None:
    leader, follower = GroupLeader(board), GroupFollower(board, 1)
    assert not follower.tells_more
    leader.trace(7, 100)
    assert (follower.traced, follower.tells_more) == ((7, 100), True)
    leader.trace_ended()
    assert (follower.traced, follower.tells_more) == ((7, 100), False)
    # The next request of the same batch.
    leader.trace(7, 100)
    assert follower.tells_more
    leader.trace(0, 200)
    assert not follower.tells_more
    leader.trace_ended()
    assert not follower.tells_more
