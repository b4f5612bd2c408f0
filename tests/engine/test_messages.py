"""The two numbers that messages work out."""

import dataclasses

import pytest

from cabochon.engine.fake import FAKE_INFO
from cabochon.engine.messages import EngineStats


@pytest.mark.parametrize(("used", "cached", "usage"), [(0, 100, 0.0), (25, 75, 0.25), (100, 0, 1.0)])
def test_usage_counts_pages_of_live_requests_alone(used: int, cached: int, usage: float) -> None:
    assert EngineStats(pages_total=100, pages_used=used, pages_cached=cached).kv_usage == usage


def test_an_engine_without_pages_uses_none() -> None:
    assert EngineStats().kv_usage == 0


@pytest.mark.parametrize(("pages", "groups", "tokens"), [(12, 2, 96), (13, 2, 96), (5, 6, 0)])
def test_capacity_is_what_every_group_can_hold(pages: int, groups: int, tokens: int) -> None:
    info = dataclasses.replace(FAKE_INFO, num_pages=pages, num_groups=groups, page_tokens=16)
    assert info.kv_capacity_tokens == tokens
