"""Looking at buffers, and copies of them with other rows."""
