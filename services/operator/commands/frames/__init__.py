"""Commands that send a raw Ethernet frame through the transmitter."""
