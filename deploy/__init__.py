"""Running a bundle on a robot, in real time.

    clock ─▶ tick ─▶ robot.observe ─▶ Agent ─▶ policy ─▶ Agent ─▶ Gate ─▶ robot.command     (`loop.run_episode`)
                                                                  └─ refused ─▶ robot.hold

Everything in this picture is a part that is handed in: `run` puts the parts of a configuration together, tests
put in others.
"""
