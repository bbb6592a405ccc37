"""Learning from reward: trials in a simulator or on an arm, critics of chunks, and methods that stand on both.

Experience ─▶ Transitions ─▶ critics ─▶ Method: what makes the policy better ─▶ a bundle like any other
    ▲                                     │
    └──────────── chunks to try ──────────┘
"""
