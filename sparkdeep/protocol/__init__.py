"""Everything that crosses between driver and replica, as values and as frames.

- `exchange.py`: updates through shared storage
- `messages.py`: the typed headers that cross the wire
- `orders.py`: what the driver asks of a replica, and a job that carries one order
- `refusals.py`: what the driver refuses from a replica, by name
- `tls.py`: the certificate of one run, and the socket it encrypts
- `wire.py`: frames on a socket
"""
