"""Plans from what a policy knows: longer ones than it was trained on, ones that a cost prefers, ones that end well.

All of it goes through `DiffusionPolicy.sample` and hooks; there is no second sampling loop.
"""
