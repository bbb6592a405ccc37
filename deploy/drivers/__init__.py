"""Arms and cameras that can be bought, behind `protocols.Arm` and `protocols.Camera`.

Each imports its vendor's library in `connect`, says what to install where it is missing, and knows how the robot stops
when our process dies: docs/bringup.md has the table. With `dry_run` an arm's driver connects, reads and checks, and
nothing moves.
"""
