"""What is wrong with demonstrations: found from the buffer alone, for any robot.

buffer ─▶ survey (one stream over all rows) ─▶ checks ─▶ findings ─▶ table, JSON, page, repaired copy
"""
