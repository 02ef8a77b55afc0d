"""Files of captured datagrams: pcapng that tshark and tcpdump open, and pcapng or pcap that they have written."""
