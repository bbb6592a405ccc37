"""The operator's page, in two processes: its own, and the one that has the port and stops."""
