"""Share stores: addresses, transports, push, pull, remote reading, the catalogue."""
