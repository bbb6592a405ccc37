"""One episode in real time: clock, action queue, inference worker, gate, operator, and what subscribers are told."""
