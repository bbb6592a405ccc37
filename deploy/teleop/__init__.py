"""Demonstrations by people: devices that they drive with, what is driven, and the loop that records.

device ── Signals ─▶ steering ── action ─▶ safety gate ─▶ world (a simulator, a robot) ─▶ recorder
   ▲                                                         │
   └── the person ◀── page: a picture, a countdown, counts ◀─┘
"""
