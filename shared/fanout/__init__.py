"""The loop, registry replica, backlog and health judgement that forwarder and transmitter have in common."""
