"""The only code that touches clocks, memory counters and the host's state."""
