"""A service's process: start, signals, reload, memory ceiling, log limit."""
