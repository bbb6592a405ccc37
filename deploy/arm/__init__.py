"""The arm's process: its loop, its gate, the path it follows, and the loop's end of the link to it."""
