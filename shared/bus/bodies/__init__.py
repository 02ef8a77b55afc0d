"""The bodies of bus messages, a module a subject, and how they are packed within limits."""
