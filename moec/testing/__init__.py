"""Tools for measuring what overlaps, on machines that have neither many ranks nor slow links."""

from __future__ import annotations

from moec.testing.delay import DelayedGroup, delayed_group
from moec.testing.sleep import SleepingLayer

__all__ = ["DelayedGroup", "SleepingLayer", "delayed_group"]
