"""The client protocol: bytes to requests (`decoder`, `requests`), and the documented list of names. No I/O."""
