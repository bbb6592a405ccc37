"""Many runs of one command: `action-diffusion sweep`.

words ─▶ grid: combinations, each a configuration and a folder ─▶ launch: Hydra's sweeper and launcher ─▶ job: one run,
a process of its own ─▶ summary: intervals, groups, differences ─▶ page
"""
