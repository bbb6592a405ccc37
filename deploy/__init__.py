"""Running a bundle on a robot, in real time.

    clock ─▶ tick ─▶ robot.observe ─▶ Agent ─▶ policy ─▶ Agent ─▶ Gate ─▶ robot.command     (`loop.episode.run_episode`)
                                                                  └─ refused ─▶ robot.hold

In real time the robot is further processes: the arm's, with a gate and a watchdog of its own (`arm.process`), and each
camera's (`cameras.process`). docs/deploy.md has that picture, and says what stops what.

Everything in this picture is a part that is handed in: `run` puts the parts of a configuration together, tests
put in others.
"""
